"""The connection to a Ray cluster: `connect` holds the project's only `ray.init`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import valle
from valle.platform import settings

CODE_ROOT = Path(valle.__file__).resolve().parent.parent
"""The checkout, or the folder that Ray has unpacked a job's code into."""

_NOT_SHIPPED = ["/.venv/", "/.git/", "/data/", "/runs/", "/logs/", "/mlflow.db"]


@contextmanager
def connect(*, num_cpus: int | None = None) -> Iterator[None]:
    """Connects to the cluster at `RAY_ADDRESS`, or runs an embedded one during the block.

    An existing connection (of a test, of a larger program) is used unchanged. With an address, the
    workers get this checkout and `settings.worker_environment`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    machine = settings.read()
    # Ray 2.60 enables token authentication for clusters it starts, but not for drivers that connect
    # by address: those fail after 20 s, without a reason
    if machine.ray_address is not None and machine.ray_token_exists:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # otherwise each print gives two lines, and each worker warns of a future default
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    arguments: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if machine.ray_address is None:
        ray.init(num_cpus=num_cpus, **arguments)
    elif machine.inside_ray_job:  # Ray has shipped the code with the job
        ray.init(**arguments)
    else:
        runtime_env = {
            "working_dir": str(CODE_ROOT),
            "excludes": _NOT_SHIPPED,
            "env_vars": settings.worker_environment(),
        }
        ray.init(address=machine.ray_address, runtime_env=runtime_env, **arguments)
    try:
        yield
    finally:
        ray.shutdown()
