"""Speech from installable packages: the engines behind `jobs/corpus.py`.

Each engine says text in a named voice and returns 24 kHz mono samples. Engines load their
model when built, so that one lives in each Ray actor.
"""

from typing import Protocol

from valle.jobs.speakers.asterisk import Asterisk
from valle.jobs.speakers.espeak import Espeak
from valle.jobs.speakers.kokoro import Heart, Kokoro
from valle.jobs.speakers.piper import Joe
from valle.model.codec.interface import Wave

__all__ = ["LICENSES", "TTS_ENGINES", "Asterisk", "Espeak", "Heart", "Joe", "Kokoro", "TTSEngine"]

LICENSES = {
    "kokoro": "Kokoro-82M by hexgrad, int8 export by thewh1teagle: Apache-2.0 / MIT",
    "heart": "hibari by Maureese Williams, distilled from Kokoro-82M's voice heart: Apache-2.0",
    "joe": "Piper voice en_US-joe-medium: CC0 (fine-tuned from the lessac voice)",
    "espeak": "espeak-ng synthetic speech (program GPL-3, output unrestricted)",
    "asterisk-en": "Allison Smith, Digium: CC-BY-SA-3.0",
    "asterisk-es": "Allison Smith, Digium: CC-BY-SA-3.0",
    "asterisk-fr": "June Wallack, Digium: CC-BY-SA-3.0",
    "asterisk-it": "Carlo Flora: CC-BY-3.0",
    "asterisk-ru": "Maxim Topal (ivrvoice.ru): CC-BY-3.0",
}


class TTSEngine(Protocol):
    """Something that speaks."""

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """`text` in `voice` as 24 kHz samples."""


TTS_ENGINES: dict[str, type[TTSEngine]] = {
    "kokoro": Kokoro, "heart": Heart, "joe": Joe, "espeak": Espeak, "asterisk": Asterisk,
}  # fmt: skip
