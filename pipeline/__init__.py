"""The job: what runs, in which order, and where the results go. Loads no torch at import."""

__version__ = "0.1.0"

import os

# Under `uv run` Ray would start every worker with `uv run` in a copy of this folder, which installs everything again
# there. Read when Ray is first imported.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
