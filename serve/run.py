"""`make serve`: an embedded Ray, the endpoint on a port, until Ctrl-C."""

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


class StartError(RuntimeError):
    """An endpoint that did not start; the message is the cause."""


@contextmanager
def endpoint(args: AppArgs, port: int, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on the connected cluster while the block runs; yields the base URL, without a slash
    at its end. Ray stays connected, all of Serve is shut down."""
    serve.start(http_options={"host": host, "port": port})
    try:
        deploy(args)
        yield f"http://{host}:{port}"
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
        "--verbose", action="store_true", help="show the log of Ray and Ray Serve on the terminal"
    )
    arguments = parser.parse_args(argv)
    try:
        # a missing model fails before Ray starts
        registry.resolve(arguments.model, allow_cached=True)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    voices = storage.absolute(arguments.voices)
    if not any(True for _ in storage.list_files(voices, (".wav",))):
        logging.warning("no voices in %s: put a wav there, or `valle.jobs.starter_voices`", voices)

    args = AppArgs(model=arguments.model, voices=voices)
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
    """The model's URI, and of an alias the version that it is now."""
    pinned = registry.pin(model, allow_cached=True, announce=False)
    return model if pinned == model else f"{model} (now {pinned})"


def _voice_names(voices: str) -> list[str]:
    return [name.removesuffix(".wav") for name in storage.list_files(voices, (".wav",))]


if __name__ == "__main__":
    raise SystemExit(main())
