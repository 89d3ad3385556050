"""Which phases there are and how long each may take. Imports no torch: the command that starts the
phases needs none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the proof."""

    module: str
    """File in this folder whose `run` does it."""

    title: str

    seconds: float
    """Until its last measurement is begun."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its process needs."""


PHASES: Final[Mapping[str, Phase]] = {
    "P0": Phase(module="card", title="the card", seconds=15),
    "P1": Phase(module="truth", title="truth: card = CPU, fast = slow", seconds=50),
    "P2": Phase(
        module="parallel", title="DDP and ZeRO 1, 2, 3", seconds=90,
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # products that repeat to the bit
    ),
    "P3": Phase(module="training", title="training steps", seconds=105),
    "P4": Phase(module="decoding", title="decoding", seconds=115),
    "P5": Phase(module="codec", title="EnCodec", seconds=40),
    "P6": Phase(module="filling", title="NAR, memory", seconds=40),
}  # fmt: skip

DEFAULT: Final = ("P0", "P1", "P3", "P4")
DEFAULT_SECONDS: Final = 285.0
"""All of the default phases, start and end included; with the last one's grace, five minutes."""

ALL_SECONDS: Final = 525.0
"""All of any choice of phases; with the last one's grace, nine minutes."""

GRACE: Final = 15.0
"""Seconds that a phase may go on after its time, to end what it had begun; then it is killed."""

SIZES: Final = ("tiny", "nano", "quarter", "half", "full")
