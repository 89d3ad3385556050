"""A run as typed, validated YAML.

A recipe is one YAML file with a section per job (`corpus:`, `prepare:`, `train:` ...). Each job
owns the dataclass of its section and reads it with `load`; unknown keys, wrong types and values
out of range fail with the name of the field. `key=value` arguments override fields of the
section; dots go deeper (`model.width=128`).
"""

import argparse
import dataclasses
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import dacite
import docstring_parser
import yaml

from valle.platform.cluster import CODE_ROOT

RECIPES = CODE_ROOT / "jobs" / "recipes"
SECTIONS = (
    "corpus", "select_speakers", "prepare", "train_codec", "train_quantizer", "train", "evaluate",
    "publish", "export", "synthesize",
)  # fmt: skip
RENAMED_SECTIONS = {"codec": "train_codec", "quantizer": "train_quantizer"}
"""Former name of a section: its name now."""

Section = TypeVar("Section")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the field."""


def formerly(*names: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a renamed field: a recipe that uses a former name fails with the present one.

    `batch_size: int = field(default=8, metadata=formerly("batch"))`
    """
    return {"formerly": names}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Inside, a recipe that cannot be run ends the program with the reason and status 2."""
    try:
        yield
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # for whoever typed the command
        raise SystemExit(2) from error


def load(name: str, section: str, schema: type[Section], overrides: Sequence[str] = ()) -> Section:
    """The section of a recipe (a name in `jobs/recipes`, or a path to YAML) as its dataclass."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name!r}: give a path to YAML, or one of: {names}")
    content = yaml.safe_load(path.read_text()) or {}
    for old in sorted(set(content) & set(RENAMED_SECTIONS)):
        raise RecipeError(f"{path.name}: section {old} is called {RENAMED_SECTIONS[old]} now")
    if unknown := sorted(set(content) - set(SECTIONS)):
        raise RecipeError(f"{path.name}: unknown section {unknown[0]!r}; known: {SECTIONS}")
    values = content.get(section)
    if values is None:
        raise RecipeError(f"{path.name} has no section {section!r}")
    for override in overrides:
        _override(values, override)
    if renamed := _renamed(schema, values, section):
        raise RecipeError(f"{path.name}: {renamed}")
    try:
        return dacite.from_dict(schema, values, dacite.Config(strict=True, cast=[tuple, float]))
    except dacite.WrongTypeError as error:
        reason = str(error)
        if get_origin(error.field_type) is Literal:
            reason = f"{error.field_path}: {error.value!r} is none of {get_args(error.field_type)}"
        raise RecipeError(f"{path.name}, section {section}: {reason}") from error
    except dacite.UnexpectedDataError as error:
        hint = "".join(_where(schema, key) for key in sorted(error.keys))
        raise RecipeError(f"{path.name}, section {section}: {error}{hint}") from error
    except dacite.DaciteError as error:
        raise RecipeError(f"{path.name}, section {section}: {error}") from error
    except ValueError as error:
        raise RecipeError(f"{path.name}, section {section}: {error}") from error


def _renamed(schema: Any, value: Any, name: str) -> str:
    """The first key in `value` that is a former name of a field of `schema`; else empty.

    Groups, lists, mappings and optional values are searched too.
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
    return next((text for part in parts if (text := _renamed(*part))), "")


def _where(schema: type[Any], key: str) -> str:
    """Where an unknown key would have been right: in a group of settings of this section."""
    groups = [field for field in dataclasses.fields(schema) if dataclasses.is_dataclass(field.type)]
    names = [
        f"{group.name}.{field.name}"
        for group in groups
        for field in dataclasses.fields(group.type)  # type: ignore[arg-type]  # a dataclass
        if field.name == key
    ]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _override(values: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` inside nested dictionaries; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"expected key=value, got {override!r}")
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key}: {part} is not a group of settings")
    values[last] = yaml.safe_load(text)


def parse_arguments(
    argv: Sequence[str] | None, section: str, schema: type[Section], description: str
) -> Section:
    """The command line that every job shares: `--recipe NAME key=value ...`.

    `--help` lists the fields of the section with their types, defaults and docstrings. A bad
    recipe ends the program with the reason and status 2.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"fields of the section `{section}`:\n\n{field_help(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="demo", help="name in jobs/recipes, or path to YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    arguments = parser.parse_args(argv)
    try:
        return load(arguments.recipe, section, schema, arguments.overrides)
    except RecipeError as error:
        parser.exit(2, f"error: {error}\n")


def field_help(schema: type[Any], prefix: str = "") -> str:
    """One entry per field: name, type, default and the docstring under it."""
    parsed = docstring_parser.parse_from_object(schema)
    texts = {p.arg_name: p.description or "" for p in parsed.params}
    lines = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            lines.append(field_help(field.type, f"{name}."))
            continue
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        default = "" if field.default is dataclasses.MISSING else f", default {field.default!r}"
        text = textwrap.fill(" ".join(texts.get(field.name, "").split()), 92)
        lines.append(f"  {name} ({kind}{default})\n{textwrap.indent(text, '      ')}")
    return "\n".join(lines)
