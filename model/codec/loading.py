"""Loads a codec by name or path."""

import json
from pathlib import Path

from valle.model.codec import encodec, nano2
from valle.model.codec.interface import SpeechCodec
from valle.model.codec.nano2 import Nano2Codec


def load_codec(source: str, *, device: str = "cpu", cache: Path | None = None) -> SpeechCodec:
    """The codec `source`: `nano2`, the folder of a codec of its kind, or a source of
    `encodec.load`.

    Raises ValueError or FileNotFoundError with the remedy.
    """
    folder = nano2.NANO2_CODEC_FOLDER if source == "nano2" else Path(source)
    config_file = folder / "config.json"
    if source == "nano2" or (config_file.is_file() and "frame_rate" in _fields(config_file)):
        return Nano2Codec.load(folder, device)
    return encodec.load(source, device=device, cache=cache)


def _fields(config_file: Path) -> set[str]:
    return set(json.loads(config_file.read_text()))
