"""Addresses of the web and of mail, in the words of their letters and signs."""

import re
from typing import Final

from valle.model.english_numbers import cardinal, digits, letters
from valle.model.english_tables import WEB_SIGNS

_TLD = (
    "com|org|net|edu|gov|mil|int|info|io|ai|app|dev|biz|me|tv|co|uk|us|de|fr|es|it|nl|eu|ch|at|be|"
    "ca|au|nz|jp|cn|in|br|ru|pl|se|no|dk|fi|ie|xyz|cloud|tech|online|site|blog|shop"
)
_PATH = r"(?:[/?#][^\s<>\"')\]]*[^\s<>\"')\].,;:!?])?/?"
WEB: Final = re.compile(
    rf"\b(?:https?|ftp)://[^\s<>\"]*[^\s<>\"')\].,;:!?]|\bwww\.[\w-]+(?:\.[\w-]+)+{_PATH}"
    rf"|(?<![\w+-])(?<!\w\.)[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?<![\w-])(?<!\w\.)(?:[\w-]+\.)+(?:{_TLD})\b(?!\.\w|@){_PATH}",
    re.IGNORECASE,
)


def web_words(match: re.Match[str]) -> str:
    """An address of the web or of mail in words."""
    address = re.sub(r"^\w+://", "", match[0]).rstrip("/")
    if re.search(r"\.[A-Z]", address) and "/" not in address and "@" not in address:
        return match[0]  # "left.In": a space is missing, no address
    words = []
    for part in re.findall(r"[^\W\d_]+|\d+|[^\w\s]|_", address):
        if part.isdecimal():
            words.append(digits(part) if part[0] == "0" or len(part) > 4 else cardinal(part))
        elif part in WEB_SIGNS:
            words.append(WEB_SIGNS[part])
        elif words and words[-1] == "dot" and len(part) == 2 and part not in ("co", "me", "us"):
            words.append(letters(part))  # a country's domain: "uk"
        else:
            words.append("WWW" if part.lower() == "www" else part)
    return " ".join(words)
