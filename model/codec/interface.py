"""The codec protocol: batches of waveforms to codes and back, and the identity of a codec."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from valle.model.tokens import FRAME_RATE, N_CODEBOOKS, SAMPLE_RATE

Codes = NDArray[np.int16]
"""`[Q, T]`: entries of Q codebooks for T frames."""

Wave = NDArray[np.float32]
"""`[samples]`: mono, -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class CodecIdentity:
    """Identity of the codec that made a set of codes; two codecs are the same if all fields are
    equal."""

    name: str
    sha256: str
    """SHA-256 over names and values of the weights."""
    n_codebooks: int = N_CODEBOOKS
    frame_rate: int = FRAME_RATE
    sample_rate: int = SAMPLE_RATE

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return self.sample_rate // self.frame_rate

    def frames(self, seconds: float) -> int:
        """Whole frames in `seconds`."""
        return int(seconds * self.frame_rate)

    def check(self, other: "CodecIdentity", what: str) -> None:
        """Raises ValueError unless `other`, the codec of the artifact `what`, is this one."""
        if self != other:
            raise ValueError(
                f"codec mismatch: {what} was made with {other.name} ({other.sha256[:12]}), but the "
                f"codec in use is {self.name} ({self.sha256[:12]}); codes would decode to noise"
            )


@runtime_checkable
class SpeechCodec(Protocol):
    """A trained codec on a device. An item's result does not depend on its batch."""

    identity: CodecIdentity
    device: torch.device

    def encode(self, waves: Sequence[Wave], batch_seconds: float = ...) -> list[Codes]:
        """Codes `[Q, T]` of each 24 kHz waveform `[samples]`, in input order."""

    def decode(self, codes: Sequence[Codes], batch_seconds: float = ...) -> list[Wave]:
        """24 kHz waveforms of each `[Q, T]`, in input order. Raises ValueError as `check` does."""

    def check(self, codes: Codes, name: str = ...) -> None:
        """Raises ValueError for codes of a wrong shape or outside the codebooks."""
