"""Languages by their BCP 47 tags: the espeak voice of each, and the scripts that it can read.

`espeak_voice` maps a tag, in any case, to a voice. The script of a language is the one that
Unicode calls likely; the further scripts that espeak reads were found by trying them
(`tests/test_languages.py`).
"""

import re
import unicodedata
from functools import lru_cache

from valle.model.espeak import phonemize_spoken, voices

MAX_TAG_LENGTH = 35
"""Characters of a language tag, as RFC 5646 recommends."""

_MAX_DISTANCE = 9
"""CLDR's distance up to which a voice may stand for another language: dialects, no neighbours."""

_VOICES = {"zh-hant": "cmn", "zh-hk": "yue", "zh-mo": "yue", "nn": "nb", "pt-pt": "pt"}
"""Voices of languages that CLDR's distances do not bring together."""

_VARIANTS = re.compile(
    r"fr-(be|ch)|en-gb-scotland|ca-..|ru-..|en-(029|shaw|us-nyc)|.*-(x|latn)-?.*|chr-.*"
)
"""Voices that only their exact tag names: CLDR would take Belgian French for Canadian."""

_SCRIPTS = {
    "grc": "Grek", "hyw": "Armn", "nog": "Cyrl", "bs": "Cyrl", "hr": "Cyrl", "uz": "Cyrl",
    "lfn": "Cyrl", "fa-latn": "Arab", "cmn-latn-pinyin": "Hani", "hak": "Latn", "en-shaw": "Shaw",
    "chr-us-qaaa-x-west": "Cher",
}  # fmt: skip
"""What espeak's voices read, where that is not the language's likely script."""

_PARTS = {
    "Hans": {"Hani"}, "Hant": {"Hani"}, "Jpan": {"Hira", "Kana"}, "Kore": {"Hang"},
}  # fmt: skip
"""Scripts of Unicode's characters in a combined script. espeak knows no kanji and no hanja."""

_SCRIPT_NAMES = {"Hani": "Chinese characters", "Hang": "Korean letters (Hangul)"}


def espeak_voice(language: str) -> str:
    """The espeak voice of a BCP 47 tag (`en`, `pt-BR`, `EN_us`, `zh-Hant-TW`), or of its own name.

    Raises ValueError for a tag that no voice speaks.
    """
    voice = _match(language) if len(language) <= MAX_TAG_LENGTH else None
    if voice is None:
        raise ValueError(
            f"language: espeak has no voice named {language[:MAX_TAG_LENGTH]!r}, and none for such "
            "a BCP 47 tag (try en-US, fr, de, pt-BR)"
        )
    return voice


@lru_cache(maxsize=256)
def _match(language: str) -> str | None:
    import langcodes
    from langcodes.tag_parser import LanguageTagError

    tag = language.strip().replace("_", "-").lower()
    by_tag = {voice.lower(): voice for voice in voices()}
    if tag in by_tag:
        return by_tag[tag]
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z0-9]{1,8})*", tag):
        return None
    candidates = [name for name in by_tag if not _VARIANTS.fullmatch(name)]
    try:
        desired = langcodes.Language.get(tag)
        # the longest beginning of the tag that has a voice of its own: zh-Hant-TW as zh-Hant
        parts = [desired.language, desired.script, desired.territory]
        for name in (f"{parts[0]}-{parts[2]}", f"{parts[0]}-{parts[1]}", f"{parts[0]}"):
            if name.lower() in _VOICES:
                return _VOICES[name.lower()]
        if parts[0] == "zh" and desired.maximize().script == "Hant":
            return _VOICES["zh-hant"]
        if f"{parts[0]}-{parts[2]}".lower() in by_tag:
            return by_tag[f"{parts[0]}-{parts[2]}".lower()]
        match, _ = langcodes.closest_match(tag, candidates, max_distance=_MAX_DISTANCE)
    except LanguageTagError:
        return None
    return None if match == "und" else by_tag[match]


@lru_cache(maxsize=256)
def readable_scripts(voice: str) -> frozenset[str]:
    """Codes (ISO 15924) of the scripts that a voice reads. All read Latin letters."""
    import langcodes

    scripts = {"Latn"}
    if voice.lower() in _SCRIPTS:
        scripts.add(_SCRIPTS[voice.lower()])
    else:
        likely = langcodes.Language.get(voice.split("-")[0]).maximize().script or "Latn"
        scripts |= _PARTS.get(likely, {likely})
    return frozenset(scripts)


def check_script(text: str, voice: str) -> None:
    """Raises ValueError, with the script's name, for letters that a voice cannot read.

    One or two Greek letters are a symbol, as in a formula, where espeak names each of them.
    """
    if text.isascii():
        return
    from fontTools.unicodedata import script, script_name

    readable = readable_scripts(voice)
    run, run_script = "", ""
    for character in f"{text} ":
        code = script(character) if character.isalpha() else "Zyyy"
        if code in ("Zinh", "Zyyy", "Zzzz") and unicodedata.category(character) in ("Mn", "Lm"):
            run += character  # marks belong to the letter before them
            continue
        if code == run_script:
            run += character
            continue
        foreign = run_script not in readable and run_script not in ("", "Zyyy", "Zinh", "Zzzz")
        if foreign and not (len(run) <= 2 and run_script == "Grek" and _names_greek(voice)):
            name = _SCRIPT_NAMES.get(run_script, f"{script_name(run_script)} letters")
            name = name.replace("_", " ")
            raise ValueError(
                f"the voice {voice} cannot read {name} ({run[:20]}); set language to theirs, or "
                "leave them out"
            )
        run, run_script = character, code


@lru_cache(maxsize=256)
def _names_greek(voice: str) -> bool:
    """Whether the voice has a name for each Greek letter, and not one for all of them."""
    letters = "αβγδεζηθικλμνξοπρστυφχψω"
    names = phonemize_spoken(list(letters), voice)
    return len(set(names)) > 20 and max(map(len, names)) < 20
