"""Where a codec is loaded by name."""

import json
from pathlib import Path

from valle.model.codec import encodec, nano2
from valle.model.codec.interface import SpeechCodec
from valle.model.codec.nano2 import Nano2


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
