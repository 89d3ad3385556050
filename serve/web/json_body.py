"""JSON bodies of requests, parsed within bounds: few values, no repeated names, no `NaN`.

`json.loads` makes a Python object of every value, a hundred times the bytes they take in a body of
many small ones, and holds the interpreter meanwhile. So the values are counted before, without
making any: a body with more of them than a request can have is refused after its first few hundred.
"""

import json
from json import decoder
from typing import Any

MAX_JSON_VALUES = 256
"""Strings, list entries and members that a body may have: several times what a request needs."""

MAX_ECHO_CHARACTERS = 200
"""Characters of a request that an error message may repeat."""


class JsonError(ValueError):
    """A body that is no acceptable JSON object; `param` is the field, if one is at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def shorten(text: str) -> str:
    """At most `MAX_ECHO_CHARACTERS` of a text that comes from a request, for a message. Half of a
    surrogate pair, which no response could carry, is escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_ECHO_CHARACTERS else f"{text[: MAX_ECHO_CHARACTERS - 3]}..."


def parse_json_object(data: bytes) -> dict[str, Any]:
    """The members of a JSON object. Raises JsonError, in time proportional to `data` and memory of
    a few times its size."""
    text = _decode(data)
    _check_number_of_values(text)
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse_constant)
    except JsonError:
        raise
    except ValueError as error:  # of JSON's syntax, or a number of more than 4300 digits
        raise JsonError(f"the body is not JSON: {shorten(str(error))}") from error
    if not isinstance(value, dict):
        raise JsonError(f"the body must be a JSON object, not {_kind(value)}")
    return value


def _decode(data: bytes) -> str:
    if not data.strip():
        raise JsonError("the body is empty: send a JSON object")
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise JsonError(f"the body is not text in UTF-8: byte {error.start} is wrong") from error


def _check_number_of_values(text: str) -> None:
    """Raises JsonError for more than `MAX_JSON_VALUES` values, before any is made.

    Outside of strings, a comma or an opening bracket begins a value; Python's own scanner finds
    the strings' ends.
    """
    n_values = position = 0
    while (start := text.find('"', position)) >= 0:
        n_values += 1 + _count_values(text, position, start)
        if n_values > MAX_JSON_VALUES:
            break
        try:
            _, position = decoder.scanstring(text, start + 1)  # type: ignore[attr-defined]
        except ValueError as error:
            raise JsonError(f"the body is not JSON: {shorten(str(error))}") from error
    else:
        n_values += _count_values(text, position, len(text))
    if n_values > MAX_JSON_VALUES:
        raise JsonError(f"the body has more than {MAX_JSON_VALUES} values: send fewer fields")


def _count_values(text: str, start: int, end: int) -> int:
    return sum(text.count(sign, start, end) for sign in ",[{")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"{shorten(name)}: given twice", shorten(name))
    return members


def _refuse_constant(name: str) -> None:
    raise JsonError(f"the body is not JSON: {name} is no number")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
