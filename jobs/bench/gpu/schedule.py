"""The phases, their order and their time limits.

Imports no torch: the command that starts the phases needs none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

COMPILER_LOGS: Final = {"TORCH_LOGS": "recompiles,graph_breaks,cudagraphs"}
"""Makes torch log the reasons of recompilations, graph breaks and missing CUDA graphs."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A group of checks and measurements that runs in one process."""

    module: str
    """Module of this package whose `run` it calls."""

    title: str

    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its process."""


PHASES: Final[Mapping[str, Phase]] = {
    "P0": Phase(module="device", title="the device"),
    "P1": Phase(module="numerics", title="numerics: device = CPU, fast = slow"),
    "P3": Phase(module="training", title="training steps", environment=COMPILER_LOGS),
    "P4": Phase(module="decoding", title="decoding", environment=COMPILER_LOGS),
    "P2": Phase(
        module="parallel", title="DDP and ZeRO 1, 2, 3",
        # matrix products that repeat to the last bit
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **COMPILER_LOGS},
    ),
    "P5": Phase(module="codec", title="EnCodec"),
    "P6": Phase(module="nar", title="NAR, memory"),
}  # fmt: skip
"""In the order in which `all` runs them: the most informative first."""

DEFAULT_PHASES: Final = ("P0", "P1", "P3", "P4")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Time limits of a run, in seconds."""

    total: float
    """Limit of the whole run."""

    seconds: Mapping[str, float]
    """Seconds reserved for each phase; it also gets what the phases before it have not used."""

    def limit(self, phases: Sequence[str], phase: str, remaining: float) -> float:
        """Limit of a phase when `remaining` seconds of the run are left: all but the seconds
        reserved for the phases after it."""
        later = phases[phases.index(phase) + 1 :]
        return remaining - sum(self.seconds[name] for name in later)

    def scaled(self, factor: float) -> "Schedule":
        """All limits times a factor."""
        seconds = {name: factor * value for name, value in self.seconds.items()}
        return Schedule(total=factor * self.total, seconds=seconds)


FIVE_MINUTES: Final = Schedule(total=285, seconds={"P0": 40, "P1": 45, "P3": 75, "P4": 125})
"""For the default phases or some of them: five minutes with the grace of the last phase."""

NINE_MINUTES: Final = Schedule(
    total=525,
    seconds={"P0": 40, "P1": 45, "P3": 150, "P4": 150, "P2": 80, "P5": 30, "P6": 30},
)
"""For any other phases: nine minutes with the grace of the last phase."""

GRACE_SECONDS: Final = 15.0
"""Seconds past its limit in which a phase may end its current measurement before it is killed."""

SIZES: Final = ("tiny", "mini", "quarter", "half", "full")


def schedule_for(phases: Sequence[str]) -> Schedule:
    """The time limits of a run of these phases."""
    return FIVE_MINUTES if set(phases) <= set(DEFAULT_PHASES) else NINE_MINUTES
