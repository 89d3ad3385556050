"""Validates a Serve configuration strictly; Serve itself ignores keys that it does not know.
An endpoint that other machines reach without API keys is an error here, as in deployment.

    valle validate-config serve/config.yaml
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from valle.serve.app_args import AppArgs
from valle.serve.web.exposure import exposure_error, key_file_error, node_local_fields

APP_IMPORT_PATH = "valle.serve.app:build_app"


def config_errors(content: object) -> Iterator[str]:
    """Errors of a parsed configuration, one line each."""
    if not isinstance(content, dict):
        yield "the configuration is not a mapping"
        return
    yield from _unknown_keys(content, ServeDeploySchema, "")
    try:
        schema = ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        yield from _lines(error, "")
        return
    host = _host(schema)
    for number, app in enumerate(schema.applications):
        if app.import_path == APP_IMPORT_PATH:
            prefix = f"applications.{number}.args."
            try:
                args = AppArgs.model_validate(app.args)
            except ValidationError as error:
                yield from _lines(error, prefix)
                continue
            if reason := exposure_error(host, args) or key_file_error(args):
                yield f"{prefix}{reason}"


def config_warnings(content: object) -> Iterator[str]:
    """What is dangerous in a configuration without errors: fields that name files of one machine,
    for an endpoint on every node."""
    schema = ServeDeploySchema.model_validate(content)
    if ProxyLocation._normalize(schema.proxy_location) != ProxyLocation.EveryNode:
        return
    for number, app in enumerate(schema.applications):
        if app.import_path == APP_IMPORT_PATH:
            for line in node_local_fields(AppArgs.model_validate(app.args)):
                yield f"applications.{number}.args.{line} (proxy_location: EveryNode)"


def _host(schema: ServeDeploySchema) -> str | None:
    """Address that the proxies listen on; None for no proxies. Serve's default, where the
    configuration has none, is every interface."""
    if ProxyLocation._normalize(schema.proxy_location) == ProxyLocation.Disabled:
        return None
    return schema.http_options.host


def _unknown_keys(values: dict[str, Any], schema: type[BaseModel], prefix: str) -> Iterator[str]:
    """Errors for keys that the schema, or a nested one, does not have."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in schema.model_fields:
            fields = ", ".join(sorted(schema.model_fields))
            yield f"{name}: no such key; known: {fields}"
            continue
        nested = _nested_schema(schema.model_fields[key].annotation)
        if nested is None:
            continue
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries):
            if isinstance(entry, dict):
                position = f"{number}." if isinstance(value, list) else ""
                yield from _unknown_keys(entry, nested, f"{name}.{position}")


def _nested_schema(annotation: Any) -> type[BaseModel] | None:
    """The schema of a field's value or of its list entries; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    schemas = (_nested_schema(part) for part in get_args(annotation))
    return next((schema for schema in schemas if schema is not None), None)


def _lines(error: ValidationError, prefix: str) -> Iterator[str]:
    for entry in error.errors():
        yield f"{prefix}{'.'.join(map(str, entry['loc']))}: {entry['msg']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Validates a file; returns the exit status, 1 for a file with errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="YAML for `serve deploy` or `serve run`")
    arguments = parser.parse_args(argv)
    content = yaml.safe_load(arguments.file.read_text())
    if errors := list(config_errors(content)):
        print("\n".join(errors))
        return 1
    for line in config_warnings(content):
        print(f"warning: {line}")
    print(f"{arguments.file}: valid")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
