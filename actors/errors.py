"""Every error that Berth raises on purpose, named by the boundary it crosses.

    BerthError
    ├── InputError            the user's config, suite, data, tool or folder: exit 2
    │   ├── UnsupportedModel  an architecture or attention argument that the engine does not do
    │   ├── ModelUnavailable  missing, gated, weightless or unreadable model
    │   └── RunConflict       the run folder is locked, or holds another run
    ├── Incomplete            the run stopped in good order and can be resumed: exit 3
    ├── EngineError           one request, or the engine itself
    │   ├── ContextOverflow   the request alone exceeds the model's context
    │   ├── OutOfMemory       exceeds the whole KV pool, or fails alone at the smallest bound: another pool may do
    │   ├── Cancelled         the sequence was ended while the request ran
    │   └── EngineDead        the engine cannot go on; its replica must be replaced
    ├── Fenced                a higher attempt of the row has taken its lease over
    ├── NotHome               a call reached another replica than its lease's home: ask for a new one
    └── ToolError             a tool's failure: an observation for the model
        ├── ToolTimeout       ran past its limit
        └── ToolCrash         a bug in the tool or its process: the row fails, by no fault of the model

Knows nothing of the rest of the project.
"""

from __future__ import annotations

from typing import Literal

Stage = Literal["load", "prefill", "decode", "never_fits"]


class BerthError(Exception):
    """Base of every error raised on purpose."""


class InputError(BerthError):
    """Something the user wrote cannot be used; `str()` is the whole message for them.

    Args:
        what: what is wrong, in a sentence.
        file: file (and line) it stands in.
        field: dotted field name.
        got: the offending value, shortened.
        wants: what would be accepted.
    """

    def __init__(
        self, what: str, *, file: str | None = None, field: str | None = None, got: object = None, wants: str = ""
    ):
        place = ": ".join(str(part) for part in (file, field) if part)
        text = f"{place}: {what}" if place else what
        if got is not None:
            shown = repr(got)
            text += f" (got {shown if len(shown) <= 120 else shown[:117] + '...'})"
        if wants:
            text += f"; wants {wants}"
        super().__init__(text)
        self.message = text

    def __reduce__(self):
        return (_rebuild, (type(self), self.message))


def _rebuild(kind: type[InputError], message: str) -> InputError:
    return kind(message)


class UnsupportedModel(InputError):
    """The engine refuses this architecture by name rather than compute something else."""


class ModelUnavailable(InputError):
    """The model is missing, gated, has no weights, or cannot be read."""


class RunConflict(InputError):
    """The run folder is in use, or holds a run of another config."""


class Incomplete(BerthError):
    """The run stopped in good order before its end; the same command resumes it."""


class EngineError(BerthError):
    """One request failed in the engine; other requests are unaffected.

    Attributes:
        gpu_s: of the engine's busy seconds what the request had taken, as `Usage.gpu_s`; None where nobody knows.
    """

    gpu_s: float | None = None


class ContextOverflow(EngineError):
    """The request alone needs a longer context than the model has."""


class OutOfMemory(EngineError):
    """The model, or the request alone at the smallest bound, needs more memory than a replica has.

    Args:
        text: what happened.
        stage: where memory ran out: `load`, `prefill`, `decode`, or `never_fits` where it was refused unrun.
        needed_bytes, free_bytes: what it takes and what there is, on all ranks together; None where not known.
    """

    def __init__(
        self, text: str, stage: Stage = "decode", needed_bytes: int | None = None, free_bytes: int | None = None
    ):
        super().__init__(text)
        self.stage: Stage = stage
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes


class Cancelled(EngineError):
    """The request's sequence was ended while it was queued or running."""


class EngineDead(EngineError):
    """The engine cannot continue (dead CUDA context, lost rank)."""


class Fenced(BerthError):
    """A higher attempt of the row has taken its lease over; this one is to stop and record nothing."""


class NotHome(BerthError):
    """A call reached a replica that is not its lease's home, which is gone or not known yet; nothing was computed."""


class ToolError(BerthError):
    """A tool refused or failed; its text becomes the observation."""


class ToolTimeout(ToolError):
    """A tool ran past its `timeout_s`."""


class ToolCrash(ToolError):
    """A tool broke in a way that is not the model's doing."""
