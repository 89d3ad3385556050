"""Dictionaries read from YAML or JSON as dataclasses, strictly."""

from collections.abc import Mapping
from typing import Any, TypeVar

import dacite

T = TypeVar("T")

_STRICT = dacite.Config(strict=True, cast=[tuple, float])
"""Unknown keys are errors. YAML and JSON know lists, not tuples, and write 1.0 as 1."""


def from_dict(schema: type[T], values: Mapping[str, Any]) -> T:
    """`values` as an instance of the dataclass `schema`, nested dataclasses included.

    Raises dacite.DaciteError for unknown or missing keys and wrong types, and whatever the
    dataclass raises for values out of range.
    """
    return dacite.from_dict(schema, values, _STRICT)
