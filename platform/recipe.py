"""A section of a recipe as a typed, validated dataclass.

A recipe is one YAML file with a section per job (`corpus:`, `prepare:`, `train:` ...), and each job
defines the dataclass of its section. `parse_section` fails for unknown keys, wrong types and values
out of range, and names the field. Paths in fields marked with `location` become absolute here,
on the driver: a worker reads the same files whatever its current folder.
"""

import dataclasses
import sys
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import dacite
import docstring_parser
import yaml

from valle.platform import storage
from valle.platform.bundle import BundleError
from valle.platform.registry_client import MissingModelError, RegistryUnavailableError
from valle.platform.typed import from_dict

Section = TypeVar("Section")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the field."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turns an error of the recipe, or of the model that it names, inside the block into a message
    on stderr and exit status 2."""
    try:
        yield
    except (RecipeError, MissingModelError, RegistryUnavailableError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the user of a command reads it
        raise SystemExit(2) from error


def formerly(*names: str) -> dict[str, Any]:
    """Metadata of a renamed field: a recipe with a former name fails with the present one.

    `batch_size: int = field(default=8, metadata=formerly("batch"))`
    """
    return {"formerly": names}


def location(*, names: Collection[str] = ()) -> dict[str, Any]:
    """Metadata of a field that holds a path or URI, or several in a tuple or dictionary.

    `parse_section` makes it absolute by `storage.absolute`; values among `names` are no paths.
    Combined with `formerly`: `metadata=location() | formerly("storage")`.
    """
    return {"location": frozenset(names)}


def parse_section(
    content: Mapping[str, Any],
    section: str,
    schema: type[Section],
    overrides: Sequence[str] = (),
    *,
    source: str,
) -> Section:
    """The section of a parsed recipe as its dataclass, with absolute paths.

    `overrides` (`key=value`) replace fields; dots reach nested groups (`model.width=128`).
    `source` names the recipe in messages. Raises RecipeError.
    """
    values = content.get(section)
    if values is None:
        raise RecipeError(f"{source} has no section {section!r}")
    for override in overrides:
        _override(values, override)
    if renamed := _find_renamed(schema, values, section):
        raise RecipeError(f"{source}: {renamed}")
    try:
        return resolve_paths(from_dict(schema, values))
    except dacite.WrongTypeError as error:
        reason = str(error)
        if get_origin(error.field_type) is Literal:
            reason = f"{error.field_path}: {error.value!r} is none of {get_args(error.field_type)}"
        raise RecipeError(f"{source}, section {section}: {reason}") from error
    except dacite.UnexpectedDataError as error:
        hint = "".join(_find_in_groups(schema, key) for key in sorted(error.keys))
        raise RecipeError(f"{source}, section {section}: {error}{hint}") from error
    except (dacite.DaciteError, ValueError) as error:
        raise RecipeError(f"{source}, section {section}: {error}") from error


def resolve_paths(section: Section) -> Section:
    """A copy of a dataclass in which every field marked with `location` is absolute.

    Applies to nested dataclasses too, and changes nothing the second time.
    """
    fields = dataclasses.fields(section)  # type: ignore[arg-type]  # a dataclass
    changes = {
        field.name: _resolve(getattr(section, field.name), field.metadata.get("location"))
        for field in fields
    }
    return dataclasses.replace(section, **changes)  # type: ignore[type-var]  # a dataclass


def _resolve(value: Any, names: Collection[str] | None) -> Any:
    """The value of a field with absolute paths; `names` is None for a field without paths."""
    if isinstance(value, tuple | list):
        return type(value)(_resolve(entry, names) for entry in value)
    if isinstance(value, dict):
        return {key: _resolve(entry, names) for key, entry in value.items()}
    if dataclasses.is_dataclass(value):
        return resolve_paths(value)
    return storage.absolute(value, names) if isinstance(value, str) and names is not None else value


def field_help(schema: type[Any], prefix: str = "") -> str:
    """One entry per field: name, type, default and the docstring under it."""
    parsed = docstring_parser.parse_from_object(schema)
    descriptions = {param.arg_name: param.description or "" for param in parsed.params}
    entries = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            entries.append(field_help(field.type, f"{name}."))
            continue
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        default = "" if field.default is dataclasses.MISSING else f", default {field.default!r}"
        text = textwrap.fill(" ".join(descriptions.get(field.name, "").split()), 92)
        entries.append(f"  {name} ({kind}{default})\n{textwrap.indent(text, '      ')}")
    return "\n".join(entries)


def _override(values: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` inside nested dictionaries; the value is parsed as YAML."""
    key, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"expected key=value, got {override!r}")
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key}: {part} is not a group of settings")
    values[last] = yaml.safe_load(text)


def _find_renamed(schema: Any, value: Any, name: str) -> str:
    """A message for the first key in `value` that is a former name of a field of `schema`; else
    empty. `name` is the path of `value` in the recipe.

    Searches groups, lists, mappings and optional values.
    """
    if dataclasses.is_dataclass(schema):
        if not isinstance(value, dict):
            return ""
        fields = dataclasses.fields(schema)
        present = {field.name for field in fields}
        for field in fields:
            for old in field.metadata.get("formerly", ()):
                if old in value and old not in present:
                    return f"{name}.{old} is called {field.name} now"
        parts = [
            (field.type, value[field.name], f"{name}.{field.name}")
            for field in fields
            if field.name in value
        ]
    elif get_origin(schema) in (Union, types.UnionType):
        parts = [(option, value, name) for option in get_args(schema)]
    elif isinstance(value, dict):
        parts = [(t, value[key], f"{name}.{key}") for key in value for t in get_args(schema)]
    elif isinstance(value, list):
        parts = [(t, v, f"{name}[{i}]") for i, v in enumerate(value) for t in get_args(schema)]
    else:
        return ""
    return next((message for part in parts if (message := _find_renamed(*part))), "")


def _find_in_groups(schema: type[Any], key: str) -> str:
    """A hint that names the groups of settings of `schema` with a field `key`; else empty."""
    groups = [field for field in dataclasses.fields(schema) if dataclasses.is_dataclass(field.type)]
    names = [
        f"{group.name}.{field.name}"
        for group in groups
        for field in dataclasses.fields(group.type)  # type: ignore[arg-type]  # a dataclass
        if field.name == key
    ]
    return f"; did you mean {' or '.join(names)}?" if names else ""
