"""Benchmarks for a machine with a GPU: the command (`run.py`), a file per phase, and shared parts.

Nothing here imports Ray or MLflow: such a machine may have only torch, numpy, safetensors, pyarrow
and the wheels that `make gpu-wheels` collects, and no network.
"""
