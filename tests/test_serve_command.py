"""`valle serve` around the endpoint: what it prints, its exit status, Ctrl-C at any moment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from valle.platform import registry
from valle.serve import run

SERVE = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from valle.serve import run
from valle.serve.app_args import AppArgs

moment = sys.argv[1]

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

@contextmanager
def connect():
    os.write(1, b"noise of Ray\\n")
    yield

@contextmanager
def endpoint(args, port, host):
    if moment == "fails":
        raise run.StartError("ValueError: no weights")
    if moment == "starting":
        interrupt()
        time.sleep(30)
    if moment != "starting":
        threading.Timer(0.3, interrupt).start()
    try:
        yield f"http://{host}:{port}"
    finally:
        if moment == "stopping":
            interrupt()  # a second Ctrl-C
        print("shut down")

run.connect, run.endpoint = connect, endpoint
run._describe_model = lambda model: model
sys.exit(run._serve(AppArgs(model="m", voices=sys.argv[2]), "127.0.0.1", 8000, verbose=False))
"""


@pytest.mark.parametrize(
    ("moment", "status", "last"),
    [
        ("ready", 0, "stopped"),
        ("stopping", 0, "stopped"),
        ("starting", 130, "stopped before it was ready"),
        ("fails", 1, "log: "),
    ],
)
def test_serve_says_what_happens(home: Path, moment: str, status: int, last: str) -> None:
    (home / "voices").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SERVE, moment, str(home / "voices")],
        env={**os.environ, "VALLE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == status, shown
    assert "Traceback" not in shown and "noise" not in shown
    assert shown.startswith("starting m on http://127.0.0.1:8000")
    assert shown.splitlines()[-1].startswith(last)
    assert ("ready after" in shown) == (moment in ("ready", "stopping"))
    if moment == "fails":
        assert "error: the endpoint did not start: ValueError: no weights" in shown
    (log,) = (home / "logs").iterdir()
    assert "noise of Ray" in log.read_text()


def test_serve_names_the_version_as_responses_do(home: Path) -> None:
    name = run._describe_model(registry.CHAMPION)
    pinned = registry.pin(registry.CHAMPION)
    assert name == f"models:/valle@champion (now {registry.display_name(pinned)})"
    assert run._describe_model(pinned) == pinned
