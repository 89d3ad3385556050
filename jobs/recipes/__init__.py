"""The recipes in this folder, and the command line of every job that runs one.

`--recipe NAME key=value ...`: NAME is a file of this folder, without its ending, or a path to YAML.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from valle.platform.recipe import RecipeError, Section, field_help, parse_section

RECIPES = Path(__file__).parent
SECTIONS = (
    "corpus", "select_speakers", "prepare", "train_codec", "train_quantizer", "train", "evaluate",
    "publish", "export", "synthesize",
)  # fmt: skip
"""What a recipe may hold: a section is named after its job."""

RENAMED_SECTIONS = {"codec": "train_codec", "quantizer": "train_quantizer"}
"""Former name of a section: its name now."""


def recipe_names() -> list[str]:
    """Names of the recipes in this folder."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str, section: str, schema: type[Section], overrides: Sequence[str] = ()) -> Section:
    """A section of a recipe, by the recipe's name or path, as its dataclass; see `parse_section`.

    Raises RecipeError for a missing recipe and for unknown sections, other jobs' included.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}: {_choices()}")
    content: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    for old in sorted(set(content) & set(RENAMED_SECTIONS)):
        raise RecipeError(f"{path.name}: section {old} is called {RENAMED_SECTIONS[old]} now")
    if unknown := sorted(set(content) - set(SECTIONS)):
        raise RecipeError(f"{path.name}: unknown section {unknown[0]!r}; known: {SECTIONS}")
    return parse_section(content, section, schema, overrides, source=path.name)


def parse_arguments(
    argv: Sequence[str] | None, section: str, schema: type[Section], description: str
) -> Section:
    """The recipe's section that a command line names.

    `--help` lists the fields of the section with their types, defaults and docstrings. A missing
    or bad recipe ends the program with the reason and status 2.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s --recipe NAME [key=value ...]",
        description=description,
        epilog=f"fields of the section `{section}`:\n\n{field_help(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help=_choices())
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    arguments = parser.parse_intermixed_args(argv)
    # no default: `valle publish` alone must not promote a demonstration's models
    if arguments.recipe is None:
        parser.error(f"--recipe is required: {_choices()}")
    try:
        return load(arguments.recipe, section, schema, arguments.overrides)
    except RecipeError as error:
        parser.exit(2, f"error: {error}\n")


def _choices() -> str:
    return f"give a path to YAML, or one of: {', '.join(recipe_names())}"
