"""Packs two checkpoints and their codec as a bundle, if they belong together."""

import logging
import shutil
from functools import lru_cache
from pathlib import Path

from valle.model.codec import encodec
from valle.model.normalize import TEXT_VERSION
from valle.platform import checkpoint, settings
from valle.platform.bundle import Bundle, read_bundle, write_bundle

logger = logging.getLogger(__name__)


def pack(ar: str, nar: str, codec: str, folder: Path) -> Bundle:
    """Copies two checkpoints and a codec into `folder`.

    Raises ValueError for checkpoints of the wrong kind or of another codec. `bundle.json` lists the
    files so far; `bundle.write_bundle` lists those that are added.
    """
    checkpoint.fetch(ar, folder / "ar")
    checkpoint.fetch(nar, folder / "nar")
    identity = encodec.load(codec, cache=settings.read().cache).identity
    text_versions, languages = [], []
    for part, kind in (("ar", "ar"), ("nar", "nar")):
        metadata = checkpoint.read_metadata(folder / part)
        if metadata.kind != kind:
            raise ValueError(f"{part}: the checkpoint holds a model of kind {metadata.kind!r}")
        identity.check(metadata.codec, f"the {part.upper()} checkpoint")
        text_versions.append(metadata.text_version or 1)
        languages.append(metadata.languages)
    official = codec == "encodec-24khz"
    if not official:
        source = encodec.NANO_CODEC_FOLDER if codec == "nano" else Path(codec)
        (folder / "codec").mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(source / name, folder / "codec" / name)
    if text_versions[0] != text_versions[1]:
        raise ValueError(
            f"the AR checkpoint learnt text version {text_versions[0]}, the NAR checkpoint "
            f"{text_versions[1]}; train both on one dataset"
        )
    warn_of_text_version(f"the model of {ar} and {nar}", text_versions[0])
    bundle = Bundle(
        codec=identity,
        official_codec=official,
        ar=ar,
        nar=nar,
        text_version=text_versions[0],
        languages=tuple(name for name in languages[0] if name in languages[1]),
    )
    write_bundle(folder, bundle)
    return read_bundle(folder)


@lru_cache(maxsize=64)
def warn_of_text_version(name: str, version: int) -> None:
    """Logs, once in a process, that a model was trained on another text version."""
    if version != TEXT_VERSION:
        logger.warning(
            "%s was trained with text version %d, this code reads text as version %d: numbers and "
            "abbreviations may sound otherwise than it learnt them (docs/data.md)",
            name, version, TEXT_VERSION,
        )  # fmt: skip
