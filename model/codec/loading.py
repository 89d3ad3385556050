"""Loads a codec by name or path."""

import json
from pathlib import Path

from valle.model.codec import encodec, nano2
from valle.model.codec.interface import SpeechCodec
from valle.model.codec.nano2 import Nano2Codec

CODEC_NAMES = ("nano", "nano2", "encodec-24khz")
"""Names of the shipped codecs and the official one; anything else is a path."""


def load_codec(source: str, *, device: str = "cpu", cache: Path | None = None) -> SpeechCodec:
    """The codec `source`: `nano2`, the folder of a codec of its kind, or a source of
    `encodec.load`.

    Raises ValueError or FileNotFoundError with the remedy.
    """
    if source == "nano2":
        return Nano2Codec.load(nano2.NANO2_CODEC_FOLDER, device)
    # a folder called `nano` in the current folder is not the codec of that name
    config_file = Path(source) / "config.json"
    is_path = source not in CODEC_NAMES
    if is_path and config_file.is_file() and "frame_rate" in _fields(config_file):
        return Nano2Codec.load(Path(source), device)
    return encodec.load(source, device=device, cache=cache)


def _fields(config_file: Path) -> set[str]:
    return set(json.loads(config_file.read_text()))
