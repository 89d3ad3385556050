"""Written text to spoken form, by the same steps in training, batch jobs and the endpoint.

    written text → lines without markup → sentences → spoken form of each

English gets its spoken form from `english`. In other languages abbreviations and symbols become
words, and digits stay: espeak reads them in each of its languages.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from valle.model.english import spoken_english
from valle.model.espeak import phonemize_spoken
from valle.model.languages import check_script, espeak_voice
from valle.model.markup import plain_lines

TEXT_VERSION: Final = 2
"""Version of the text processing, stored with datasets, checkpoints and bundles. 1: num2words and
tables of abbreviations. 2: wetext for English, markup, line ends as pauses."""

# phonemizer splits the text at punctuation before espeak reads it, so that espeak cannot recognise
# "Dr.": abbreviations with a full stop are expanded here
_TITLES: Final[dict[str, dict[str, str]]] = {
    "fr": {"M.": "monsieur", "Mme": "madame", "Mlle": "mademoiselle", "Dr.": "docteur",
           "St.": "saint"},
    "es": {"Sr.": "señor", "Sra.": "señora", "Srta.": "señorita", "Dr.": "doctor",
           "Dra.": "doctora"},
    "de": {"Dr.": "Doktor", "Hr.": "Herr", "Fr.": "Frau", "Nr.": "Nummer", "St.": "Sankt"},
}  # fmt: skip
"""Abbreviations that stand before a name or a number."""
_ABBREVIATIONS: Final[dict[str, dict[str, str]]] = {
    "fr": {"etc.": "et cetera", "p. ex.": "par exemple", "p.ex.": "par exemple",
           "c.-à-d.": "c'est-à-dire"},
    "es": {"ud.": "usted", "uds.": "ustedes", "etc.": "etcétera", "p. ej.": "por ejemplo",
           "p.ej.": "por ejemplo"},
    "de": {"z.b.": "zum Beispiel", "z. b.": "zum Beispiel", "d.h.": "das heißt",
           "d. h.": "das heißt", "usw.": "und so weiter", "bzw.": "beziehungsweise",
           "ca.": "zirka", "u.a.": "unter anderem"},
}  # fmt: skip
_SYMBOLS: Final[dict[str, dict[str, str]]] = {
    "fr": {"&": "et", "%": "pour cent", "+": "plus", "=": "égale", "@": "arobase", "№": "numéro"},
    "es": {"&": "y", "%": "por ciento", "+": "más", "=": "igual a", "@": "arroba", "№": "número"},
    "de": {"&": "und", "%": "Prozent", "+": "plus", "=": "gleich", "@": "at"},
}
_FOLDED: Final = str.maketrans("‘’‛`´′“”„[]{}", "''''''\"\"\"()()")
_KEPT: Final = {
    "…": "\ue000",
    "²": "\ue001",
    "³": "\ue002",
    "µ": "\ue003",
    "№": "\ue004",
    "™": "",
    "®": "",
}
"""Characters that NFKC would take apart."""
_NUMERAL: Final = re.compile(r"(?<!\w)(vols?|ch|chap|sec|art|pt|fig|op|ed|bk)\.$", re.IGNORECASE)
"""Abbreviations after which a Roman numeral continues the sentence."""
_TITLE: Final = re.compile(r"(?:^|[\s\"'(])(?:Mr|Mrs|Ms|Prof)\.$|(?:^|[a-z,]\s)Dr\.$")
"""English abbreviations after which a name continues the sentence, be it Who."""
_OPEN_END: Final = re.compile(
    r"(?<!\w)(approx|temp|misc|govt|assn|corp|bros|jr|sr|blvd|rd|ln|hwy|rte|ste|rm|ed|op|pg|pt|ver|"
    r"mon|tues?|wed|thurs?|fri|sat|sun|vols?|pp?|figs?|nos|nr|ca|vs|chap|ch|sec|eq|art|ext|apt|tel|min|max|avg|"
    r"e\.g|i\.e|cf|st|ave|dr|mr|mrs|z\. ?B|d\. ?h|bzw|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|"
    r"dec|inc|ltd|al|dept|est|lbs?|oz|ft|in|hrs?|mins?|secs?|yrs?|[ap]\.m)\.$",
    re.IGNORECASE,
)
"""Abbreviations after which a figure or a small letter continues the sentence."""
_MINUS: Final = re.compile(r"(?<![\w)\]%])[-−–](?=[.,]?\d)")
_MAX_NAME = 12
"""Symbols of a letter's name; more are a description."""
_EXPONENT: Final = re.compile(r"(?<=[\w)])⁻[⁰¹²³⁴-⁹]+|(?<=[\w)])[⁰¹²³⁴-⁹]{2,}|(?<=[\w)])[⁴-⁹]")
_CLOSING = " \"'»)]"


def normalize(text: str, language: str = "en-us") -> str:
    """The spoken form of a text in one line.

    `language` is a BCP 47 tag or an espeak voice. Raises ValueError for a language that espeak
    lacks and for a script that its voice cannot read.
    """
    voice = espeak_voice(language)
    return " ".join(spoken for s in written_sentences(text, voice) if (spoken := speak(s, voice)))


def written_sentences(text: str, voice: str) -> list[str]:
    """The sentences of a text, without markup, as they are written; white space is normalised."""
    import sentencex

    lines = plain_lines(text)
    base = voice.split("-")[0]
    sentences: list[str] = []
    for line in lines:
        first = len(sentences)
        for sentence in sentencex.segment(base, line):
            clean = " ".join(sentence.split())
            if len(sentences) > first and _is_split_abbreviation(sentences[-1], clean, base):
                sentences[-1] += f" {clean}"
            elif clean:
                sentences.append(clean)
    return sentences


def _is_split_abbreviation(sentence: str, rest: str, base: str) -> bool:
    """True if sentencex took an abbreviation for the end of a sentence: "approx." before "5"."""
    if sentence.split()[-1] in _TITLES.get(base, {}) or (base == "en" and _TITLE.search(sentence)):
        return True
    if _NUMERAL.search(sentence) and re.match(r"[IVXLC]+\b", rest):
        return True
    return bool(_OPEN_END.search(sentence) and re.match(r"[\da-z(]", rest))


def speak(sentence: str, voice: str) -> str:
    """The spoken form of one sentence without markup. Raises ValueError for a script that the
    voice cannot read."""
    check_script(sentence, voice)
    sentence = _known_letters(_compose(sentence), voice)
    base = voice.split("-")[0]
    if base == "en":
        return spoken_english(sentence)
    for short, words in _TITLES.get(base, {}).items():
        sentence = re.sub(rf"(?<!\w){re.escape(short)}(?=\s+[^\Wa-zà-ÿ_])", words, sentence)
    for short, words in _ABBREVIATIONS.get(base, {}).items():
        sentence = re.sub(
            rf"(?<!\w){re.escape(short)}(?!\w)", _keep_stop(words), sentence, flags=re.I
        )
    for symbol, words in _SYMBOLS.get(base, {}).items():
        sentence = re.sub(rf"{re.escape(symbol)}(?=[.,;:!?)])", f" {words}", sentence)
        sentence = sentence.replace(symbol, f" {words} ")
    if _MINUS.search(sentence):
        sentence = _MINUS.sub(_minus(voice), sentence)
    sentence = re.sub(r"[*_#|`~^\\]+", " ", sentence)
    return " ".join(sentence.split())


@lru_cache(maxsize=256)
def _minus(voice: str) -> str:
    """How the sign of a negative number is written for a voice that speaks it: half of espeak's
    leave out a hyphen, and take U+2212 for the English word."""
    from num2words import CONVERTER_CLASSES

    positive, negative = phonemize_spoken(["5", "-5"], voice)
    if positive != negative:
        return "-"
    word = str(getattr(CONVERTER_CLASSES.get(voice.split("-")[0]), "negword", "")).strip()
    return f"{word} " if word and re.search(r"\w", word) else "−"


def _keep_stop(words: str) -> Callable[[re.Match[str]], str]:
    """The words of an abbreviation; at the end of a sentence, its full stop is the sentence's."""
    return lambda match: words + "." * (not match.string[match.end() :].strip(_CLOSING))


def _known_letters(sentence: str, voice: str) -> str:
    """Removes the marks of letters that espeak would only describe in this voice ("letter 1EA1"),
    and from words the small letters that are marks themselves, as in "Bannāʾ"."""
    return "".join(_known_letter(c, voice) if c >= "\u0180" else c for c in sentence)


@lru_cache(maxsize=4096)
def _known_letter(character: str, voice: str) -> str:
    parts = unicodedata.normalize("NFD", character)
    base = parts[0]
    if not character.isalpha() or (base != character and not base.isascii()):
        return character  # "≠" without its mark would be "="
    if base == character and unicodedata.category(character) != "Lm":
        return character
    (name,) = phonemize_spoken([character], voice)
    if len(name) <= _MAX_NAME:
        return character
    return base if base.isascii() else ""


def _compose(text: str) -> str:
    """Unicode NFKC with one kind of quotation mark, and no characters that are not shown."""
    text = _EXPONENT.sub(lambda match: f"^{unicodedata.normalize('NFKC', match[0])}", text)
    for character, kept in _KEPT.items():
        text = text.replace(character, kept)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # "1¾" is one and three quarters
    text = unicodedata.normalize("NFKC", text)
    for character, kept in _KEPT.items():
        text = text.replace(kept, character) if kept else text
    text = text.translate(_FOLDED).replace("\u2044", "/")
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc", "Co", "Cn", "Cs"))
