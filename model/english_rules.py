"""Rules for English text that wetext reads wrongly or does not know. They run before wetext.

Each rule is a pattern and its replacement: words, or a form that wetext reads rightly. Rules run in
order: a telephone number, for example, is replaced before ranges are looked for.
`tests/text_table.tsv` has the inputs for which each rule was made.
"""

import re
from collections.abc import Callable
from typing import Final

from valle.model.english_dates import clock, decade, duration, month_of_year, short_date
from valle.model.english_numbers import cardinal, digits, letters, year
from valle.model.english_tables import (
    AFTER_NAME,
    ALWAYS,
    BEFORE_ANSWER,
    BEFORE_NAME,
    BEFORE_NUMBER,
    CURRENCIES,
    DAYS,
    FILE_SUFFIXES,
    ISO,
    MONTHS,
    NATIONS,
    PER,
    PLURALS,
    SCALES,
    UNITS,
)
from valle.model.english_web import WEB, web_words

Match = re.Match[str]
Rule = tuple[re.Pattern[str], str | Callable[[Match], str]]

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_START = r"(?<![\w.,/:$€£¥₹])"
"""Before a number that is not part of a longer expression."""

_SIGN = "[" + "".join(CURRENCIES) + "]"
_CURRENCY = "|".join({name for names in CURRENCIES.values() for name in names[:2]})
_SCALE = (
    r"(?P<scale>\s?(?:thousand|million|billion|trillion|lakh|crore)|(?:k|mio|mn|mm|m|bn|b|tn|t))"
)


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
    whole = whole.lstrip("0") or "0"
    if len(part) == 2:
        words = [f"{cardinal(whole)} {one if whole == '1' else many}"] if whole != "0" else []
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
    if match["per"]:
        rest.append(UNITS[match["per"]])
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


def _over(match: Match) -> str:
    """A blood pressure, "120/80", which is no fraction."""
    return f"{match[1]} over {match[2]}" if int(match[1]) > int(match[2]) else match[0]


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
    if match[1] == "no" and BEFORE_ANSWER.search(match.string[: match.start()]):
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
_PER_UNIT = rf"(?:/(?P<per>{_UNIT_NAMES}))?"
_PER_NAMES = "|".join(re.escape(unit) for unit in sorted(PER, key=len, reverse=True))
_RANGE = r"(?<![\w.,/:+-])(\d{1,4}(?:\.\d+)?)(?:-\s?|\s-\s)(\d{1,4}(?:\.\d+)?)"

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
    _rule(r"(?<![\w.,])\d{1,2}(?:,\d\d)+,\d{3}(?![\d,])", lambda m: m[0].replace(",", "")),
    _rule(r"\bRs\.?\s?(?=\d)", "₹"),
    _rule(r"\bR\$\s?(?=\d)", "₢"),
    _rule(r"(?<=\d):\s+(?=\d)", ", "),  # wetext takes it for a ratio
    (WEB, web_words),
    _rule(r"(?<![\w@])@(?=\w)", "at "),
    _rule(r"(?<=\bat )(\w+)_(?=\w)", r"\1 underscore "),
    _rule(r"\b([A-GJ])#(?!\w)", r"\1 sharp"),
    _rule(r"(?<=\w)#(?=\d)", " number "),
    _rule(r"#(?=[A-Z]{1,3}-?\d)", "number "),
    _rule(r"(?<=\b(?:UTC|GMT))[-−](?=\d)", " minus "),
    _rule(r"#\s?(?=\d)", "number "),
    _rule(r"#(?=\w)", "hashtag "),
    _rule(r"#", " hash "),
    _rule(r"\bC\+\+", "C plus plus"),
    _rule(r"\bAT&T\b", "A-T and T"),
    _rule(r"\b(and)/(or)\b", r"\1 \2", _I),
    _rule(r"\b24/7\b", "twenty four seven"),
    _rule(rf"(?<=\w)\.(?=(?:{FILE_SUFFIXES})\b)|(?<!\w)\.(?=NET\b)", " dot "),
    # times
    _rule(r"(?<=\d)(\s?[ap]\.?m\.?)\s?[-–]\s?(?=\d)", r"\1 to ", _I),
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
        clock,
        _I,
    ),
    _rule(r"(?<=\d)T(?=\d\d:\d\d)", " at "),
    _rule(r"(\b\d\d:\d\d):\d\d(?:\.\d+)?Z\b", r"\1"),
    # dates, years and decades
    _rule(r"(?<![\w./-])(0?[1-9]|1[0-2])/((?:19|20)\d\d)(?![\w/-])", month_of_year),
    _rule(r"(?<![\w./-])(\d\d?)/(\d\d?)/(\d\d)(?![\w/-])", short_date),
    _rule(r"(?<![\w.,])'?(?P<century>1\d|20)(?P<tens>\d)0'?s\b", decade),
    _rule(r"(?<![\w.,])'?(?P<century>)(?P<tens>[2-9])0's\b", decade),
    _rule(r"(?<![\w.,])'(?P<century>)(?P<tens>[1-9])0s\b", decade),
    _rule(
        r"(?<![\w.,/-])(1[1-9]\d\d|20\d\d)\s?-\s?(1[1-9]\d\d|20\d\d)(?![\w/-])",
        lambda m: f"{year(m[1])} to {year(m[2])}",
    ),
    _rule(
        r"(?<![\w.,/-])((?:19|20)\d\d)/(\d\d)(?![\w/])",
        lambda m: f"{year(m[1])} {cardinal(str(int(m[2])))}",
    ),
    # money, before the minus sign and the units
    _rule(rf"(?<!\w)[-−](?=\s?{_SIGN}\s?\.?\d)", "minus "),
    # the sign or unit stands at both ends of a range: "$1m-2m", "5k-10k", "5kg-10kg"
    _rule(rf"(({_SIGN})\s?[\d.,]+{_SCALE})\s?-\s?{_SIGN}?(?=\d)", r"\1 to \2", _I),
    _rule(r"(?<=\d)(\s?[A-Za-z°%]{1,4})\s?-\s?(?=\d[\d.,]*\1(?!\w))", r"\1 to "),
    _rule(rf"({_SIGN})\s?[-−](?=\d)", r"minus \1"),
    _rule(
        rf"(?P<sign>{_SIGN})\s?(?P<low>{_NUMBER})\s?-\s?{_SIGN}?(?P<high>{_NUMBER}){_SCALE}?(?![\w.]*\d)\b",
        _money_range,
        _I,
    ),
    _rule(
        rf"(?:\b(?P<nation>(?-i:US|CA|C|AU|A|NZ|HK|S)))?(?P<sign>{_SIGN})\s?(?P<amount>{_NUMBER})"
        rf"(?:{_SCALE}\b)?(?:\s(?:{_CURRENCY})\b)?",
        lambda m: f" {_money(m)}" if m.string[m.start() - 1 : m.start()].isalnum() else _money(m),
        _I,
    ),
    _rule(rf"{_START}(?P<amount>{_NUMBER})(?:{_SCALE})?\s?(?P<sign>{_SIGN})", _money, _I),
    _rule(rf"{_START}(?P<amount>{_NUMBER})(?P<scale>)\s?(?P<sign>{'|'.join(ISO)})\b", _money),
    _rule(rf"\b(?P<sign>{'|'.join(ISO)})\s?(?P<amount>{_NUMBER})(?:{_SCALE}\b)?", _money),
    _rule(rf"{_START}({_NUMBER})\s?¢", lambda m: f"{cardinal(m[1])} cent{'s' * (m[1] != '1')}"),
    _rule(
        rf"\b(cents?|{_CURRENCY})\s?/\s?({_PER_NAMES})(?!\w)",
        lambda m: f"{m[1]} per {PER.get(m[2], m[2])}",
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
        rf"(?<![\w'])({'|'.join(BEFORE_NUMBER)})\.\s?(?=\d|\(\d|(?-i:[IVX]{{2,}}|[VX])\b)",
        _before_number,
        _I,
    ),
    _rule("№\\s?", "number "),
    _rule(r"(?<!\d)(?<!\d\s)\bmin\.(?=\s[a-z\d])", "minimum"),
    _rule(rf"(?P<name>\b\d+\w*(?:\s[A-Z][\w']+){{1,3}}\s)(?P<short>{_NAMES})\.", _named),
    _rule(rf"\b({'|'.join(BEFORE_NAME)})\.\s+(?=[A-Z])", lambda m: f"{BEFORE_NAME[m[1]]} "),
    _rule(r"\b(Dr|Mr|Mrs|Ms|Prof) (?=[A-Z])", lambda m: f"{BEFORE_NAME[m[1]]} "),
    _rule(rf"(?P<name>\b(?:[A-Z][\w'-]*|\d+\w\w)\s)(?P<short>{_NAMES})\.", _named),
    _rule(r"\b(?:[A-Za-z]\.\s?)+[A-Za-z]\.(?!\w)", _initials),
    _rule(r"((?:^|\b[A-Z][a-z]+ )[A-Z])\.(?= [A-Z][a-z])", r"\1"),
    _rule(r"\b(Mon|Tues?|Wed|Thurs?|Fri|Sat|Sun)\.(?=,|\s[a-z\d])", lambda m: DAYS[m[1][:3]]),
    _rule(r"\b(Jan|Feb|Apr|Aug|Sept?|Oct|Nov|Dec)\.(?=,|\s[a-z])", lambda m: MONTHS[m[1][:3]]),
    # units, signs and ranges
    _rule(r"\b(\d+)\s?h\s?(\d\d?)\s?m(?:in)?\b(?:\s?(\d\d?)\s?s\b)?", duration),
    _rule(r"\b()(\d\d?)\s?m(?:in)?\s?(\d\d?)\s?s\b", duration),
    # "in" is a preposition in "1 in 5"
    _rule(
        rf"{_START}({_NUMBER})(?:in\b|\sin(?=\.(?:\s*$|\s[a-z\d])))(?:\.(?=\s[a-z\d]))?",
        lambda m: f"{cardinal(m[1])} inch{'es' * (m[1] != '1')}",
    ),
    _rule(r"(\d\s?ft\.? \d\d?) in\b", r"\1 inches"),
    _rule(r"(?<=\d) \* (?=\d|\w\b)|(?<=\b\w) \* (?=\d|\w\b)", " times "),
    _rule(r"\b401\(?k\b\)?", "four oh one k"),
    _rule(r"\b9/11\b", "nine eleven"),
    _rule(r"(?<![\d/.])(\d+)/\1(?![\d/])", r"\1 \1"),
    _rule(r"(?<![\w/.])(\d+\.\d+)/(?=\d+(?![\w/]))", r"\1 out of "),
    _rule(r"(?<![\w/.,])(\d{2,3})/(\d\d)(?![\w/])", _over),
    _rule(r"(?<!\w)'0(?=\d\b)", "oh "),
    _rule(r"(?<=\d(?:st|nd|rd|th))-(?=\w)", " "),
    _rule(r"(?<!\w)\+(?=\d)", "plus "),
    _rule(r"(?<=\d)\+(?!\w)", " plus"),
    _rule("√", " square root of "),
    _rule(r"(?<![\w.])(\d{1,2})'\s?(\d{1,2})(?:\"|''|(?!\w))", r"\1 feet \2 inches"),
    _rule(r"(?<=\d)[eE]-(?=\d)", " times ten to the minus "),
    _rule(rf"{_START}({_NUMBER})k\b", r"\1 thousand"),
    _rule(rf"{_START}({_NUMBER})\s?(mn|bn|tn)\b", lambda m: f"{m[1]} {SCALES[m[2]]}"),
    _rule(r"(?<=\d)%\s?-\s?(?=\d)", "% to "),
    _rule(rf"{_START}({_NUMBER})\s?M\b", r"\1 million"),
    _rule(r"(?<=\d)\s?-\s?(?=\d+(?:\.\d+)?\s*=)", " minus "),
    _rule(rf"{_RANGE}(?![\d/-])", r"\1 to \2"),
    _rule(
        rf"{_START}(?P<amount>{_NUMBER})\s?(?P<unit>{_UNIT_NAMES}){_PER_UNIT}(?![\w/²³])\.?(?=\s*$)",
        _last_unit,
    ),
    _rule(
        rf"{_START}(?P<amount>{_NUMBER})\s?(?P<unit>{_UNIT_NAMES}){_PER_UNIT}(?![\w/²³])"
        r"(?:\.(?=\s+[a-z\d]))?",
        _unit,
    ),
    _rule(r"(?<=\d)(\s?[a-z]{1,2})²", r"\g<1>2"),
    _rule(r"(?<=\d)(\s?[a-z]{1,2})³", r"\g<1>3"),
    _rule("²", " squared "),
    _rule("³", " cubed "),
    _rule(r"(?<![\w)\]%])[-−–](?=\.?\d)", "minus "),
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
    _rule(r"(?<!\w)~\s?(?=\d)", "about "),
    _rule(r"(?<=[\w)])\^[-−](?=\w)", " to the power of minus "),
    _rule(r"(?<=[\w)])\^(?=\w)", " to the power of "),
    _rule("={4,}", " "),
    _rule("={2,3}", "="),
    _rule(r"\s?--+\s?", " — "),
    _rule(r"[*_`|~^]", " "),
    _rule(r"\\", " backslash "),
    # numbers that wetext reads oddly: "thousand two hundred", "ten hundred", "nineteen zero five"
    _rule(r"(?<![\w.,/:$€£-])([12][1-9]0[1-9])(?![\w/]|[.,:]\d)", lambda m: year(m[1])),
    _rule(r"(?<![\w.,/:-])100[1-9](?![\w/]|[.,:]\d)", lambda m: cardinal(m[0])),
    # decimals beside a letter, of which wetext leaves the point: "Qwen2.5", "1.5B"
    _rule(r"(?<=[A-Za-z])\d+\.\d+(?![\d.])", lambda m: f" {cardinal(m[0])} "),
    _rule(rf"{_START}\d+\.\d+(?=[A-WYZ]\b)", lambda m: f"{cardinal(m[0])} "),
    _rule(r"(?<![\w.,])1,?000(?![\w,.]\d|[stnr]|\d)", "one thousand"),
    _rule(r"(?<![\w.,])1,\d{3}(?:\.\d+)?(?![\d,]|st|nd|rd|th)", lambda m: cardinal(m[0])),
    _rule(r"(?<=[a-z])\s?%", " percent"),
    _rule("‰", " per mille"),
    _rule(r"(?<=[a-z])\s?°\s?C\b", " degrees Celsius"),
    _rule(r"(?<=[a-z])\s?°\s?F\b", " degrees Fahrenheit"),
    _rule(r"(?<=[a-z])\s?°", " degrees"),
    _rule("=", " equals "),
    # an answer, which wetext would read as "number"
    _rule(r"\b([Nn]o)\.", r"\1 ."),
]
"""In the order in which they run."""
