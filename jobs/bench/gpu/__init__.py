"""What `jobs/bench/gpu/run.py` runs: a file per phase, and what the phases share.

Nothing below imports Ray or MLflow: a machine with a card has torch, numpy, safetensors, pyarrow
and the wheels that `make gpu-wheels` collects, and no network.
"""
