"""Options that several benchmarks share, and the endpoint that they measure."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from valle.jobs.starter_voices import make_starter_voices
from valle.platform import registry, settings, storage
from valle.serve.app_args import AppArgs


def build_parser(description: str | None, *, serves: bool = False) -> argparse.ArgumentParser:
    """A parser with `--model`, and with `--port` where the benchmark starts an endpoint."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    if serves:
        parser.add_argument("--port", type=int, default=8100, help="port of the endpoint")
    return parser


def endpoint_args(model: str, **fields: Any) -> AppArgs:
    """Arguments of an endpoint with the two starter voices, which are recorded if there are none.

    The model is pinned to a version: a new champion does not change what is being measured.
    """
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    return AppArgs(model=registry.pin(storage.absolute(model)), voices=voices, **fields)


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report as JSON on the standard output."""
    print(json.dumps(report, indent=2), flush=True)
