"""Text to phoneme ids: the spoken form of a text, espeak's phonemes of it, their ids.

A phoneme token is one Unicode code point of espeak's IPA: letters, length, stress, the space as
word boundary, and punctuation. One inventory serves all languages.
"""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Final

from valle.model.espeak import phonemize_spoken
from valle.model.languages import espeak_voice
from valle.model.normalize import normalize

PAD: Final = 0
"""Padding, which carries no loss; also each phoneme of an unconditional row."""
UNK: Final = 1
"""Any symbol outside the inventory."""

_PUNCTUATION = " .,?!;:-…()\"'¿¡«»—"
_MARKS = "ˈˌːˑ\u0303\u0329\u032f\u0361ʲʰʷˠˤ\u0325\u032a\u0306\u030a\u0308\u031d\u031e\u0320"
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_IPA = "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃᵻᵊ"

INVENTORY: Final[tuple[str, ...]] = ("<pad>", "<unk>", *_PUNCTUATION, *_MARKS, *_LATIN, *_IPA)
"""Symbol by id. Append only: datasets and checkpoints contain the ids."""

_IDS: Final = {symbol: index for index, symbol in enumerate(INVENTORY)}
_TONES: Final = frozenset("0123456789")
"""espeak's tones of Mandarin, Cantonese, Hakka, Vietnamese, Thai, Shan and Cherokee."""
_REPLACED: Final = {
    "ε": "ɛ", "ʦ": "ts", "ᵝ": "β", "S": "ʃ", "Z": "ʒ", "N": "ŋ", "X": "χ", "A": "ɑ",
}  # fmt: skip
"""Symbols of a few of espeak's voices, in those of the inventory."""


def phonemize(texts: Sequence[str], language: str = "en-us") -> list[str]:
    """IPA of each text, with stress marks, word boundaries and punctuation.

    `language` is a BCP 47 tag or an espeak voice. Raises ValueError for a language that espeak
    lacks and for a script that its voice cannot read.
    """
    voice = espeak_voice(language)
    spoken = [normalize(text, voice) for text in texts]
    return [clean_phonemes(line) for line in phonemize_spoken(spoken, voice)]


def clean_phonemes(phonemes: str) -> str:
    """espeak's IPA in symbols of the inventory. Tones stay, which are digits: `check_tones`."""
    symbols = []
    for symbol in phonemes:
        if symbol in _IDS or symbol in _TONES:
            symbols.append(symbol)
        elif symbol in _REPLACED:
            symbols.append(_REPLACED[symbol])
        else:  # "ä" is a letter and a mark; what is left over then has no sound
            symbols += [part for part in unicodedata.normalize("NFD", symbol) if part in _IDS]
    return re.sub(r"\s+", " ", "".join(symbols)).strip()


def check_tones(phonemes: str, voice: str) -> None:
    """Raises ValueError for tones: the inventory has none, and without them words change."""
    if any(symbol in _TONES for symbol in phonemes):
        raise ValueError(
            f"language: {voice} has tones, which the phoneme inventory lacks; it cannot be spoken"
        )


def encode(phonemes: str) -> list[int]:
    """Ids of an IPA string. Symbols outside the inventory become `UNK`, with a warning."""
    unknown = sorted({symbol for symbol in phonemes if symbol not in _IDS})
    if unknown:
        names = ", ".join(f"{s!r} (U+{ord(s):04X})" for s in unknown)
        warnings.warn(f"not in the phoneme inventory, read as <unk>: {names}", stacklevel=2)
    return [_IDS.get(symbol, UNK) for symbol in phonemes]


def spoken_ids(texts: Sequence[str], voice: str) -> list[list[int]]:
    """Phoneme ids of texts in spoken form; an empty list for one without a sound.

    Raises ValueError for a language with tones.
    """
    ids = []
    for line in phonemize_spoken(texts, voice):
        phonemes = clean_phonemes(line)
        check_tones(phonemes, voice)
        audible = any(symbol.isalpha() for symbol in phonemes)
        ids.append(encode(phonemes) if audible else [])
    return ids


def phoneme_ids(text: str, language: str) -> list[int]:
    """Phoneme ids of a text.

    Raises ValueError if nothing in it can be pronounced, for a language that espeak lacks, for a
    script that its voice cannot read, and for a language with tones.
    """
    voice = espeak_voice(language)
    (ids,) = spoken_ids([normalize(text, voice)], voice)
    if not ids:
        raise ValueError("text: nothing to say in it")
    return ids


def inventory_matches(symbols: Sequence[str]) -> bool:
    """True if `symbols`, an inventory stored with data or weights, gives every id its present
    meaning. An older, shorter inventory does: symbols are only ever appended."""
    return list(symbols) == list(INVENTORY[: len(symbols)])


def decode(ids: Sequence[int]) -> str:
    """The IPA string of ids; `UNK` becomes the Unicode replacement character."""
    return "".join("\ufffd" if i == UNK else INVENTORY[i] for i in ids if i != PAD)


def read_phn(content: str) -> str:
    """IPA of a `.phn.txt` file of the reference system: symbols separated by one space, a word
    boundary being an empty symbol.

    The file attaches stress and length marks to the symbol before them; as a string of code points
    that is the same text.
    """
    symbols = content.strip("\n").split(" ")
    return "".join(symbol or " " for symbol in symbols)
