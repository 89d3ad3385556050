"""The only reader of environment variables."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the machine, not the recipe, decides."""

    home: Path
    """Where relative paths of recipes start, and where runs and the tracking store are kept
    (`VALLE_HOME`; default: the current folder)."""

    cache: Path
    """Node-local cache: the memory-mapped copies of token datasets (`VALLE_CACHE`; default:
    `valle` in the user's cache folder)."""

    tracking_uri: str
    """MLflow's address (`MLFLOW_TRACKING_URI`; default: sqlite in `home`)."""

    ray_address: str | None
    """A running cluster (`RAY_ADDRESS`); None starts an embedded one."""

    ray_token_exists: bool
    """True when this user has a Ray authentication token (file or variable)."""

    inside_ray_job: bool
    """True in the driver of a submitted job, whose working directory Ray has shipped already."""

    on_kuberay: bool
    """True in a pod that KubeRay manages."""

    logical_gpus: bool
    """True when this cluster's GPUs are numbers only (`ray start --num-gpus` on a machine without
    one) and workers that are given one compute on the CPU, for tests of placement
    (`VALLE_LOGICAL_GPUS=1`)."""


def read() -> Settings:
    """The settings as the environment has them now."""
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


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set anew."""
    return {**os.environ, **changes}


WORKER_VARIABLES = (
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "VALLE_LOGICAL_GPUS",
)  # fmt: skip
"""Variables that hold for a driver's workers as well: where storage and tracking are. None is a
credential, nor a fact about the driver's machine."""

_WITH_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")


def worker_environment() -> dict[str, str]:
    """What the workers of a driver outside the cluster must know of its environment: where its
    relative paths start, where storage and tracking are, and what `VALLE_FORWARD` names.

    Credentials are not among it: nodes have roles of their own, and Ray writes these values to the
    logs of every node and shows them on its dashboard. `VALLE_FORWARD=AWS_ACCESS_KEY_ID,...` hands
    on whatever it names all the same, which is warned of; so is a password inside an address.
    Raises ValueError where it names what is not set, or `VALLE_CACHE`, which each node decides.
    """
    extra = [name for name in os.environ.get("VALLE_FORWARD", "").split(",") if name]
    if "VALLE_CACHE" in extra:
        raise ValueError("VALLE_FORWARD: VALLE_CACHE is a folder of each node's own; set it there")
    if unset := [name for name in extra if name not in os.environ]:
        raise ValueError(f"VALLE_FORWARD: {unset[0]} is not set")
    names = (*WORKER_VARIABLES, *extra)
    values = {name: os.environ[name] for name in names if name in os.environ}
    exposed = [
        name for name, value in values.items() if name in extra or _WITH_PASSWORD.search(value)
    ]
    if exposed:
        logging.getLogger(__name__).warning(
            "handed to every node, and readable in Ray's logs and on its dashboard: %s",
            ", ".join(exposed),
        )
    return {**values, "VALLE_HOME": str(read().home)}
