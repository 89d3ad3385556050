"""Rules for English text that wetext reads wrongly or does not know. They run before wetext.

Each rule is a pattern and its replacement: words, or a form that wetext reads rightly. Rules run in
order: a telephone number, for example, is replaced before ranges are looked for.
`tests/text_table.tsv` has the inputs for which each rule was made.
"""

import re
from collections.abc import Callable
from typing import Final

from valle.model.english_numbers import cardinal, digits, letters, year
from valle.model.english_tables import (
    AFTER_NAME,
    ALWAYS,
    BEFORE_ANSWER,
    BEFORE_NAME,
    BEFORE_NUMBER,
    CURRENCIES,
    DAYS,
    ISO,
    NATIONS,
    PLURALS,
    SCALES,
    UNITS,
    WEB_SIGNS,
)

Match = re.Match[str]
Rule = tuple[re.Pattern[str], str | Callable[[Match], str]]

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_START = r"(?<![\w.,/:$€£¥₹])"
"""Before a number that is not part of a longer expression."""

_SIGN = "[" + "".join(CURRENCIES) + "]"
_SCALE = r"(?P<scale>\s?(?:thousand|million|billion|trillion)|(?:k|mio|mn|mm|m|bn|b|tn|t))"

_TLD = (
    "com|org|net|edu|gov|mil|int|info|io|ai|app|dev|biz|me|tv|co|uk|us|de|fr|es|it|nl|eu|ch|at|be|"
    "ca|au|nz|jp|cn|in|br|ru|pl|se|no|dk|fi|ie|xyz|cloud|tech|online|site|blog|shop"
)
_PATH = r"(?:[/?#][^\s<>\"')\]]*[^\s<>\"')\].,;:!?])?/?"
_WEB = re.compile(
    rf"\b(?:https?|ftp)://[^\s<>\"]*[^\s<>\"')\].,;:!?]|\bwww\.[\w-]+(?:\.[\w-]+)+{_PATH}"
    rf"|\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\b(?:[\w-]+\.)+(?:{_TLD})\b(?!\.\w|@){_PATH}",
    re.ASCII | re.IGNORECASE,
)


def _web(match: Match) -> str:
    """An address of the web or of mail in words."""
    address = re.sub(r"^\w+://", "", match[0]).rstrip("/")
    if re.search(r"\.[A-Z]", address) and "/" not in address and "@" not in address:
        return match[0]  # "left.In": a space is missing, no address
    words = []
    for part in re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", address):
        if part.isdigit():
            words.append(digits(part) if part[0] == "0" or len(part) > 4 else cardinal(part))
        elif part in WEB_SIGNS:
            words.append(WEB_SIGNS[part])
        elif words and words[-1] == "dot" and len(part) == 2 and part not in ("co", "me", "us"):
            words.append(letters(part))  # a country's domain: "uk"
        else:
            words.append("WWW" if part.lower() == "www" else part)
    return " ".join(words)


def _clock(match: Match) -> str:
    """Hour and minutes in words, and AM or PM letter by letter, since espeak reads AM as a word."""
    hour, minutes, half = match["hour"], match["minutes"], match["half"].upper()
    words = cardinal(str(int(hour)))
    if minutes and int(minutes):
        words += f" {cardinal(minutes) if minutes[0] != '0' else f'oh {cardinal(minutes[1])}'}"
    # "5 p.m." closes a sentence where none of it follows
    closes = match["dot"] and not match.string[match.end() :].strip(" \"')]")
    return f"{words} {half}-M{'.' if closes else ''}"


def _decade(match: Match) -> str:
    century, tens = match["century"], match["tens"]
    names = {
        "1": "tens", "2": "twenties", "3": "thirties", "4": "forties", "5": "fifties", "6":
        "sixties", "7": "seventies", "8": "eighties", "9": "nineties",
    }  # fmt: skip
    if not century:
        return names[tens]
    if tens == "0":
        whole = f"{cardinal(century[0])} thousand" if century[1] == "0" else cardinal(century)
        return f"{whole}s" if century[1] == "0" else f"{whole} hundreds"
    return f"{cardinal(century)} {names[tens]}"


def _money(match: Match) -> str:
    """An amount in words: "five dollars and twenty cents", "five point three billion dollars"."""
    sign = match["sign"]
    one, many, cent, cents = CURRENCIES[ISO.get(sign, sign)]
    nation = match.groupdict().get("nation")
    amount, scale = match["amount"].replace(",", ""), (match["scale"] or "").strip()
    if nation:
        one, many = f"{NATIONS[nation]} {one}", f"{NATIONS[nation]} {many}"
    if scale:
        return f"{cardinal(amount)} {SCALES.get(scale.lower(), scale.lower())} {many}"
    whole, _, part = amount.partition(".")
    whole = whole or "0"
    if len(part) == 2:
        words = [f"{cardinal(whole)} {one if int(whole) == 1 else many}"] if int(whole) else []
        if int(part):
            words.append(f"{cardinal(part)} {cent if int(part) == 1 else cents}")
        return " and ".join(words) or f"zero {many}"
    return f"{cardinal(amount)} {one if amount == '1' else many}"


def _money_range(match: Match) -> str:
    many = CURRENCIES[match["sign"]][1]
    scale = (match["scale"] or "").strip().lower()
    scale = f" {SCALES.get(scale, scale)}" if scale else ""
    low, high = (match[name].replace(",", "") for name in ("low", "high"))
    return f"{cardinal(low)} to {cardinal(high)}{scale} {many}"


def _unit(match: Match) -> str:
    first, *rest = UNITS[match["unit"]].split(" per ")
    if match["amount"] != "1":
        first = PLURALS.get(first, first if first.endswith("hertz") else f"{first}s")
    return f"{match['amount']} {' per '.join([first, *rest])}"


def _last_unit(match: Match) -> str:
    return f"{_unit(match)}."[: None if match[0].endswith(".") else -1]


def _version(match: Match) -> str:
    """Parts with a point between them; a German date in a form that wetext knows."""
    day, month, *rest = parts = match["parts"].split(".")
    if len(parts) == 3 and len(rest[0]) == 4 and 0 < int(day) <= 31 and 0 < int(month) <= 12:
        return f"{rest[0]}-{month:0>2}-{day:0>2}"
    if parts[-1] == "000" and all(len(part) == 3 for part in parts[1:]):
        return cardinal("".join(parts))  # a million, as it is written in Germany
    words = [digits(p) if p[0] == "0" and len(p) > 1 else cardinal(p) for p in parts]
    return f"{'v ' if match['v'] else ''}{' point '.join(words)}"


def _phone(match: Match) -> str:
    groups = re.findall(r"\d+", match[0])
    words = ", ".join(digits(group) for group in groups)
    return f"plus {words}" if match[0].startswith("+") else words


def _short_phone(match: Match) -> str:
    low, high = match["low"], match["high"]
    round_numbers = low[-1] == high[-1] == "0"
    return f"{low} to {high}" if round_numbers else f"{digits(low)}, {digits(high)}"


def _abbreviation(words: str) -> Callable[[Match], str]:
    """The words of an abbreviation; at the end of a sentence, its full stop is the sentence's."""

    def replace(match: Match) -> str:
        rest = match.string[match.end() :]
        closes = not rest.strip(" \"')]") or (words == "et cetera" and re.match(r"\s[A-Z]", rest))
        return f"{words}{'.' if closes and match[0].endswith('.') else ''}"

    return replace


def _before_number(match: Match) -> str:
    """An abbreviation before a number. After "said", "no." is an answer that ends a sentence."""
    before = match.string[: match.start()].split()
    if match[1] == "no" and before and before[-1].lower() in BEFORE_ANSWER:
        return match[0]
    return f"{BEFORE_NUMBER[match[1].lower()]} "


def _named(match: Match) -> str:
    """A street after its name: "Elm St."."""
    return match["name"] + _abbreviation(AFTER_NAME[match["short"]])(match)


def _initials(match: Match) -> str:
    return _abbreviation(letters(match[0]))(match)


def _rule(pattern: str, replacement: str | Callable[[Match], str], flags: int = 0) -> Rule:
    return re.compile(pattern, flags), replacement


_I = re.IGNORECASE
_NAMES = "|".join(AFTER_NAME)
_UNIT_NAMES = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
_RANGE = r"(?<![\w.,/:+-])(\d{1,4}(?:\.\d+)?)\s?-\s?(\d{1,4}(?:\.\d+)?)"

RULES: Final[list[Rule]] = [
    # signs that wetext asserts on or spells
    _rule(r"(?<=\d)[\u2010-\u2015\u2212](?=[\d$€£])", "-"),
    # thousands with spaces or, after a euro sign, with full stops
    _rule(
        r"(?<![\w.,])\d{1,3}(?: 000)+(?![\w.,]?\d)|(?<![\w.,])\d{1,3}(?: \d{3}){2,}(?![\w.,]?\d)",
        lambda m: m[0].replace(" ", ""),
    ),
    _rule(
        r"(?<=€)\s?\d{1,3}(?:\.\d{3})+(?!\d)|\b\d{1,3}(?:\.\d{3})+(?=(?:,\d\d)?\s?€)",
        lambda m: m[0].replace(".", "").strip(),
    ),
    _rule(r"(?<=€)\s?(\d+),(\d\d)(?!\d)", r"\1.\2"),
    _rule(r"\b(\d+),(\d\d)(?=\s?€)", r"\1.\2"),
    _rule(r"\bRs\.?\s?(?=\d)", "₹"),
    (_WEB, _web),
    _rule(r"(?<![\w@])@(?=\w)", "at "),
    _rule(r"(?<=\bat )(\w+)_(?=\w)", r"\1 underscore "),
    _rule(r"\b([A-GJ])#(?!\w)", r"\1 sharp"),
    _rule(r"#\s?(?=\d)", "number "),
    _rule(r"#(?=\w)", "hashtag "),
    _rule(r"#", " hash "),
    _rule(r"\bC\+\+", "C plus plus"),
    _rule(r"\bAT&T\b", "A-T and T"),
    _rule(r"\b(and)/(or)\b", r"\1 \2", _I),
    _rule(r"\b24/7\b", "twenty four seven"),
    # times
    _rule(
        r"(?<![\d:.])(\d{1,2}(?::\d\d)?)\s?[-–]\s?(?=\d{1,2}(?::\d\d)?\s?[ap]\.?\s?m\b)",
        r"\1 to ",
        _I,
    ),
    _rule(
        r"(?<![\d:.])(\d{1,2}) to (?=\d{1,2}(?::\d\d)?\s?[ap]\.?m\b)",
        lambda m: f"{cardinal(m[1])} to ",
        _I,
    ),
    _rule(
        r"(?<![\d:.])(?P<hour>\d{1,2})(?:[:.](?P<minutes>\d\d))?\s?(?P<half>[ap])(?:m\b|\.\s?m\b(?P<dot>\.)?)",
        _clock,
        _I,
    ),
    _rule(r"(?<=\d)T(?=\d\d:\d\d)", " at "),
    _rule(r"(\b\d\d:\d\d):\d\d(?:\.\d+)?Z\b", r"\1"),
    # years and decades
    _rule(r"(?<![\w.,])'?(?P<century>1\d|20)(?P<tens>\d)0'?s\b", _decade),
    _rule(r"(?<![\w.,])'?(?P<century>)(?P<tens>[2-9])0's\b", _decade),
    _rule(r"(?<![\w.,])'(?P<century>)(?P<tens>[1-9])0s\b", _decade),
    _rule(
        r"(?<![\w.,/-])(1[1-9]\d\d|20\d\d)\s?-\s?(1[1-9]\d\d|20\d\d)(?![\w/-])",
        lambda m: f"{year(m[1])} to {year(m[2])}",
    ),
    _rule(
        r"(?<![\w.,/-])((?:19|20)\d\d)/(\d\d)(?![\w/])",
        lambda m: f"{year(m[1])} {cardinal(str(int(m[2])))}",
    ),
    # money, before the minus sign and the units
    _rule(rf"(?<!\w)[-−](?=\s?{_SIGN}\s?\d)", "minus "),
    _rule(
        rf"(?P<sign>{_SIGN})\s?(?P<low>{_NUMBER})\s?-\s?{_SIGN}?(?P<high>{_NUMBER}){_SCALE}?(?![\w.]*\d)\b",
        _money_range,
        _I,
    ),
    _rule(
        rf"(?:\b(?P<nation>US|CA|C|AU|A|NZ|HK|S))?(?P<sign>{_SIGN})\s?(?P<amount>{_NUMBER})(?:{_SCALE}\b)?",
        _money,
        _I,
    ),
    _rule(rf"{_START}(?P<amount>{_NUMBER})(?:{_SCALE})?\s?(?P<sign>{_SIGN})", _money, _I),
    _rule(rf"{_START}(?P<amount>{_NUMBER})(?P<scale>)\s?(?P<sign>{'|'.join(ISO)})\b", _money),
    _rule(rf"\b(?P<sign>{'|'.join(ISO)})\s?(?P<amount>{_NUMBER})(?:{_SCALE}\b)?", _money),
    _rule(rf"{_START}({_NUMBER})\s?¢", lambda m: f"{cardinal(m[1])} cent{'s' * (m[1] != '1')}"),
    _rule(
        r"(?<=s)\s?/\s?(?=(?:second|minute|hour|day|week|month|year|person|user|mo|yr)\b)", " per "
    ),
    # numbers that are read digit by digit
    _rule(r"\+\d{1,3}[\s.(-]*\(?\d[\d\s().-]{5,17}\d", _phone),
    _rule(
        r"(?<![\w.+-])(?:1[-. ])?(?:\(\d{3}\)\s?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-]|\.\d)", _phone
    ),
    _rule(r"(?<![\w.+-])0\d{1,4}[ -]\d{3,4}[ -]?\d{3,4}(?![\w-]|\.\d)", _phone),
    _rule(r"(?<![\w.+-])0\d(?:[ .-]\d\d){4}(?![\w-])", _phone),
    _rule(
        r"(?<![\w.-])\d{3}-\d\d-\d{4}(?![\w-])|(?<![\w.-])\d{4}(?:[ -]\d{4}){3}(?![\w-])", _phone
    ),
    _rule(r"(?<![\w.,/+$-])(?P<low>\d{3})-(?P<high>\d{4})(?![\w,/-]|\.\d)", _short_phone),
    _rule(r"(?<=\b(?:dial|call|ring) )\d{3}\b(?![-.,]\d)", lambda m: digits(m[0]), _I),
    _rule(r"\d{16,}", lambda m: digits(m[0])),
    _rule(r"(?<![\w.,/:-])0\d+(?![\d,]*[.:/-]?\d|\w)", lambda m: digits(m[0])),
    # versions, addresses of machines, dates with full stops
    _rule(
        r"\b(?P<v>v(?:er)?\.?\s?)?(?<![\d.,])(?P<parts>\d{1,5}(?:\.\d{1,5}){2,})(?![\w]|\.\d)",
        _version,
        _I,
    ),
    _rule(r"\bv(?=\d)", "v ", _I),
    # abbreviations
    *(
        _rule(rf"(?<!\w){re.escape(short)}(?!\w)", _abbreviation(words), _I)
        for short, words in ALWAYS.items()
    ),
    _rule(r"\bw/o\b", "without"),
    _rule(r"\bw/(?=\s?[a-z])", "with "),
    _rule(
        rf"(?<![\w'])({'|'.join(BEFORE_NUMBER)})\.\s?(?=\d|(?-i:[IVX]{(2,)}|[VX])\b)",
        _before_number,
        _I,
    ),
    _rule("№\\s?", "number "),
    _rule(rf"(?P<name>\b\d+\w*(?:\s[A-Z][\w']+){{1,3}}\s)(?P<short>{_NAMES})\.", _named),
    _rule(rf"\b({'|'.join(BEFORE_NAME)})\.\s+(?=[A-Z])", lambda m: f"{BEFORE_NAME[m[1]]} "),
    _rule(r"\b(Dr|Mr|Mrs|Ms|Prof) (?=[A-Z])", lambda m: f"{BEFORE_NAME[m[1]]} "),
    _rule(rf"(?P<name>\b(?:[A-Z][\w'-]*|\d+\w\w)\s)(?P<short>{_NAMES})\.", _named),
    _rule(r"\b(?:[A-Za-z]\.\s?)+[A-Za-z]\.(?!\w)", _initials),
    _rule(r"((?:^|\b[A-Z][a-z]+ )[A-Z])\.(?= [A-Z][a-z])", r"\1"),
    _rule(r"\b(Mon|Tues?|Wed|Thurs?|Fri|Sat|Sun)\.(?=,|\s[a-z\d])", lambda m: DAYS[m[1][:3]]),
    # units, signs and ranges
    _rule(r"\b401\(k\)", "four oh one k"),
    _rule(r"\b9/11\b", "nine eleven"),
    _rule(r"(?<![\d/])(\d+)/\1(?![\d/])", r"\1 \1"),
    _rule(r"(?<!\w)'0(?=\d\b)", "oh "),
    _rule(r"(?<=\d(?:st|nd|rd|th))-(?=\w)", " "),
    _rule(r"(?<!\w)\+(?=\d)", "plus "),
    _rule(r"(?<=\d)\+(?!\w)", " plus"),
    _rule("√", " square root of "),
    _rule(r"(?<![\w.])(\d{1,2})'\s?(\d{1,2})(?:\"|''|(?!\w))", r"\1 feet \2 inches"),
    _rule(r"(?<=\d)[eE]-(?=\d)", " times ten to the minus "),
    _rule(rf"{_START}({_NUMBER})k\b", r"\1 thousand"),
    _rule(r"(?<=\d)%\s?-\s?(?=\d)", "% to "),
    _rule(rf"{_START}({_NUMBER})\s?M\b", r"\1 million"),
    _rule(r"(?<=\d)\s-\s(?=\d+(?:\.\d+)?\s*=)", " minus "),
    _rule(rf"{_RANGE}(?![\d/-])", r"\1 to \2"),
    _rule(
        rf"{_START}(?P<amount>{_NUMBER})\s?(?P<unit>{_UNIT_NAMES})(?![\w/²³])\.?(?=\s*$)",
        _last_unit,
    ),
    _rule(
        rf"{_START}(?P<amount>{_NUMBER})\s?(?P<unit>{_UNIT_NAMES})(?![\w/²³])"
        r"(?:\.(?=\s+[a-z\d]))?",
        _unit,
    ),
    _rule(r"(?<=\d)(\s?[a-z]{1,2})²", r"\g<1>2"),
    _rule(r"(?<=\d)(\s?[a-z]{1,2})³", r"\g<1>3"),
    _rule("²", " squared "),
    _rule("³", " cubed "),
    _rule(r"(?<![\w)\]%])[-−](?=\.?\d)", "minus "),
    _rule(r"(?<=\d)\s?[×xX]\s?(?=\d)", " times "),
    _rule("×", " times "),
    _rule("÷", " divided by "),
    _rule("±", " plus or minus "),
    _rule("≤|<=", " less than or equal to "),
    _rule("≥|>=", " greater than or equal to "),
    _rule("≠|!=", " not equal to "),
    _rule("≈", " approximately "),
    _rule(r"<?(?:-+|=+)>|[→⇒←]", ", "),
    _rule("<", " less than "),
    _rule(">", " greater than "),
    _rule(r"~\s?(?=\d)", "about "),
    _rule(r"(?<=[\w)])\^[-−](?=\w)", " to the power of minus "),
    _rule(r"(?<=[\w)])\^(?=\w)", " to the power of "),
    _rule(r"\s?--+\s?", " — "),
    _rule(r"[*_`|~^]", " "),
    _rule(r"\\", " backslash "),
    # numbers that wetext reads oddly: "thousand two hundred", "ten hundred", "nineteen zero five"
    _rule(r"(?<![\w.,/:$€£-])(1[1-9]0[1-9])(?![\w/]|[.,:]\d)", lambda m: year(m[1])),
    _rule(r"(?<![\w.,])1,?000(?![\w,.]\d|[stnr]|\d)", "one thousand"),
    _rule(r"(?<![\w.,])1,\d{3}(?:\.\d+)?(?![\d,]|st|nd|rd|th)", lambda m: cardinal(m[0])),
    _rule(r"(?<=[a-z])\s?%", " percent"),
    _rule(r"(?<=[a-z])\s?°\s?C\b", " degrees Celsius"),
    _rule(r"(?<=[a-z])\s?°\s?F\b", " degrees Fahrenheit"),
    _rule(r"(?<=[a-z])\s?°", " degrees"),
    _rule("=", " equals "),
    # an answer, which wetext would read as "number"
    _rule(r"\b([Nn]o)\.", r"\1 ."),
]
"""In the order in which they run."""
