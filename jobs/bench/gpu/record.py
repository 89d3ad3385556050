"""The result of a phase, written to a file after every entry: a killed phase loses nothing.

A check passes or fails and decides the exit status of the run. A floor is a figure with a lower
bound, which counts as missed until it is measured. A measurement is a set of figures. A skipped
entry has a reason.
"""

import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from valle.jobs.bench.gpu.device import DeviceLimits
from valle.model.config import ModelConfig

TINY = ModelConfig(width=16, n_heads=2, n_layers=2, dropout=0.0)
"""Size of the golden models and of `--quick`."""


class Record:
    """The result of one phase, in JSON at `path`, complete after every addition."""

    def __init__(self, path: Path, deadline: float) -> None:
        """`deadline`: Unix time after which no attempt is started."""
        self._path, self._deadline, self._started = path, deadline, time.time()
        self.status = "running"
        self.checks: list[dict[str, Any]] = []
        self.floors: list[dict[str, Any]] = []
        self.measurements: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.errors: list[dict[str, str]] = []
        self.limits: dict[str, Any] | None = None
        self.write()

    def check(self, name: str, passed: bool, /, **figures: Any) -> None:
        """Records a check, with the figures behind it."""
        assert not {"name", "passed"} & set(figures), "a figure would replace the check's own"
        self.checks.append({"name": name, "passed": bool(passed), **_plain(figures)})
        self.write()

    def expect_floor(self, name: str, at_least: float) -> None:
        """Announces a floor; it counts as missed until `floor` records its value, so that a run
        that ends early does not pass."""
        entry = {"name": name, "value": None, "floor": at_least, "met": False}
        self.floors.append({**_plain(entry), "reason": "not measured"})
        self.write()

    def floor(self, name: str, value: float) -> None:
        """Records the value of an announced floor."""
        (entry,) = (floor for floor in self.floors if floor["name"] == name)
        del entry["reason"]
        entry |= _plain({"value": value, "met": value >= entry["floor"]})
        self.write()

    def measurement(self, name: str, /, **figures: Any) -> None:
        """Records figures without a bound."""
        assert "name" not in figures, "a figure would replace the measurement's own name"
        self.measurements.append({"name": name, **_plain(figures)})
        self.write()

    def skip(self, name: str, reason: str, required: bool = False) -> None:
        """Records that something was not measured, and why; `required`: the run then fails."""
        self.skipped.append({"name": name, "reason": reason, "required": required})
        self.write()

    def error(self, name: str) -> None:
        """Records the exception that is being handled."""
        self.errors.append({"name": name, "traceback": traceback.format_exc()})
        self.write()

    def attempt(
        self, name: str, work: Callable[[], object], seconds: float = 0.0, *, required: bool = False
    ) -> bool:
        """Calls `work` if at least `seconds` are left; returns True when it returned.

        An exception is recorded and not raised, so that the next attempt still runs; running out
        of device memory counts as skipped.
        """
        remaining = self._deadline - time.time()
        if remaining < seconds or remaining <= 0:
            reason = f"no time: {max(0.0, remaining):.0f} s left, {seconds:.0f} needed"
            self.skip(name, reason, required)
            return False
        try:
            work()
            return True
        except torch.OutOfMemoryError as error:
            self.skip(name, f"out of memory: {str(error).splitlines()[0]}", required)
        except Exception:
            self.error(name)
        finally:  # the next attempt gets all of the device's memory
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return False

    def write(self) -> None:
        """Replaces the file atomically."""
        values = {
            "status": self.status,
            "seconds": round(time.time() - self._started, 2),
            "checks": self.checks,
            "floors": self.floors,
            "measurements": self.measurements,
            "skipped": self.skipped,
            "errors": self.errors,
        }
        if self.limits is not None:
            values["limits"] = self.limits
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(values))
        os.replace(part, self._path)


@dataclass(frozen=True, kw_only=True)
class PhaseContext:
    """Inputs of every phase."""

    device: torch.device
    """`cuda` or `cpu`."""

    config: ModelConfig
    """Of the models whose speed is measured."""

    quick: bool
    """Tiny shapes and few repetitions: tests the code, measures nothing."""

    record: Record

    scratch: Path
    """Folder for temporary files, removed at the end of the run."""

    limits: DeviceLimits
    """Denominators of all utilisations and shares of a bound."""

    @property
    def on_gpu(self) -> bool:
        """True on a CUDA device."""
        return self.device.type == "cuda"


def _plain(value: Any) -> Any:
    """A JSON value with floats of six digits; NaN and infinities, which JSON lacks, become text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
