"""One endpoint at a time on the cluster that all tests share."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import clusters
from valle.serve.app_args import AppArgs


@dataclass(frozen=True)
class RunningEndpoint:
    url: str
    home: Path
    """`VALLE_HOME` of the endpoint: its registry and its voices."""


class SharedEndpoint:
    """Keeps an endpoint running for as long as tests ask for the same one."""

    def __init__(self, new_home: Callable[[], Path]) -> None:
        self._new_home = new_home
        self._stack = ExitStack()
        self._key: object = None
        self._running: RunningEndpoint | None = None

    def get(self, key: object, args: AppArgs, fill: Callable[[Path], object]) -> RunningEndpoint:
        """The endpoint of a key: the one that runs, or a new one in a new home, into which `fill`
        puts what the endpoint needs."""
        from valle.serve.run import endpoint  # imports ray.serve, which few tests need

        if self._running is None or self._key != key:
            self.close()
            home = self._new_home()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VALLE_HOME", str(home))
                patch.setenv("VALLE_CACHE", str(home / "cache"))
                # MLflow sets it to the registry of the test before
                patch.delenv("MLFLOW_TRACKING_URI", raising=False)
                fill(home)
                url = self._stack.enter_context(endpoint(args, clusters.free_port()))
            self._key, self._running = key, RunningEndpoint(url, home)
        return self._running

    def close(self) -> None:
        """Shuts Serve down, whoever has started it."""
        from ray import serve

        self._running = None
        self._stack.close()
        serve.shutdown()
