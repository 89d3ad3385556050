"""Output of a command: its own lines on the terminal, that of libraries in a log file."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from valle.jobs import demo
from valle.platform import console
from valle.platform.lease import LeaseError
from valle.serve.ready import find_reason, ready_message

TALKATIVE = """
import logging, os, subprocess, sys, threading, warnings
logging.basicConfig()
library = logging.getLogger("ray.serve")
library.addHandler(logging.StreamHandler())
from valle.jobs import demo
from valle.platform import console
from valle.platform.progress import progress_bar
with console.quiet("test", verbose="verbose" in sys.argv) as log:
    kept = sys.stdout
    print("ready: the command's own words")
    library.warning("noise of a library")
    logging.getLogger("late").addHandler(logging.StreamHandler())
    logging.getLogger("late").warning("noise of a late library")
    thread = threading.Thread(target=lambda: print("noise of a worker"))
    thread.start(); thread.join()
    subprocess.run(["sh", "-c", "echo noise of a process; echo noise of its errors >&2"])
    os.write(2, b"noise of native code\\n")
    warnings.warn("noise of a warning")
    logging.getLogger("valle.some.module").warning("a fault that matters")
    progress_bar(total=3, label="bar", unit="step").close()
    if "raise" in sys.argv: raise ValueError("the command's own error")
    print("a line without its end", end=" ")
print("after")
import atexit
atexit.register(lambda: kept.isatty() or kept.write(""))
"""


def run(home: Path, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of the script together, and its log."""
    environment = {**os.environ, "VALLE_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", TALKATIVE, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    logs = list((home / "logs").glob("test-*.log")) if (home / "logs").exists() else []
    return done.stdout, logs[0].read_text() if logs else ""


def test_quiet_shows_the_commands_own_words(home: Path) -> None:
    shown, log = run(home)
    assert "ready: the command's own words\n" in shown and shown.endswith("after\n")
    assert "warning: a fault that matters\n" in shown
    assert "bar:" in shown
    assert "noise" not in shown
    assert [f"noise of {name}" in log for name in (
        "a library", "a late library", "a worker", "a process", "its errors", "native code",
        "a warning",
    )] == [True] * 7  # fmt: skip


def test_verbose_brings_everything_back(home: Path) -> None:
    shown, log = run(home, "verbose")
    assert shown.count("noise of") >= 7 and "own words" in shown
    assert log == ""


def test_an_error_inside_is_shown(home: Path) -> None:
    shown, log = run(home, "raise")
    assert "ValueError: the command's own error" in shown and "after" not in shown
    assert "own error" not in log


def test_a_terminal_is_recognised_as_one(home: Path) -> None:
    """Progress bars redraw their line on a terminal only."""
    code = (
        "import sys; from valle.platform import console\n"
        "with console.quiet('test'): print(sys.stdout.isatty(), sys.stderr.isatty(), "
        "console.terminal().isatty())"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "VALLE_HOME": str(home)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=child, stderr=child, env=environment
    )
    process.wait()
    os.close(child)
    assert os.read(parent, 1000).decode().split() == ["True", "False", "True"]
    os.close(parent)


def test_demo_that_runs_twice_is_a_message(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_twice(name: str, port: int) -> None:
        raise LeaseError("another run is writing there")

    monkeypatch.setattr(demo, "run", run_twice)
    with pytest.raises(SystemExit) as exit:
        demo.main(["--recipe", "demo", "--verbose"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == "error: another run is writing there\n"


def test_terminal_outside_is_stderr() -> None:
    assert console.terminal() is sys.stderr


REPLICA_FAILED = """Deploying application valle failed: Failed to update the deployments ['AR']:
The deployment failed to start 3 times in a row. See logs for more details. Error:
ray::ServeReplica:valle:AR.initialize_and_get_metadata() (pid=5, ip=10.0.0.1)
  File "ray/serve/replica.py", line 983, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "valle/serve/deployments/ar.py", line 40, in __init__
    model = load(folder)
ValueError: /x/model.safetensors does not fit its config.json: header too large
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (REPLICA_FAILED,
         "ValueError: /x/model.safetensors does not fit its config.json: header too large"),
        ("Deploying failed.\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n",
         "OutOfMemoryError: CUDA out of memory. Tried 2 GiB"),
        ("first\n\nthe last line\n", "the last line"),
        ("RuntimeError: only a wrapper", "RuntimeError: only a wrapper"),
        ("", "no reason given"),
    ],
)  # fmt: skip
def test_find_reason(text: str, reason: str) -> None:
    assert find_reason(text) == reason


def test_ready_message_says_how_to_use_it() -> None:
    text = ready_message(
        "http://127.0.0.1:8000", model="m (now 3)", voices=["ann", "joe"], voices_folder="/v",
        has_keys=True, seconds=21.4, log=Path("/logs/serve.log"),
    )  # fmt: skip
    assert text.splitlines()[0] == "ready after 21 s: http://127.0.0.1:8000"
    assert len(text.splitlines()) <= 9
    for part in ("ann, joe", "m (now 3)", "/docs", "Bearer KEY", "/logs/serve.log", "Ctrl-C"):
        assert part in text
    keyless = ready_message(
        "u", model="m", voices=[], voices_folder="/v", has_keys=False, seconds=1, log=None
    )
    assert "Bearer" not in keyless and "none yet" in keyless and "log" not in keyless


def test_stage_shows_that_it_still_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SIGN_OF_LIFE_SECONDS", 0.01)
    times: dict[str, float] = {}
    with demo.stage("slow", times):
        time.sleep(0.2)
    captured = capsys.readouterr()
    assert captured.out == "\n=== slow\n"
    assert "slow: 0 s so far" in captured.err and times["slow"] >= 0.2
    with pytest.raises(KeyError), demo.stage("failing", times):
        raise KeyError
    assert "failing" not in times
