"""Serves a model over HTTP until Ctrl-C, on a Ray of its own or on the cluster at `RAY_ADDRESS`.

The model is the registry's champion, another model of the registry, or a bundle folder.
"""

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray import serve

from valle.platform import console, registry, storage
from valle.platform.cluster import connect
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs
from valle.serve.deployments.handles import APP_NAME
from valle.serve.ready import find_reason, ready_message
from valle.serve.web.callers import Caller
from valle.serve.web.exposure import exposure_error, key_file_error, refuse_exposure
from valle.serve.web.voices import VoiceStore


class StartError(RuntimeError):
    """An endpoint that did not start; the message is the cause."""


@contextmanager
def endpoint(args: AppArgs, port: int, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on the connected cluster while the block runs; yields the base URL, without a slash
    at its end. Ray stays connected, all of Serve is shut down."""
    refuse_exposure(host, args)
    serve.start(http_options={"host": host, "port": port})
    try:
        deploy(args)
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        serve.shutdown()


def deploy(args: AppArgs) -> None:
    """Deploys the application, or replaces the one that runs; returns when it is ready.

    Raises StartError with the cause when a replica does not start.
    """
    app = build_app(args)
    try:
        serve.run(app, name=APP_NAME)
    except RuntimeError as error:
        raise StartError(find_reason(str(error))) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the champion until SIGINT or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--voices", default="data/voices", help="folder of reference recordings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--api-keys", help="file of API keys; without it or --open, only a loopback --host"
    )
    parser.add_argument(
        "--open",
        action="store_true",
        help="allow any --host without keys: everybody may add, use and delete voices",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        help="web origin whose pages may use the endpoint, as https://chat.example.com; repeatable",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        help="host name by which clients reach the endpoint (`Host`); repeatable",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the log of Ray and Ray Serve on the terminal"
    )
    arguments = parser.parse_args(argv)
    args = AppArgs(
        model=arguments.model,
        voices=storage.absolute(arguments.voices),
        api_keys=arguments.api_keys,
        open=arguments.open,
        allow_origins=tuple(arguments.allow_origin),
        allowed_hosts=tuple(arguments.allow_host),
    )
    if reason := exposure_error(arguments.host, args) or key_file_error(args):
        parser.exit(2, f"error: {reason}\n")
    try:
        # a missing model fails before Ray starts
        registry.resolve(arguments.model, allow_cached=True)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if not any(True for _ in storage.list_files(args.voices, (".wav", ".flac"))):
        logging.warning(
            "no voices in %s: put a wav there, or run `valle starter-voices`", args.voices
        )

    return _serve(args, arguments.host, arguments.port, verbose=arguments.verbose)


def _serve(args: AppArgs, host: str, port: int, *, verbose: bool) -> int:
    """Serves until a signal, saying what happens; returns the exit status."""
    stop, ready = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        if stop.is_set():
            return  # a second Ctrl-C does not tear the shutdown apart
        stop.set()
        if not ready.is_set():
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    started = time.monotonic()
    reason, log = "", None
    try:
        with console.quiet("serve", verbose=verbose) as log:
            print(f"starting {args.model} on http://{host}:{port} (half a minute) ...", flush=True)
            with connect(), endpoint(args, port, host) as url:
                ready.set()
                message = ready_message(
                    url, model=_describe_model(args.model), voices=_voice_names(args.voices),
                    voices_folder=args.voices, has_keys=bool(args.api_keys),
                    seconds=time.monotonic() - started, log=log,
                )  # fmt: skip
                print(message, flush=True)
                stop.wait()
                print("stopping ...", flush=True)
    except KeyboardInterrupt:
        print("stopped before it was ready")
        return 130
    except (StartError, OSError, ValueError) as error:
        if ready.is_set():
            raise
        reason = str(error)
    if reason:
        hint = f"\nlog: {log}" if log else ""
        print(f"error: the endpoint did not start: {reason}{hint}", file=sys.stderr)
        return 1
    print("stopped")
    return 0


def _describe_model(model: str) -> str:
    """The model's URI; for an alias, also the version that it points to, as `X-Model` has it."""
    pinned = registry.pin(model, allow_cached=True, announce=False)
    return model if pinned == model else f"{model} (now {registry.display_name(pinned)})"


def _voice_names(voices: str) -> list[str]:
    """Names of the shared voices. Voices that belong to a key are not shown."""
    return VoiceStore(voices).ids(Caller(all_voices=False))


if __name__ == "__main__":
    raise SystemExit(main())
