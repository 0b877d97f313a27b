"""Benchmarks: one a file, each prints a table and writes JSON."""
