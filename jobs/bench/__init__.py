"""Benchmarks, each `python -m valle.jobs.bench.NAME`: variants of the same work, timed alternately."""
