"""Recordings of people: the telephone prompts of Debian's asterisk packages."""

import gzip
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from valle.model.codec.interface import Wave
from valle.platform import audio


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One transcribed prompt of Debian's asterisk sounds."""

    path: Path
    text: str


_ASTERISK = Path("/usr/share/asterisk/sounds")
_ASTERISK_FOLDERS = {
    "en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU",
}  # fmt: skip


def _transcripts(base: str) -> Path:
    return Path(f"/usr/share/doc/asterisk-core-sounds-{base}/core-sounds-{base}.txt.gz")


@cache
def asterisk_recordings(language: str) -> dict[str, Recording]:
    """Transcribed recordings of a language, by name; empty when its packages are not installed.

    The recordings are in Debian's `asterisk-core-sounds-XX-g722`, the transcripts in its base
    package. Prompts without words, and those with brackets (noises, pauses), are left out.
    """
    base = language.split("-")[0]
    listing = _transcripts(base)
    folder = _ASTERISK / _ASTERISK_FOLDERS.get(base, "none")
    if not listing.exists() or not folder.exists():
        return {}
    recordings = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8-sig").splitlines():
        name, separator, text = line.partition(":")
        path = folder / f"{name.strip()}.g722"
        text = text.strip()
        is_speech = separator and re.search(r"\w", text) and not re.search(r"[\[\]()]", text)
        if is_speech and not name.startswith((";", "silence/")) and path.exists():
            recordings[name.strip().replace("/", "-")] = Recording(path=path, text=text)
    return recordings


class Asterisk:
    """Recordings as a TTS engine: telephone prompts in five languages, 16 kHz G.722."""

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """The recording named `voice`; `text`, its transcript, is not read."""
        import av

        path = asterisk_recordings(language)[voice].path
        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
            rate = container.streams.audio[0].rate
        wave = np.concatenate(frames).astype(np.float32) / np.float32(32768)
        return audio.trim(audio.resample(wave, rate))
