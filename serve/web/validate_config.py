"""Reads a Serve configuration strictly, before a cluster does so leniently.

python -m valle.serve.web.validate_config serve/config.yaml
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from valle.serve.app_args import AppArgs

APP_IMPORT_PATH = "valle.serve.app:build_app"


def config_errors(content: object) -> Iterator[str]:
    """What is wrong with a configuration, a line each; nothing if it is right."""
    if not isinstance(content, dict):
        yield "not a mapping"
        return
    unknown = list(_unknown(content, ServeDeploySchema, ""))
    yield from unknown
    try:
        schema = ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        yield from _lines(error, "")
        return
    for number, app in enumerate(schema.applications):
        if app.import_path == APP_IMPORT_PATH:
            try:
                AppArgs.model_validate(app.args)
            except ValidationError as error:
                yield from _lines(error, f"applications.{number}.args.")


def _unknown(values: dict[str, Any], schema: type[BaseModel], where: str) -> Iterator[str]:
    """Keys that the schema, or one inside it, does not have."""
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in schema.model_fields:
            fields = ", ".join(sorted(schema.model_fields))
            yield f"{name}: no such key; known: {fields}"
            continue
        inner = _inner(schema.model_fields[key].annotation)
        if inner is None:
            continue
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries):
            if isinstance(entry, dict):
                position = f"{number}." if isinstance(value, list) else ""
                yield from _unknown(entry, inner, f"{name}.{position}")


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The schema of a field that holds one, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _inner(part))), None)


def _lines(error: ValidationError, where: str) -> Iterator[str]:
    for entry in error.errors():
        yield f"{where}{'.'.join(map(str, entry['loc']))}: {entry['msg']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see above; the exit status is 1 for a file with problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="YAML for `serve deploy` or `serve run`")
    arguments = parser.parse_args(argv)
    errors = list(config_errors(yaml.safe_load(arguments.file.read_text())))
    print("\n".join(errors) or f"{arguments.file}: nothing wrong")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
