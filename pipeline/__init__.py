"""The job: what runs, in which order, and where the results go. Loads no torch at import."""

__version__ = "0.1.0"
