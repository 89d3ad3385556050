"""The only reader of environment variables."""

import os
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


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set anew."""
    return {**os.environ, **changes}


FORWARDED = ("AWS_", "MLFLOW_", "VALLE_")
"""How the names of variables begin that hold for a driver's workers as well."""

FILES = ("_FILE", "_PROFILE", "_PATH")
"""How those end that name a file, or a place in one, which only the driver's machine has."""


def forwarded() -> dict[str, str]:
    """What the workers of a driver outside the cluster must know of its environment: where its
    relative paths start, and what was set of storage, tracking and this project's own variables."""
    named = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FORWARDED) and not name.endswith(FILES)
    }
    here = read()
    if "VALLE_CACHE" in named:
        named["VALLE_CACHE"] = str(here.cache)
    return {**named, "VALLE_HOME": str(here.home)}
