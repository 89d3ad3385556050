"""What the engine is asked, what it knows of a request while it speaks, and what it answers."""

from dataclasses import dataclass, field
from enum import StrEnum

from valle.model.codec.interface import Codes
from valle.model.sampling import Sampling, validate_seed


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to speak in one voice."""

    id: str
    """Unique among the requests of an engine."""

    phonemes: list[int]
    """Ids of the text."""

    prompt: Codes
    """`[8, P]` of the voice's recording."""

    sampling: Sampling = field(default_factory=Sampling)
    """How the first codebook is drawn."""

    max_frames: int
    """Length limit of the answer."""

    seed: int = 0
    """Same seed, same codes, whoever speaks beside it."""

    priority: float = 0.0
    """Seconds of waiting that this request is ahead of others: who waits that much longer is
    served before it, so nobody starves."""

    def __post_init__(self) -> None:
        if not self.phonemes:
            raise ValueError("phonemes: the text is empty")
        if self.max_frames < 1:
            raise ValueError(f"max_frames: {self.max_frames} is below 1")
        validate_seed(self.seed)


class FinishReason(StrEnum):
    """Why a stream ended."""

    STOP = "stop"
    """The model said so (EOS)."""

    LENGTH = "length"
    """It reached `max_frames`."""


@dataclass
class RequestState:
    """A request and how far it has come."""

    request: Request
    codes: list[int] = field(default_factory=list)
    """Frames of the first codebook so far."""
    slot: int | None = None
    """Where its keys and values are; None while it waits."""


@dataclass(frozen=True)
class StepOutput:
    """What one step of the engine brought one stream."""

    request_id: str
    codes: list[int]
    """New frames of the first codebook; empty where all that came was its end."""
    finish_reason: FinishReason | None
    """Set in the last output of a stream."""
