"""Correctness and speed of this repository on a CUDA device.

    python3 jobs/bench/gpu/run.py --out gpu            P0, P1, P3, P4 in five minutes
    python3 jobs/bench/gpu/run.py --phases all --out gpu                in nine
    python3 jobs/bench/gpu/run.py --device cpu --quick --out gpu   tests the code, measures nothing

The machine needs an NVIDIA GPU, Python 3.12, torch 2.11 or newer, numpy, safetensors and pyarrow;
no Ray, no network, no installation. All other imports are wheels brought along (`make gpu-wheels`,
docs/gpu.md). Each phase is a process of its own with a time limit. Results are written to
OUT/gpu.json while they are measured, the phases' output to OUT/gpu.log.

Exit status: 0 when every check passed; 1 when one failed, or a phase raised, crashed or ran out of
time before its checks; 3 when all checks passed and a speed floor was missed; 2 for a wrong command
line.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valle.jobs.bench.gpu.report import Results
    from valle.jobs.bench.gpu.schedule import Schedule

ROOT = Path(__file__).resolve().parents[3]
MODULE = "valle.jobs.bench.gpu.run"


def main(argv: Sequence[str] | None = None) -> int:
    """The command, with or without an installed package; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("valle") is None:
        # `python3 jobs/bench/gpu/run.py`, nothing installed: the root has to be on the path
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", MODULE, *arguments])
    return run(arguments)


def run(argv: Sequence[str]) -> int:
    """Runs the phases one after the other; returns the exit status."""
    from valle.jobs.bench.gpu import report
    from valle.jobs.bench.gpu.schedule import schedule_for

    arguments = parse_arguments(argv)
    # a machine on loan may be reclaimed: what has been measured is reported then as well
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    phases: tuple[str, ...] = arguments.phases
    schedule = schedule_for(phases).scaled(arguments.time_scale)
    deadline = time.time() + schedule.total
    out: Path = arguments.out
    results = report.Results(
        out,
        header={
            "device": arguments.device,
            "size": arguments.size,
            "quick": arguments.quick,
            "phases": list(phases),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "source_sha256": report.source_hash(ROOT),
        },
    )
    with (
        tempfile.TemporaryDirectory(prefix="valle-gpu-", ignore_cleanup_errors=True) as name,
        (out / "gpu.log").open("wb") as log,
    ):
        scratch = Path(name)
        try:
            for phase in phases:
                result = run_or_skip(phase, arguments, results, schedule, deadline, scratch, log)
                results.add(phase, result)
                print(results.lines(phase), flush=True)
                if result["status"] == "stopped":
                    break
        except StopRequested as error:  # between two phases: the next one is the one that stopped
            for phase in [name for name in phases if name not in results.values["phases_run"]][:1]:
                results.add(phase, {"status": "stopped", "reason": f"before it began: {error}"})
    results.finish()
    print(results.summary())
    return results.exit_code


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 where it is wrong or `--out` cannot be written."""
    from valle.jobs.bench.gpu.schedule import DEFAULT_PHASES, PHASES, SIZES

    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--phases",
        default=",".join(DEFAULT_PHASES),
        help=f"of {', '.join(PHASES)}; `all` (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--size", choices=SIZES, help="of the models whose speed is measured (full; quick: tiny)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: tests the code, measures nothing"
    )
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="factor on all time limits (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    names = list(PHASES) if arguments.phases == "all" else arguments.phases.split(",")
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        parser.error(f"--phases: {', '.join(unknown)} is none of {', '.join(PHASES)}, all")
    arguments.phases = tuple(dict.fromkeys(names))
    arguments.size = arguments.size or ("tiny" if arguments.quick else "full")
    arguments.out = arguments.out.absolute()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.log").touch()
    except OSError as error:
        parser.error(f"--out: cannot write there ({error})")
    return arguments


def run_or_skip(
    phase: str,
    arguments: argparse.Namespace,
    results: "Results",
    schedule: "Schedule",
    deadline: float,
    scratch: Path,
    log: Any,
) -> dict[str, Any]:
    """The result of a phase, which has been added to `results` piece by piece; a phase is skipped
    when the others leave it no time. `deadline`: Unix time of the end of the last phase."""
    from valle.jobs.bench.gpu.schedule import PHASES

    limit = schedule.limit(arguments.phases, phase, deadline - time.time())
    if limit < 1:
        return {"status": "skipped", "reason": "no time was left"}
    print(f"{phase} {PHASES[phase].title}: {limit:.0f} s at most", flush=True)
    on_result = partial(results.add, phase)
    return run_phase(phase, arguments, results.limits, limit, scratch, log, on_result)


class StopRequested(Exception):
    """SIGTERM or SIGINT arrived."""


def _stop(number: int, frame: object) -> None:
    raise StopRequested(signal.Signals(number).name)


def run_phase(
    phase: str,
    arguments: argparse.Namespace,
    limits: dict[str, Any] | None,
    limit: float,
    scratch: Path,
    log: Any,
    on_result: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs a phase in a process; returns its result, also after a crash, a hang or a signal.

    `on_result` receives the partial result whenever it has changed: the machine may disappear at
    any moment.
    """
    from valle.jobs.bench.gpu.schedule import GRACE_SECONDS, PHASES

    path = scratch / f"{phase}.json"
    started = time.time()
    command = [
        sys.executable,
        "-m",
        "valle.jobs.bench.gpu.phase",
        phase,
        "--result",
        str(path),
        "--deadline",
        str(started + limit),
        "--device",
        arguments.device,
        "--size",
        arguments.size,
        "--scratch",
        str(scratch),
    ]
    command += ["--limits", json.dumps(limits)] if limits else []
    command += ["--quick"] if arguments.quick else []
    log.write(f"==> {phase}\n".encode())
    log.flush()
    start = log.tell()
    # a session of its own: its children (compilers' workers) can be killed with it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**phase_environment(arguments.device, scratch), **PHASES[phase].environment},
        start_new_session=True,
    )
    try:
        code = wait_for_phase(process, started + limit + GRACE_SECONDS, path, on_result)
        status, reason = "crashed", f"the process ended with status {code}"
    except subprocess.TimeoutExpired:
        status, reason = "killed", f"it ran {GRACE_SECONDS:.0f} s past its time limit"
    except StopRequested as error:
        status, reason = "stopped", f"the command received {error}"
    finally:
        kill_process_group(process)
    # the file holds all that was measured; a process that ended by itself has set its status
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if status == "stopped" or result.get("status") not in ("done", "failed"):
        result |= {"status": status, "reason": reason, "log": log_tail(Path(log.name), start)}
    return result | {"wall_seconds": round(time.time() - started, 1)}


def wait_for_phase(
    process: "subprocess.Popen[bytes]",
    until: float,
    path: Path,
    on_result: Callable[[dict[str, Any]], None],
    every: float = 1.0,
) -> int:
    """The exit status of a phase's process; calls `on_result` whenever its file has changed.

    Raises TimeoutExpired when the process still runs at the Unix time `until`.
    """
    seen = 0
    while True:
        try:
            return process.wait(max(0.0, min(every, until - time.time())))
        except subprocess.TimeoutExpired:
            if path.exists() and (changed := path.stat().st_mtime_ns) != seen:
                seen = changed
                on_result(json.loads(path.read_text()))
            if time.time() >= until:
                raise


def kill_process_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the remaining processes of a phase; each phase is a process group of its own."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def phase_environment(device: str, scratch: Path) -> dict[str, str]:
    """Environment of a phase: caches in a writable folder, torch.distributed with one worker."""
    from valle.platform import settings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return settings.child_environment(
        VALLE_HOME=str(scratch),
        VALLE_CACHE=str(scratch / "cache"),
        TORCHINDUCTOR_CACHE_DIR=str(scratch / "inductor"),
        TRITON_CACHE_DIR=str(scratch / "triton"),
        TORCH_EXTENSIONS_DIR=str(scratch / "extensions"),
        MPLCONFIGDIR=str(scratch / "matplotlib"),
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NCCL_SOCKET_IFNAME="lo",
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR=device,
        PYTHONUNBUFFERED="1",
        PYTHONDONTWRITEBYTECODE="1",
    )


def log_tail(path: Path, start: int, n_bytes: int = 4000) -> str:
    """The last bytes of a phase's output, which begins at byte `start` of the log."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - n_bytes))
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
