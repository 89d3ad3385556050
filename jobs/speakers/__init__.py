"""TTS engines from installable packages, for `jobs/corpus.py`.

A TTS engine turns text into a wave (24 kHz mono) in a named voice. It loads its model when it is
constructed, once per Ray actor.
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
    """Turns text into a wave in a named voice."""

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """Wave of `text` in `voice`; `language` is an espeak voice name."""


TTS_ENGINES: dict[str, type[TTSEngine]] = {
    "kokoro": Kokoro,
    "heart": Heart,
    "joe": Joe,
    "espeak": Espeak,
    "asterisk": Asterisk,
}
