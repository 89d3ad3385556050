"""What a phase shows, written to a file as it is measured: a phase that is killed loses nothing.

Checks are true or false and decide about the run; floors are figures with a bound that a first run
may miss, and missed until measured; measurements are figures; what was left out says why.
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
"""Size of the golden models, and of what runs quick."""


class Record:
    """The result of one phase, in JSON at `path`, complete after every addition."""

    def __init__(self, path: Path, deadline: float) -> None:
        """`deadline`: Unix time after which no measurement is begun."""
        self._path, self._deadline, self._started = path, deadline, time.time()
        self.status = "running"
        self.checks: list[dict[str, Any]] = []
        self.floors: list[dict[str, Any]] = []
        self.measurements: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.errors: list[dict[str, str]] = []
        self.limits: dict[str, Any] | None = None
        self.write()

    def check(self, name: str, passed: bool, **figures: Any) -> None:
        """A statement that must hold, with the figures that show it."""
        self.checks.append({"name": name, "passed": bool(passed), **_plain(figures)})
        self.write()

    def expect_floor(self, name: str, at_least: float) -> None:
        """Announces a figure with a lower bound, which counts as missed until `floor` is told it:
        a run that ends before has not shown it."""
        entry = {"name": name, "value": None, "floor": at_least, "met": False}
        self.floors.append({**_plain(entry), "reason": "not measured"})
        self.write()

    def floor(self, name: str, value: float) -> None:
        """The figure of a floor that is expected."""
        (entry,) = (floor for floor in self.floors if floor["name"] == name)
        del entry["reason"]
        entry |= _plain({"value": value, "met": value >= entry["floor"]})
        self.write()

    def measurement(self, name: str, **figures: Any) -> None:
        """Figures without a bound."""
        self.measurements.append({"name": name, **_plain(figures)})
        self.write()

    def skip(self, name: str, reason: str, required: bool = False) -> None:
        """Something that was not measured, and why; what is `required` must not be missing."""
        self.skipped.append({"name": name, "reason": reason, "required": required})
        self.write()

    def error(self, name: str) -> None:
        """The exception being handled, which ended `name`."""
        self.errors.append({"name": name, "traceback": traceback.format_exc()})
        self.write()

    def attempt(
        self, name: str, work: Callable[[], object], seconds: float = 0.0, *, required: bool = False
    ) -> bool:
        """Does `work` unless less than `seconds` are left; True when it went through.

        An exception is recorded and goes no further, so that what comes next is still measured;
        too little memory on the card counts as left out.
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
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return False

    def write(self) -> None:
        """Replaces the file, atomically."""
        values = {
            "status": self.status, "seconds": round(time.time() - self._started, 2),
            "checks": self.checks, "floors": self.floors, "measurements": self.measurements,
            "skipped": self.skipped, "errors": self.errors,
        }  # fmt: skip
        if self.limits is not None:
            values["limits"] = self.limits
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(values))
        os.replace(part, self._path)


@dataclass(frozen=True, kw_only=True)
class PhaseContext:
    """What every phase is given."""

    device: torch.device
    """`cuda` or `cpu`."""

    config: ModelConfig
    """Size of the models whose speed is measured."""

    quick: bool
    """Tiny shapes and few repetitions: shows that the code runs, measures nothing."""

    record: Record

    scratch: Path
    """A folder for files, removed at the end of the run."""

    limits: DeviceLimits
    """The constants that shares refer to."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"


def _plain(value: Any) -> Any:
    """The same with floats of six digits; what is not finite as text, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
