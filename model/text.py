"""Text to phoneme ids: normalisation, numbers in words, espeak phonemes, ids.

Only this module touches GPL-3 code (phonemizer, and the espeak library in `espeakng-loader`); the
rest of the project handles IPA strings and lists of ids.

A phoneme token is one Unicode code point of espeak's IPA: letters, length, stress, the space as
word boundary, and punctuation. One inventory serves all languages.
"""

import re
import threading
import unicodedata
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from phonemizer.backend import EspeakBackend

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

# phonemizer splits the text at punctuation before espeak reads it, so that espeak cannot recognise
# "Dr.": abbreviations with a full stop are expanded here
_ABBREVIATIONS: Final[dict[str, dict[str, str]]] = {
    "en": {
        "mr.": "mister", "mrs.": "missus", "ms.": "miss", "dr.": "doctor", "st.": "saint",
        "prof.": "professor", "jr.": "junior", "sr.": "senior", "vs.": "versus", "no.": "number",
        "etc.": "et cetera", "e.g.": "for example", "i.e.": "that is", "approx.": "approximately",
        "dept.": "department", "ave.": "avenue", "a.m.": "a m", "p.m.": "p m",
    },
    "fr": {
        "m.": "monsieur", "mme": "madame", "mlle": "mademoiselle", "dr.": "docteur",
        "etc.": "et cetera", "p.ex.": "par exemple", "st.": "saint",
    },
    "es": {
        "sr.": "señor", "sra.": "señora", "srta.": "señorita", "dr.": "doctor", "dra.": "doctora",
        "ud.": "usted", "uds.": "ustedes", "etc.": "etcétera", "p.ej.": "por ejemplo",
    },
    "de": {
        "dr.": "Doktor", "hr.": "Herr", "fr.": "Frau", "z.b.": "zum Beispiel", "d.h.": "das heißt",
        "usw.": "und so weiter", "bzw.": "beziehungsweise", "ca.": "zirka", "nr.": "Nummer",
    },
}  # fmt: skip

_SYMBOLS: Final[dict[str, dict[str, str]]] = {
    "en": {"&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "#": "number"},
    "fr": {"&": "et", "%": "pour cent", "+": "plus", "=": "égale", "@": "arobase"},
    "es": {"&": "y", "%": "por ciento", "+": "más", "=": "igual a", "@": "arroba"},
    "de": {"&": "und", "%": "Prozent", "+": "plus", "=": "gleich", "@": "at"},
}

_CURRENCIES: Final = {"$": "USD", "€": "EUR", "£": "GBP"}
_FOLDED: Final = str.maketrans("‘’‛`´“”„[]{}", "'''''\"\"\"()()")
_DECIMAL_COMMA: Final = frozenset({"fr", "es", "de", "it", "ru"})
_ORDINAL: Final = {"en": r"(\d+)(?:st|nd|rd|th)\b", "fr": r"(\d+)(?:er|re|e|ème)\b"}
_YEAR: Final = re.compile(r"(?<![\w,.$€£])(1[1-9]\d\d|20[1-9]\d)(?!\w|[,.:]\d)")


def normalize(text: str, language: str = "en-us") -> str:
    """Unicode NFKC; abbreviations, symbols and numbers in words; white space collapsed.

    `language` is an espeak voice name; the part before the hyphen selects the tables. Without
    tables, abbreviations stay and numbers are read by num2words or espeak.
    """
    base = language.split("-")[0]
    # NFKC would split an ellipsis into three full stops
    text = unicodedata.normalize("NFKC", text.replace("…", "\0")).replace("\0", "…")
    text = text.translate(_FOLDED)
    for short, words in _ABBREVIATIONS.get(base, {}).items():
        text = re.sub(rf"(?<!\w){re.escape(short)}(?!\w)", words, text, flags=re.IGNORECASE)
    text = _speak_numbers(text, base)
    for symbol, words in _SYMBOLS.get(base, {}).items():
        text = text.replace(symbol, f" {words} ")
    return re.sub(r"\s+", " ", text).strip()


def _speak_numbers(text: str, base: str) -> str:
    """Times, money, ordinals, years and plain numbers in words, by num2words."""
    from num2words import CONVERTER_CLASSES, num2words

    if base not in CONVERTER_CLASSES or not any(c.isdigit() for c in text):
        return text

    def in_words(value: str, kind: str = "cardinal", currency: str = "USD") -> str:
        number = float(value) if "." in value else int(value)
        if kind == "currency":
            return str(num2words(float(number), lang=base, to=kind, currency=currency))
        return str(num2words(number, lang=base, to=kind))

    if base == "en":  # before thousands separators are removed: "1,984" is no year
        text = _YEAR.sub(lambda m: in_words(m[1], "year"), text)
    # "10:30" as two numbers; "1,000,000" (or "1.000.000") as one; decimals with a point inside
    text = re.sub(r"(\d)[:h](\d\d)\b", r"\1 \2", text)
    thousands, decimal = (r"\.", ",") if base in _DECIMAL_COMMA else (",", r"\.")
    text = re.sub(rf"(?<=\d){thousands}(?=\d\d\d\b)", "", text)
    text = re.sub(rf"(?<=\d){decimal}(?=\d)", ".", text)
    # more than 15 digits are an identifier, read digit by digit
    text = re.sub(r"\d{16,}", lambda m: " ".join(m[0]), text)
    number = r"\d+(?:\.\d+)?"
    for sign, code in _CURRENCIES.items():
        amount = rf"{re.escape(sign)}\s?({number})|({number})\s?{re.escape(sign)}"

        def money(match: re.Match[str], currency: str = code) -> str:
            return in_words(match[1] or match[2], "currency", currency)

        text = re.sub(amount, money, text)
    if base in _ORDINAL:
        text = re.sub(_ORDINAL[base], lambda m: in_words(m[1], "ordinal"), text)
    return re.sub(number, lambda m: in_words(m[0]), text)


@lru_cache(maxsize=1)
def languages() -> frozenset[str]:
    """Names of espeak's voices. Cached, since each query copies the shared library."""
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    return frozenset(EspeakBackend.supported_languages())


@lru_cache(maxsize=16)
def _backend(language: str) -> "EspeakBackend":
    """The espeak backend of a language. Cached, since each backend copies the shared library.

    Raises ValueError for a language that espeak lacks.
    """
    if language not in languages():
        raise ValueError(f"language: espeak has no voice named {language!r} (try en-us, fr-fr, es)")
    from phonemizer.backend import EspeakBackend

    return EspeakBackend(
        language, preserve_punctuation=True, with_stress=True, language_switch="remove-flags"
    )


_ESPEAK = threading.Lock()
"""espeak returns results in static memory: a process may make one call at a time."""


def phonemize(texts: Sequence[str], language: str = "en-us") -> list[str]:
    """IPA of each text, with stress marks, word boundaries and punctuation.

    Raises ValueError for a language that espeak lacks.
    """
    clean = [normalize(text, language) for text in texts]
    # phonemizer drops empty lines, which would shift the rest
    lines = [text or " " for text in clean]
    with _ESPEAK:
        phonemes = _backend(language).phonemize(lines, strip=True)
    return [
        re.sub(r"\s+", " ", p).strip() if text else ""
        for p, text in zip(phonemes, clean, strict=True)
    ]


def encode(phonemes: str) -> list[int]:
    """Ids of an IPA string. Symbols outside the inventory become `UNK`, with a warning."""
    unknown = sorted({symbol for symbol in phonemes if symbol not in _IDS})
    if unknown:
        names = ", ".join(f"{s!r} (U+{ord(s):04X})" for s in unknown)
        warnings.warn(f"not in the phoneme inventory, read as <unk>: {names}", stacklevel=2)
    return [_IDS.get(symbol, UNK) for symbol in phonemes]


def phoneme_ids(text: str, language: str) -> list[int]:
    """Phoneme ids of a text. Raises ValueError if nothing in it can be pronounced."""
    phonemes = phonemize([text], language)[0]
    if not any(symbol.isalpha() for symbol in phonemes):
        raise ValueError("text: nothing to say in it")
    return encode(phonemes)


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
