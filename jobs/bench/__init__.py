"""Benchmarks, `python -m valle.jobs.bench.NAME`; variants of the same work are timed in turn."""
