"""connect(): the only `ray.init` of the project."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import valle
from valle.platform import settings

CODE_ROOT = Path(valle.__file__).resolve().parent.parent
_NOT_SHIPPED = ["/.venv/", "/.git/", "/data/", "/runs/", "/mlflow.db"]


@contextmanager
def connect(*, num_cpus: int | None = None) -> Iterator[None]:
    """Joins the cluster at `RAY_ADDRESS`, or starts an embedded one for the time of the block.

    Ray 2.60 switches token authentication on by itself for the clusters it starts, but not for
    drivers that connect to one by address: those wait 20 s and fail without a word of it. So with
    an address and a token at hand the mode is set here, unless RAY_AUTH_MODE says otherwise. A
    connection that already exists (a test, a larger program) is used as it is.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    machine = settings.read()
    if machine.ray_address is not None and machine.ray_token_exists:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # two lines per print otherwise, and one warning a worker about a future default
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    arguments: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if machine.ray_address is None:
        ray.init(num_cpus=num_cpus, **arguments)
    elif machine.inside_ray_job:
        ray.init(**arguments)
    else:  # a laptop driving a cluster: its workers get this checkout and its settings
        runtime_env = {
            "working_dir": str(CODE_ROOT), "excludes": _NOT_SHIPPED,
            "env_vars": settings.worker_environment(),
        }  # fmt: skip
        ray.init(address=machine.ray_address, runtime_env=runtime_env, **arguments)
    try:
        yield
    finally:
        ray.shutdown()
