"""Benchmarks: one a file, each prints a table and writes JSON."""

import pipeline  # noqa: F401  # sets what Ray reads when it is first imported
