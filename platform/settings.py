"""The only reader of environment variables."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a machine, read from its environment; those of a run are in its recipe."""

    home: Path
    """Start of relative paths; holds runs and the default tracking store (`VALLE_HOME`; default:
    the current folder)."""

    cache: Path
    """Cache of this node: memory-mapped token datasets, models, the official codec (`VALLE_CACHE`;
    default: `valle` in the user's cache folder)."""

    tracking_uri: str
    """Address of MLflow (`MLFLOW_TRACKING_URI`; default: sqlite in `home`)."""

    ray_address: str | None
    """Address of a running cluster (`RAY_ADDRESS`); None: an embedded one is started."""

    ray_token_exists: bool
    """True when this user has a Ray authentication token (file or variable)."""

    inside_ray_job: bool
    """True in the driver of a submitted job, whose code Ray has shipped."""

    on_kuberay: bool
    """True in a pod managed by KubeRay."""

    logical_gpus: bool
    """True for a cluster with GPUs that only Ray counts (`ray start --num-gpus` on a machine
    without any): workers with such a GPU compute on the CPU, for tests of placement
    (`VALLE_LOGICAL_GPUS=1`)."""


def read() -> Settings:
    """The settings from the present environment."""
    env = os.environ
    home = Path(env.get("VALLE_HOME", ".")).absolute()
    cache_root = env.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Settings(
        home=home,
        cache=Path(env.get("VALLE_CACHE", f"{cache_root}/valle")).absolute(),
        tracking_uri=env.get("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db"),
        ray_address=env.get("RAY_ADDRESS"),
        ray_token_exists="RAY_AUTH_TOKEN" in env
        or Path(env.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).exists(),
        inside_ray_job="RAY_JOB_CONFIG_JSON_ENV_VAR" in env,
        on_kuberay="RAY_USAGE_STATS_KUBERAY_IN_USE" in env,
        logical_gpus=env.get("VALLE_LOGICAL_GPUS", "0") not in ("", "0"),
    )


def storage_variables() -> tuple[tuple[str, str], ...]:
    """The variables that decide which storage server is used, with which credentials."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: this process's, with some variables replaced."""
    return {**os.environ, **changes}


def bare_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process that must not know credentials or addresses: the
    variables by which libraries are found, and `changes`."""
    names = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HOME", "TMPDIR", "SYSTEMROOT")
    return {name: os.environ[name] for name in names if name in os.environ} | changes


WORKER_VARIABLES = (
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "VALLE_LOGICAL_GPUS",
)  # fmt: skip
"""Variables that a driver passes to its workers: addresses of storage and tracking. None holds a
credential or depends on the driver's machine."""

_WITH_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")


def worker_environment() -> dict[str, str]:
    """The variables that a driver outside the cluster sets for its workers.

    These are `VALLE_HOME`, `WORKER_VARIABLES` and the names listed in `VALLE_FORWARD`. Credentials
    are left out: nodes have roles of their own, and Ray writes the values to every node's logs and
    shows them on its dashboard. `VALLE_FORWARD=AWS_ACCESS_KEY_ID,...` passes them all the same,
    with a warning; a password inside an address is warned of too. Raises ValueError if
    `VALLE_FORWARD` names a variable that is not set, or `VALLE_CACHE`, which belongs to a node.
    """
    extra = [name for name in os.environ.get("VALLE_FORWARD", "").split(",") if name]
    if "VALLE_CACHE" in extra:
        raise ValueError("VALLE_FORWARD: VALLE_CACHE is a folder of each node's own; set it there")
    if unset := [name for name in extra if name not in os.environ]:
        raise ValueError(f"VALLE_FORWARD: {unset[0]} is not set; set it, or take it out")
    names = (*WORKER_VARIABLES, *extra)
    values = {name: os.environ[name] for name in names if name in os.environ}
    exposed = [
        name for name, value in values.items() if name in extra or _WITH_PASSWORD.search(value)
    ]
    if exposed:
        logging.getLogger(__name__).warning(
            "passed to every node, and readable in Ray's logs and on its dashboard: %s",
            ", ".join(exposed),
        )
    return {**values, "VALLE_HOME": str(read().home)}


class _MlflowBounds:
    """Variables of MLflow's client that are set while any thread is inside a block."""

    NAMES = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_blocks = 0
        self._set: list[str] = []

    def enter(self, values: tuple[int, int]) -> None:
        with self._lock:
            self._n_blocks += 1
            for name, value in zip(self.NAMES, values, strict=True):
                if name not in os.environ:
                    os.environ[name] = str(value)
                    self._set.append(name)

    def leave(self) -> None:
        with self._lock:
            self._n_blocks -= 1
            while not self._n_blocks and self._set:
                os.environ.pop(self._set.pop(), None)


_MLFLOW_BOUNDS = _MlflowBounds()


@contextmanager
def bounded_mlflow_requests(seconds: int, retries: int) -> Iterator[None]:
    """MLflow's client waits `seconds` for an answer and tries `retries` times more, in the block.

    MLflow reads these bounds from the environment only, at each request. Those that the user has
    set are kept. Blocks may overlap in several threads: the bounds end with the last one.
    """
    _MLFLOW_BOUNDS.enter((seconds, retries))
    try:
        yield
    finally:
        _MLFLOW_BOUNDS.leave()
