"""Tables of `english_rules`: currencies, units, abbreviations and signs, with their words."""

import re
from typing import Final

CURRENCIES: Final = {
    "$": ("dollar", "dollars", "cent", "cents"), "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"), "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"), "₽": ("ruble", "rubles", "kopeck", "kopecks"),
    "₩": ("won", "won", "jeon", "jeon"), "₺": ("lira", "lira", "kurush", "kurush"),
    "₴": ("hryvnia", "hryvnias", "kopeck", "kopecks"), 
    "₪": ("shekel", "shekels", "agora", "agorot"),
    "₫": ("dong", "dong", "hao", "hao"), "₱": ("peso", "pesos", "centavo", "centavos"),
    "₦": ("naira", "naira", "kobo", "kobo"), "฿": ("baht", "baht", "satang", "satang"),
    "₢": ("real", "reais", "centavo", "centavos"),
    "₣": ("Swiss franc", "Swiss francs", "centime", "centimes"),
    "元": ("yuan", "yuan", "fen", "fen"),
    "₿": ("bitcoin", "bitcoins", "satoshi", "satoshis"),
}  # fmt: skip
"""Name and part of a currency, one and several."""

ISO: Final = {
    "USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "RUB": "₽", "KRW": "₩", "TRY": "₺",
    "UAH": "₴", "ILS": "₪", "VND": "₫", "PHP": "₱", "NGN": "₦", "THB": "฿", "BTC": "₿",
    "BRL": "₢", "CHF": "₣", "CNY": "元", "RMB": "元",
}  # fmt: skip

NATIONS: Final = {
    "US": "U-S", "C": "Canadian", "CA": "Canadian", "A": "Australian", "AU": "Australian",
    "NZ": "New Zealand", "HK": "Hong Kong", "S": "Singapore",
}  # fmt: skip

SCALES: Final = {
    "k": "thousand", "m": "million", "mn": "million", "mm": "million", "mio": "million",
    "b": "billion", "bn": "billion", "t": "trillion", "tn": "trillion",
}  # fmt: skip

BASE_UNITS: Final = {
    "Hz": "hertz", "W": "watt", "V": "volt", "A": "ampere", "J": "joule", "Pa": "pascal",
    "Wh": "watt hour", "B": "byte", "g": "gram", "m": "meter", "s": "second", "L": "liter",
    "l": "liter", "Ω": "ohm", "N": "newton", "eV": "electronvolt", "Ah": "ampere hour",
    "bps": "bit per second", "cal": "calorie", "bit": "bit",
}  # fmt: skip

PREFIXES: Final = {
    "k": "kilo", "M": "mega", "G": "giga", "T": "tera", "m": "milli", "µ": "micro", "μ": "micro",
    "n": "nano", "c": "centi", "d": "deci", "h": "hecto",
}  # fmt: skip

ALONE = ("Hz", "W", "V", "J", "Pa", "Wh", "g", "m", "L", "l", "Ω", "eV")
"""Units that may stand without a prefix: 5A is a room, and 50s are years."""

UNITS: Final = {
    **{unit: BASE_UNITS[unit] for unit in ALONE},
    **{f"{p}{u}": f"{prefix}{unit}" for p, prefix in PREFIXES.items()
       for u, unit in BASE_UNITS.items()},
    "KB": "kilobyte", "tbsp": "tablespoon", "tsp": "teaspoon", "gal": "gallon", "bpm":
    "beat per minute", "rpm": "revolution per minute", "min": "minute", "mins": "minute",
    "hrs": "hour", "hr": "hour", "h": "hour", "sec": "second", "secs": "second", "yr": "year",
    "yrs": "year", "mos": "month", "wks": "week", "m/s": "meter per second",
    "m/s²": "meter per second squared", "km/s": "kilometer per second", "km/h":
    "kilometer per hour", "kmh": "kilometer per hour", "kph": "kilometer per hour", "mph":
    "mile per hour", "fps": "frame per second", "dpi": "dot per inch", "psi":
    "pound per square inch", "ft": "foot", "yd": "yard", "mi": "mile", "oz": "ounce",
    "lb": "pound", "lbs": "pound", "fl oz": "fluid ounce", "fl. oz": "fluid ounce",
    "pcs": "piece", "px": "pixel",
    "dB": "decibel", "mpg": "mile per gallon",
}  # fmt: skip
"""Units that wetext does not know, or, like m, takes for others."""

PER: Final = {
    **UNITS,
    **{word: word for word in ("second", "minute", "hour", "day", "week", "month", "quarter",
       "year", "person", "user", "night", "piece", "unit", "item", "share", "token")},
    "d": "day", "wk": "week", "mo": "month", "yr": "year", "s": "second",
}  # fmt: skip
"""What a price may be for: "$5/kg"."""

FILE_SUFFIXES: Final = (
    "js|ts|py|txt|md|json|jsonl|csv|tsv|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|svg|mp[34]|wav|flac|"
    "zip|tar|gz|html?|css|xml|ya?ml|toml|exe|cpp|java|rs|NET"
)
"""Suffixes of names of files and programs, whose full stop is "dot"."""

ALWAYS: Final = {
    "e.g.": "for example", "i.e.": "that is", "vs.": "versus", "approx.": "approximately",
    "dept.": "department", "govt.": "government", "a.k.a.": "also known as", "misc.":
    "miscellaneous", "et al.": "et al", "cf.": "compare", "viz.": "namely", "Inc.": "incorporated",
    "Ltd.": "limited", "Corp.": "corporation", "Bros.": "brothers", "Jr.": "junior",
    "Sr.": "senior", "etc.": "et cetera", "Esq.": "esquire", "Assn.": "association",
    "Ph.D.": "P-H-D", "vol.": "volume", "vols.": "volumes", "fig.": "figure", "figs.": "figures",
    "chap.": "chapter", "avg.": "average", "max.": "maximum", "temp.": "temperature",
    "tel.": "telephone", "est.": "established", "apt.": "apartment", "ext.": "extension",
}  # fmt: skip

BEFORE_NUMBER: Final = {
    "no": "number", "nos": "numbers", "nr": "number", "p": "page", "pp": "pages", "ch": "chapter",
    "sec": "section", "eq": "equation", "art": "article", "op": "opus", "ed": "edition",
    "rm": "room", "pt": "part", "ver": "version", "hwy": "highway", "rte": "route", "ste": "suite",
    "ca": "circa", "pg": "page", "vol": "volume", "fig": "figure",
}  # fmt: skip

BEFORE_NAME: Final = {
    "Dr": "doctor", "Prof": "professor", "Mr": "mister", "Mrs": "missus", "Ms": "miss", "Gen":
    "general", "Sen": "senator", "Rep": "representative", "Gov": "governor", "Capt": "captain",
    "Lt": "lieutenant", "Col": "colonel", "Sgt": "sergeant", "Rev": "reverend", "Pres":
    "president", "Hon": "honorable", "St": "saint", "Mt": "mount", "Ft": "fort", "Maj": "major",
    "Adm": "admiral", "Sts": "saints", "Fr": "father",
}  # fmt: skip

AFTER_NAME: Final = {
    "St": "street", "Ave": "avenue", "Blvd": "boulevard", "Rd": "road", "Ln": "lane", "Sq":
    "square", "Ct": "court", "Hwy": "highway", "Pl": "place", "Dr": "drive", "Pkwy": "parkway",
    "Co": "company", "Mt": "mountain",
}  # fmt: skip

WEB_SIGNS: Final = {
    ".": "dot", "/": "slash", "@": "at", "_": "underscore", "-": "dash", "?": "question mark",
    "=": "equals", "&": "and", ":": "colon", "#": "hash", "%": "percent", "+": "plus",
    "~": "tilde", ",": "comma", ";": "semicolon", "!": "exclamation mark", "*": "star",
    "$": "dollar", "'": "apostrophe",
}  # fmt: skip

PLURALS: Final = {"inch": "inches", "foot": "feet"}

MONTHS: Final = {
    "Jan": "January", "Feb": "February", "Apr": "April", "Aug": "August", "Sep": "September",
    "Oct": "October", "Nov": "November", "Dec": "December",
}  # fmt: skip

DAYS: Final = {
    "Mon": "Monday", "Tue": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday", "Fri": "Friday",
    "Sat": "Saturday", "Sun": "Sunday",
}  # fmt: skip

BEFORE_ANSWER: Final = re.compile(
    r"\b(?:said|says?|saying|answer(?:s|ed)?|repl(?:y|ies|ied)|yes or|tell \w+|told \w+|"
    r"(?:answer|reply|response|vote) (?:is|was))\s$",
    re.IGNORECASE,
)
"""What makes of "no." an answer, even before a number. "She is no. 1" is a number."""
