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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite
import docstring_parser
import yaml

from valle.platform.cluster import CODE_ROOT

RECIPES = CODE_ROOT / "jobs" / "recipes"
SECTIONS = (
    "corpus", "select_speakers", "prepare", "codec", "quantizer", "train", "evaluate", "publish",
    "export", "synthesize",
)  # fmt: skip

Section = TypeVar("Section")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the field."""


@contextmanager
def reported() -> Iterator[None]:
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
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name!r}: give a path to YAML, or one of: {known}")
    content = yaml.safe_load(path.read_text()) or {}
    if unknown := sorted(set(content) - set(SECTIONS)):
        raise RecipeError(f"{path.name}: unknown section {unknown[0]!r}; known: {SECTIONS}")
    values = content.get(section)
    if values is None:
        raise RecipeError(f"{path.name} has no section {section!r}")
    for override in overrides:
        _override(values, override)
    try:
        return dacite.from_dict(schema, values, dacite.Config(strict=True, cast=[tuple, float]))
    except dacite.WrongTypeError as error:
        wrong = str(error)
        if get_origin(error.field_type) is Literal:
            wrong = f"{error.field_path}: {error.value!r} is none of {get_args(error.field_type)}"
        raise RecipeError(f"{path.name}, section {section}: {wrong}") from error
    except dacite.UnexpectedDataError as error:
        hint = "".join(_where(schema, key) for key in sorted(error.keys))
        raise RecipeError(f"{path.name}, section {section}: {error}{hint}") from error
    except dacite.DaciteError as error:
        raise RecipeError(f"{path.name}, section {section}: {error}") from error
    except ValueError as error:
        raise RecipeError(f"{path.name}, section {section}: {error}") from error


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
        epilog=f"fields of the section `{section}`:\n\n{describe(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="demo", help="name in jobs/recipes, or path to YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    arguments = parser.parse_args(argv)
    try:
        return load(arguments.recipe, section, schema, arguments.overrides)
    except RecipeError as error:
        parser.exit(2, f"error: {error}\n")


def describe(schema: type[Any], prefix: str = "") -> str:
    """One entry per field: name, type, default and the docstring under it."""
    parsed = docstring_parser.parse_from_object(schema)
    texts = {p.arg_name: p.description or "" for p in parsed.params}
    lines = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            lines.append(describe(field.type, f"{name}."))
            continue
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        given = "" if field.default is dataclasses.MISSING else f", default {field.default!r}"
        text = textwrap.fill(" ".join(texts.get(field.name, "").split()), 92)
        lines.append(f"  {name} ({kind}{given})\n{textwrap.indent(text, '      ')}")
    return "\n".join(lines)
