"""A real MLflow server that tests stop, start again and reset."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers import clusters


class MlflowServer:
    """A tracking server that keeps artifacts itself, as a team's would; one port all along."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = clusters.free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.artifacts = folder / "artifacts"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts the server, unless it runs; returns when it answers."""
        if self._process is not None:
            return
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port",
            str(self._port), "--workers", "1", "--backend-store-uri",
            f"sqlite:///{self._folder}/server.db", "--artifacts-destination", str(self.artifacts),
        ]  # fmt: skip
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
        clusters.wait_for(lambda: clusters.responds(f"{self.address}/health"), 120, "MLflow")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends the server, with all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, number)
            self._process.wait(timeout=30)
            self._process = None

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of the server: SIGSTOP makes it hang, SIGCONT go on."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def reset(self) -> None:
        """Starts anew under the same address, with an empty database."""
        self.kill()
        (self._folder / "server.db").unlink()
        self.start()
