"""Requests to the engine, their state in it, and the outputs of its steps."""

from dataclasses import dataclass, field
from enum import StrEnum

from valle.model.codec.interface import Codes
from valle.model.sampling import Sampling, validate_seed
from valle.model.validation import validate_codes, validate_ids, validate_integer


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sentence to synthesize in one voice."""

    id: str
    """Unique among the requests in an engine."""

    phonemes: list[int]
    """Ids of the text; not empty."""

    prompt: Codes
    """`[8, P]`: codes of the voice's recording."""

    sampling: Sampling = field(default_factory=Sampling)
    """Sampling of the first codebook."""

    max_frames: int
    """Length limit of the speech."""

    seed: int = 0
    """Seed of sampling; the codes do not depend on the other requests of a batch."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError, naming the field, for values and types that no engine can run.

        An engine calls it again: a request from another process has not passed through
        `__init__` there.
        """
        if type(self.id) is not str or not self.id:
            raise ValueError(f"id: {type(self.id).__name__} is not a name; give each request one")
        validate_ids("phonemes", self.phonemes)
        if not self.phonemes:
            raise ValueError("phonemes: the text is empty; give at least one id")
        validate_codes("prompt", self.prompt)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling: {type(self.sampling).__name__} is not Sampling")
        self.sampling.validate()
        validate_integer("max_frames", self.max_frames, 1, 2**31 - 1)
        validate_seed(self.seed)


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """The model drew EOS."""

    LENGTH = "length"
    """The speech reached `max_frames`."""


@dataclass
class RequestState:
    """A request in the engine."""

    request: Request
    codes: list[int] = field(default_factory=list)
    """Frames of the first codebook so far."""
    slot: int | None = None
    """Its rows of the key-value cache; None before prefill is complete."""


@dataclass(frozen=True)
class StepOutput:
    """New frames of one request from one step of the engine."""

    request_id: str
    codes: list[int]
    """Of the first codebook; empty where the step drew EOS only."""
    finish_reason: FinishReason | None
    """Set in the request's last output."""
