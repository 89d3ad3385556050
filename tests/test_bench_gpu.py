"""`make gpu` on a CPU: phases, failures, exit status, and imports on a bare machine."""

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import clusters

from valle.jobs.bench.gpu import report, schedule
from valle.jobs.bench.gpu import run as bench_gpu
from valle.jobs.bench.gpu import wheels as gpu_wheels
from valle.jobs.bench.gpu.record import Record
from valle.platform import settings

ROOT = Path(__file__).resolve().parent.parent
ABSENT = (
    "ray", "mlflow", "soundfile", "soxr", "sentencex", "phonemizer", "num2words", "espeakng_loader",
    "wetext", "langcodes", "fontTools", "markdown_it",
    "yaml", "docstring_parser", "fastapi", "librosa", "matplotlib", "boto3", "av", "torchaudio",
    "scipy", "sklearn",
)  # fmt: skip
"""Packages that a bare machine lacks or may lack."""


def bare_environment(folder: Path, *lacking: str) -> dict[str, str]:
    """Environment of a Python that cannot import the packages that a bare machine lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        f"""
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in {(*ABSENT, *lacking)!r}
        return None if absent else super().find_spec(name, path, target)
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""
    )
    return settings.child_environment(PYTHONPATH=f"{folder}:{ROOT}")


def run_bench(tmp_path: Path, *arguments: str, lacking: tuple[str, ...] = ()) -> tuple[int, Any]:
    """Exit status and phases of gpu.json, of the command on a bare machine without a GPU."""
    out = tmp_path / "out"
    command = [sys.executable, "jobs/bench/gpu/run.py", "--device", "cpu", "--quick", *arguments]
    command += ["--out", str(out), "--time-scale", "5"]
    environment = bare_environment(tmp_path / "bare", *lacking)
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (out / "gpu.json").exists(), completed.stdout + completed.stderr
    values = json.loads((out / "gpu.json").read_text())
    assert values["exit_code"] == completed.returncode
    assert f"exit status {completed.returncode}" in completed.stdout
    return completed.returncode, values["phases_run"]


def passed_checks(result: dict[str, Any]) -> set[str]:
    """Names of the checks of a phase; all must have passed."""
    assert result["status"] == "done", result
    assert not result["errors"], result["errors"]
    assert [check for check in result["checks"] if not check["passed"]] == []
    return {check["name"] for check in result["checks"]}


def test_numerics_phase_on_a_bare_machine(tmp_path: Path) -> None:
    status, phases = run_bench(tmp_path, "--phases", "P1")
    assert status == 0 and list(phases) == ["P1"]
    expected = {
        "cached = uncached, group 2",
        "engine with four guided slots = generate, group 1",
        "engine with four guided slots = generate, group 2",
        "NAR batched = plain",
        "codec: codes equal to the CPU's, TF32 off",
        "codec: samples equal to the CPU's",
        "uniforms = the CPU's",
    }
    for kind in ("ar", "nar"):
        expected |= {f"golden {kind}: {what}" for what in ("logits", "loss", "gradients")}
        expected |= {f"golden {kind}: pinned logits"}
    assert expected <= passed_checks(phases["P1"])
    checks = {check["name"]: check for check in phases["P1"]["checks"]}
    # float32 against float64: equal to rounding, and not the same computation
    assert 0 < checks["golden nar: logits"]["relative_error"] < 1e-5
    assert checks["golden nar: gradients"]["parameters"] > 20
    assert checks["engine with four guided slots = generate, group 2"]["frames"] > 50
    assert checks["greedy speech = the CPU's, group 1"]["distinct"] > 2
    assert "no module" in json.loads((tmp_path / "out/gpu.json").read_text())["picture"].lower()


def test_run_continues_after_a_failing_phase(tmp_path: Path) -> None:
    status, phases = run_bench(tmp_path, "--phases", "P6,P0", lacking=("cachetools",))
    assert status == report.EXIT_FAILED
    assert phases["P6"]["status"] == "failed"
    assert "No module named 'cachetools'" in phases["P6"]["errors"][0]["traceback"]
    assert phases["P0"]["status"] == "done"
    constants = phases["P0"]["measurements"][1]
    assert constants["name"] == "constants" and constants["copy_gigabytes_per_second"] > 0.1


@pytest.mark.slow
def test_parallel_phase_on_a_bare_machine(tmp_path: Path) -> None:
    status, phases = run_bench(tmp_path, "--phases", "P2")
    assert status == 0
    names = passed_checks(phases["P2"])
    for backend in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        for kind in ("ar", "nar"):
            assert f"{backend} {kind} fp32: weights = plain" in names
            assert f"{backend} {kind} bf16: losses follow float32" in names
            assert f"{backend} {kind} bf16: resumed = uninterrupted" in names
    resumed = [c for c in phases["P2"]["checks"] if c["name"].endswith("resumed = uninterrupted")]
    assert len(resumed) == 20 and all(check["to_the_bit"] for check in resumed)


@pytest.mark.slow
def test_speed_phases_on_a_bare_machine(tmp_path: Path) -> None:
    status, phases = run_bench(tmp_path, "--phases", "P0,P3,P4,P5,P6")
    assert status == 0
    for result in phases.values():
        passed_checks(result)
    measurements = {m["name"]: m for result in phases.values() for m in result["measurements"]}
    assert (
        measurements["ar 600 bf16"]["mfu"] > 0 and 0 < measurements["ar 600 bf16"]["padding"] < 0.5
    )
    assert 0 < measurements["nar 600 fp32"]["loader_share"] < 1
    engine = measurements["engine 3 fp32, guided"]
    assert 0 < engine["share_of_bound"] < 1 and engine["run_frames_per_second"] > 0
    assert measurements["engine 3 fp32, guided: a step"]["kernels"] > 100
    assert measurements["chunks of 15 frames"]["times_real_time"] > 0
    assert measurements["NAR 3 bf16"]["milliseconds"] > 0
    assert "engine hidden states = one pass without a cache, float32" in passed_checks(phases["P4"])
    assert {f"memory as planned, {p}" for p in ("fp32", "bf16")} <= passed_checks(phases["P6"])


@pytest.mark.slow
def test_run_phase_without_a_cuda_device_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides a GPU from the phase's process
    arguments = Namespace(device="cuda", size="tiny", quick=True)
    with (tmp_path / "log").open("wb") as log:
        result = bench_gpu.run_phase("P0", arguments, None, 60, tmp_path, log, [].append)
    assert result["status"] == "failed"
    assert "torch finds no CUDA device" in result["errors"][0]["traceback"]


def test_run_phase_records_a_crash_and_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("wb") as log:
        wrong = Namespace(device="cpu", size="nonsense", quick=True)
        crashed = bench_gpu.run_phase("P1", wrong, None, 60, tmp_path, log, [].append)
        monkeypatch.setattr(schedule, "GRACE_SECONDS", 0.0)
        slow = Namespace(device="cpu", size="tiny", quick=True)
        killed = bench_gpu.run_phase("P2", slow, None, 0.2, tmp_path, log, [].append)
    assert crashed["status"] == "crashed" and "invalid choice: 'nonsense'" in crashed["log"]
    assert killed["status"] == "killed"
    assert (
        report.exit_code({"P1": crashed}) == report.exit_code({"P2": killed}) == report.EXIT_FAILED
    )
    values = {"phases_run": {"P1": crashed, "P2": killed}}
    assert "CRASHED P1" in report.table(values) and "KILLED P2" in report.table(values)


@pytest.mark.slow
def test_command_stopped_by_a_signal_leaves_results_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "jobs/bench/gpu/run.py", "--device", "cpu", "--quick"]
    command += ["--phases", "P2,P0", "--out", str(out)]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env=bare_environment(tmp_path / "bare"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and "P2" in running.stdout.readline()
    command_process = psutil.Process(running.pid)
    clusters.wait_for(command_process.children, 30, "the phase's process")
    (phase,) = command_process.children()
    running.terminate()
    assert "STOPPED P2" in running.communicate(timeout=30)[0]
    values = json.loads((out / "gpu.json").read_text())
    assert running.returncode == values["exit_code"] == report.EXIT_FAILED
    assert values["phases_run"]["P2"]["reason"] == "the command received SIGTERM"
    assert list(values["phases_run"]) == ["P2"] and not phase.is_running()


def test_exit_code_of_checks_floors_and_skipped_entries(tmp_path: Path) -> None:
    def status(record: Record) -> int:
        record.status = "done"
        record.write()
        return report.exit_code({"P1": json.loads((tmp_path / "r.json").read_text())})

    def new_record(seconds: float = 60) -> Record:
        return Record(tmp_path / "r.json", time.time() + seconds)

    complete = new_record()
    complete.check("a", True)
    complete.expect_floor("f", 1.0)
    assert status(complete) == report.EXIT_MISSED, "not measured is not met"
    complete.floor("f", 2.0)
    complete.skip("not needed", "no time")
    assert status(complete) == 0
    complete.expect_floor("g", 1.0)
    complete.floor("g", 0.5)
    assert status(complete) == report.EXIT_MISSED
    complete.check("b", False)
    assert status(complete) == report.EXIT_FAILED

    raised = new_record()
    assert not raised.attempt("division", lambda: [1 / 0])
    assert "ZeroDivisionError" in raised.errors[0]["traceback"]
    assert raised.attempt("next", lambda: raised.check("c", True)), "what comes next is still done"
    assert status(raised) == report.EXIT_FAILED

    late = new_record(seconds=5)
    assert not late.attempt("long", lambda: None, 10)
    assert status(late) == 0 and "no time" in late.skipped[0]["reason"]
    assert not late.attempt("long", lambda: None, 10, required=True)
    assert status(late) == report.EXIT_FAILED

    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    full = new_record()
    assert not full.attempt("large", too_much) and not full.errors
    assert full.skipped[0]["reason"] == "out of memory: CUDA out of memory. Tried to allocate"


def test_schedules_fit_five_and_nine_minutes() -> None:
    for phases, expected, minutes in (
        (schedule.DEFAULT_PHASES, schedule.FIVE_MINUTES, 5),
        (tuple(schedule.PHASES), schedule.NINE_MINUTES, 9),
    ):
        assert schedule.schedule_for(phases) is expected and set(expected.seconds) == set(phases)
        assert sum(expected.seconds.values()) <= expected.total
        assert expected.total + schedule.GRACE_SECONDS <= minutes * 60


def test_limit_includes_unused_seconds_of_earlier_phases() -> None:
    phases, seconds = schedule.DEFAULT_PHASES, schedule.FIVE_MINUTES.seconds
    assert schedule.FIVE_MINUTES.limit(phases, "P4", 200) == 200
    reserved = seconds["P3"] + seconds["P4"]
    assert schedule.FIVE_MINUTES.limit(phases, "P1", 250) == 250 - reserved
    assert schedule.FIVE_MINUTES.limit(phases, "P1", reserved - 1) < 0, (
        "what comes later keeps its time"
    )
    assert schedule.FIVE_MINUTES.scaled(2).limit(phases, "P4", 200) == 200
    assert schedule.FIVE_MINUTES.scaled(2).seconds["P4"] == 2 * seconds["P4"]


def test_wait_for_phase_reports_partial_results(tmp_path: Path) -> None:
    path, shown = tmp_path / "phase.json", []
    path.write_text('{"status": "running", "measurements": [{"name": "m"}]}')
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def on_result(result: dict[str, Any]) -> None:
        shown.append(result)
        running.terminate()

    try:
        code = bench_gpu.wait_for_phase(running, time.time() + 30, path, on_result, every=0.05)
    finally:
        running.kill()
    assert code == -signal.SIGTERM and shown == [json.loads(path.read_text())]


def test_finish_without_a_picture_keeps_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        assert json.loads((tmp_path / "gpu.json").read_text())["exit_code"] == 0
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "draw", broken)
    results = report.Results(tmp_path, {"size": "tiny"})
    results.add("P0", {"status": "done", "errors": [], "checks": [], "floors": []})
    results.finish()
    values = json.loads((tmp_path / "gpu.json").read_text())
    assert values["exit_code"] == 0 and "RuntimeError: no font" in values["picture"]


def test_parse_arguments_refuses_unknown_phases_and_unwritable_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_gpu.parse_arguments(["--phases", "P1,P9"])
    assert refused.value.code == 2 and "P9 is none of P0, P1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        bench_gpu.parse_arguments(["--out", str(tmp_path / "file" / "below")])
    assert "--out: cannot write there" in capsys.readouterr().err
    everything = bench_gpu.parse_arguments(["--phases", "all", "--out", str(tmp_path)])
    assert everything.phases == tuple(schedule.PHASES)


def test_draw_writes_a_png(tmp_path: Path) -> None:
    measurements = {
        "P3": [{"name": "ar", "mfu": 0.2}],
        "P4": [{"name": "engine", "frames_per_second": 5.0, "limit_frames_per_second": 9.0}],
    }
    values = {"limits": {"name": "synthetic"}, "size": "full"} | {
        "phases_run": {name: {"measurements": entries} for name, entries in measurements.items()}
    }
    report.draw(values, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_load_accepts_earlier_names(tmp_path: Path) -> None:
    entry = {"name": "a", "reason": "no time", "required": False}
    phases = {"P0": {"status": "done", "errors": [], "floors": [], "left_out": [entry]}}
    path = tmp_path / "gpu.json"
    path.write_text(
        json.dumps({"card": {"name": "synthetic"}, "size": "full", "phases_run": phases})
    )
    values = report.load(path)
    assert values["limits"] == {"name": "synthetic"} and "card" not in values
    assert "skipped: a: no time" in report.table(values)


def test_wheels_are_pinned_and_within_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    pins = gpu_wheels.pinned_versions((ROOT / "constraints.txt").read_text())
    names = (*gpu_wheels.SOURCE_ONLY, *gpu_wheels.WHEELS)
    assert len(gpu_wheels.requirements(names, pins)) == len(names)
    with pytest.raises(ValueError, match=r"constraints.txt: no version of nothing"):
        gpu_wheels.requirements(["nothing"], pins)
    assert gpu_wheels.print_sizes({"a.whl": 2**20}, 2**20) == 0
    assert gpu_wheels.print_sizes({"a.whl": 2**20}, gpu_wheels.LIMIT) == 1
    assert "too large" in capsys.readouterr().err
    assert gpu_wheels.tracked_bytes() < gpu_wheels.LIMIT
