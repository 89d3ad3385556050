"""What every codec can do: recordings to codes and back, in batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from valle.model import codec as encodec
from valle.model.codec import CodecIdentity, Codes, Wave
from valle.model.codecs import nano2
from valle.model.codecs.nano2 import Nano2


@runtime_checkable
class SpeechCodec(Protocol):
    """A trained codec on a device. Batched equals one by one."""

    identity: CodecIdentity
    device: torch.device

    def encode(self, waves: Sequence[Wave], batch_seconds: float = ...) -> list[Codes]:
        """Codes `[Q, T]` of each 24 kHz waveform `[samples]`, in the order given."""

    def decode(self, codes: Sequence[Codes], batch_seconds: float = ...) -> list[Wave]:
        """24 kHz waveforms of each `[Q, T]`, in the order given; ValueError for bad codes."""

    def check(self, codes: Codes, name: str = ...) -> None:
        """Raises ValueError for codes of a wrong shape or beyond the codebooks' entries."""


def load_codec(source: str, *, device: str = "cpu", cache: Path | None = None) -> SpeechCodec:
    """The codec named by `source`: nano2, or a folder of its kind, or what EnCodec's `load` takes.

    Raises ValueError or FileNotFoundError with what to do.
    """
    folder = nano2.FOLDER if source == "nano2" else Path(source)
    described = folder / "config.json"
    if source == "nano2" or (described.is_file() and "frame_rate" in _fields(described)):
        return Nano2.load(folder, device)
    return encodec.load(source, device=device, cache=cache)


def _fields(described: Path) -> set[str]:
    return set(json.loads(described.read_text()))
