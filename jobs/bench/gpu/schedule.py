"""Which phases there are, in which order, and how long each may take. Imports no torch: the command
that starts the phases needs none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

COMPILER_LOGS: Final = {"TORCH_LOGS": "recompiles,graph_breaks,cudagraphs"}
"""Why something was compiled again, in parts, or without CUDA graphs: into gpu.log."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the proof."""

    module: str
    """File in this folder whose `run` does it."""

    title: str

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its process needs."""


PHASES: Final[Mapping[str, Phase]] = {
    "P0": Phase(module="device", title="the card"),
    "P1": Phase(module="numerics", title="numerics: card = CPU, fast = slow"),
    "P3": Phase(module="training", title="training steps", environment=COMPILER_LOGS),
    "P4": Phase(module="decoding", title="decoding", environment=COMPILER_LOGS),
    "P2": Phase(
        module="parallel", title="DDP and ZeRO 1, 2, 3",
        # products that repeat to the bit
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **COMPILER_LOGS},
    ),
    "P5": Phase(module="codec", title="EnCodec"),
    "P6": Phase(module="nar", title="NAR, memory"),
}  # fmt: skip
"""In the order in which `all` runs them: what says most comes first."""

DEFAULT_PHASES: Final = ("P0", "P1", "P3", "P4")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Times of a run, in seconds."""

    total: float
    """All phases, start and end included."""

    seconds: Mapping[str, float]
    """Kept for each phase until its last measurement is begun; what the phases before it did not
    use is added."""

    def limit(self, phases: Sequence[str], phase: str, remaining: float) -> float:
        """What a phase may take when so much of the run is left: all but what the phases after it
        are to keep."""
        later = phases[phases.index(phase) + 1 :]
        return remaining - sum(self.seconds[name] for name in later)

    def scaled(self, factor: float) -> "Schedule":
        """All times longer by a factor."""
        seconds = {name: factor * value for name, value in self.seconds.items()}
        return Schedule(total=factor * self.total, seconds=seconds)


FIVE_MINUTES: Final = Schedule(total=285, seconds={"P0": 40, "P1": 45, "P3": 75, "P4": 125})
"""Of the default phases, or some of them; with the last one's grace, five minutes."""

NINE_MINUTES: Final = Schedule(
    total=525,
    seconds={"P0": 40, "P1": 45, "P3": 150, "P4": 150, "P2": 80, "P5": 30, "P6": 30},
)
"""Of any other choice; with the last one's grace, nine minutes."""

GRACE_SECONDS: Final = 15.0
"""Seconds that a phase may go on after its time, to end what it had begun; then it is killed."""

SIZES: Final = ("tiny", "mini", "quarter", "half", "full")


def schedule_for(phases: Sequence[str]) -> Schedule:
    """The times of a run of these phases."""
    return FIVE_MINUTES if set(phases) <= set(DEFAULT_PHASES) else NINE_MINUTES
