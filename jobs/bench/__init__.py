"""Benchmarks, each `python -m valle.jobs.bench.NAME`; contenders are timed side by side."""
