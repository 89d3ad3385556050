"""Lines of text files with BOMs, CRLF, UTF-16 or bytes that are not UTF-8.

Lines end at `\\n` only. `str.splitlines` also splits at U+2028, U+0085 and others, which JSON
strings and texts may hold.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes) -> str:
    """The text of a UTF-8 file, or of a UTF-16 file with a BOM. Raises UnicodeDecodeError."""
    return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig")


def read_lines(data: bytes) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yields each line that is not blank with its number, counted from 1, without its end.

    A line that is not UTF-8 is yielded as its error. Raises UnicodeDecodeError for a damaged UTF-16
    file.
    """
    if data.startswith(_UTF_16):
        data = decode_text(data).encode("utf-8", "surrogatepass")
    data = data.removeprefix(codecs.BOM_UTF8)
    end = b"\n" if b"\n" in data else b"\r"
    for number, line in enumerate(data.split(end), 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            yield number, error
            continue
        if text.strip():
            yield number, text


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object in a line. Raises ValueError for anything else, and for a repeated key."""
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)}, a JSON object is needed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)}: the key is there twice")
    return values


def string_field(row: dict[str, Any], name: str, *, numbers: bool = False) -> str:
    """A field that must be a string; with `numbers`, whole numbers become one.

    Raises ValueError, which names the field, for a missing, null, blank or other value, and for a
    string that UTF-8 cannot encode.
    """
    if name not in row:
        raise ValueError(f"{name}: missing")
    value = row[name]
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}: {kind_of(value)}, a string is needed")
    if not value.strip():
        raise ValueError(f"{name}: empty")
    if "\0" in value or not is_utf8(value):
        raise ValueError(f"{name}: holds a zero byte or half a surrogate pair")
    return value


def is_utf8(text: str) -> bool:
    """False for a text with a lone surrogate: half a character, or bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return "null" if value is None else names.get(type(value), "object")
