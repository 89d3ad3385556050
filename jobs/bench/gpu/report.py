"""The results of all phases: `gpu.json`, lines for the terminal, and a picture at the end.

`python3 -m valle.jobs.bench.gpu.report gpu/gpu.json` draws the picture elsewhere.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valle.jobs.bench.charts import new_figure

EXIT_FAILED, EXIT_MISSED = 1, 3
"""Exit statuses: a check failed; all checks passed and a floor was missed."""


class Results:
    """The results so far, in `gpu.json` after every addition."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self._out = out
        self.limits: dict[str, Any] | None = None
        """Device limits, from the first phase that measured them."""
        self.values: dict[str, Any] = {**header, "limits": None, "phases_run": {}}
        self._write()

    def add(self, phase: str, result: dict[str, Any]) -> None:
        """Sets the result of a phase and writes the file."""
        self.limits = self.limits or result.pop("limits", None)
        result.pop("limits", None)
        self.values["limits"] = self.limits
        self.values["phases_run"][phase] = result
        self._write()

    def finish(self) -> None:
        """Writes the exit status and draws the picture; without matplotlib, notes why not."""
        self.values["exit_code"] = self.exit_code
        self._write()  # before drawing, which may fail
        try:
            draw(self.values, self._out / "gpu.png")
        except Exception as error:
            self.values["picture"] = (
                f"none: {type(error).__name__}: {error}; "
                "python3 -m valle.jobs.bench.gpu.report gpu.json draws it elsewhere"
            )
            self._write()

    @property
    def exit_code(self) -> int:
        """Exit status of the command, as `run.py` documents it."""
        return exit_code(self.values["phases_run"])

    def _write(self) -> None:
        part = self._out / "gpu.json.part"
        part.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(part, self._out / "gpu.json")

    def lines(self, phase: str) -> str:
        """The result of a phase for a terminal, failures last."""
        results, failures = phase_lines(phase, self.values["phases_run"][phase])
        return "\n".join([*results, *failures])

    def summary(self) -> str:
        """All failures and floors, and the exit status."""
        return "\n".join(_ending(self.values))


def exit_code(phases: dict[str, dict[str, Any]]) -> int:
    """EXIT_FAILED for a phase that did not finish, an error, a failed check or a required check
    that was skipped; else EXIT_MISSED for a floor missed or not measured; else 0."""
    for result in phases.values():
        checks = result.get("checks", [])
        skipped = any(entry["required"] for entry in result.get("skipped", []))
        if result["status"] != "done" or result["errors"] or skipped:
            return EXIT_FAILED
        if not all(check["passed"] for check in checks):
            return EXIT_FAILED
    floors = [floor for result in phases.values() for floor in result["floors"]]
    return 0 if all(floor["met"] for floor in floors) else EXIT_MISSED


def table(values: dict[str, Any]) -> str:
    """All phases as lines for a terminal, failures last."""
    phases = values["phases_run"].items()
    results = [line for phase, result in phases for line in phase_lines(phase, result)[0]]
    return "\n".join([*results, *_ending(values)])


def _ending(values: dict[str, Any]) -> list[str]:
    phases = values["phases_run"]
    failures = [line for phase, result in phases.items() for line in phase_lines(phase, result)[1]]
    return [*failures, f"exit status {exit_code(phases)}"]


def phase_lines(phase: str, result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Two lists of lines: figures and skipped entries; failures and floors."""
    checks = result.get("checks", [])
    passed = sum(check["passed"] for check in checks)
    results = [
        f"{phase}: {result['status']}, {passed} of {len(checks)} checks, "
        f"{result.get('wall_seconds', 0)} s"
    ]
    results += [f"  {_line(m)}" for m in result.get("measurements", [])]
    results += [f"  skipped: {o['name']}: {o['reason']}" for o in result.get("skipped", [])]
    failures = [f"FAILED {phase} {_line(check)}" for check in checks if not check["passed"]]
    failures += [
        f"NOT SHOWN {phase} {o['name']}: {o['reason']}"
        for o in result.get("skipped", [])
        if o["required"]
    ]
    for floor in result.get("floors", []):
        value = floor["reason"] if floor["value"] is None else _short(floor["value"])
        met = "met" if floor["met"] else "MISSED"
        failures.append(f"{met} {phase} {floor['name']}: {value}, floor {floor['floor']:g}")
    for error in result.get("errors", []):
        last = error["traceback"].strip().splitlines()[-1]
        failures.append(f"ERROR {phase} {error['name']}: {last}")
    if result["status"] not in ("done", "failed"):
        failures.append(f"{result['status'].upper()} {phase}: {result.get('reason', '')}")
    return results, failures


def _line(entry: dict[str, Any]) -> str:
    figures = [f"{k} {_short(v)}" for k, v in entry.items() if k not in ("name", "passed")]
    return f"{entry['name']}: {', '.join(figures)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load(path: Path) -> dict[str, Any]:
    """Reads a `gpu.json`, also one of the version with `card` for `limits` and `left_out` for
    `skipped`."""
    values: dict[str, Any] = json.loads(path.read_text())
    if "card" in values:
        values["limits"] = values.pop("card")
    for result in values["phases_run"].values():
        if "left_out" in result:
            result["skipped"] = result.pop("left_out")
    return values


def draw(values: dict[str, Any], path: Path) -> None:
    """Draws MFU of training steps, and decoding speed against the memory bound."""
    figure = new_figure(12, 7)
    training, decoding = figure.subplots(1, 2)
    steps = _measurements(values, "P3", "mfu")
    training.barh([m["name"] for m in steps], [100 * m["mfu"] for m in steps])
    training.set(xlabel="model-FLOPs utilisation, % of the bf16 matrix rate", title="training")
    speeds = _measurements(values, "P4", "frames_per_second")
    names = [m["name"] for m in speeds]
    decoding.barh(
        names, [m["limit_frames_per_second"] for m in speeds], color="0.85", label="bound"
    )
    decoding.barh(names, [m["frames_per_second"] for m in speeds], height=0.5, label="measured")
    decoding.set(xlabel="frames a second", title="decoding, against the memory bound")
    for axis in (training, decoding):
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    if speeds:
        decoding.set_xscale("log")
        decoding.legend()
    device = (values["limits"] or {}).get("name", "no device measured")
    figure.suptitle(f"{device}, models of size {values['size']}")
    figure.savefig(path)


def _measurements(values: dict[str, Any], phase: str, with_figure: str) -> list[dict[str, Any]]:
    measurements = values["phases_run"].get(phase, {}).get("measurements", [])
    return [m for m in measurements if m.get(with_figure) is not None]


def source_hash(root: Path) -> str:
    """SHA-256 over all Python files: identifies the code where there is no git."""
    digest = hashlib.sha256()
    for folder in ("jobs", "model", "platform", "serve"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture of a `gpu.json` beside it and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a gpu.json")
    path = parser.parse_args(argv).results
    values = load(path)
    draw(values, path.with_suffix(".png"))
    sys.stdout.write(table(values) + "\n")


if __name__ == "__main__":
    main()
