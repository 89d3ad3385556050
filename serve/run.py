"""`make serve`: an embedded Ray, the endpoint on a port, until Ctrl-C."""

import argparse
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray import serve

from valle.platform import registry, storage
from valle.platform.cluster import connect
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs
from valle.serve.deployments.handles import APP_NAME


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
    """Deploys the application, or replaces the one that runs; returns when it is ready."""
    serve.run(build_app(args), name=APP_NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the champion until SIGINT or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--voices", default="data/voices", help="folder of reference recordings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    arguments = parser.parse_args(argv)
    try:
        # a missing model fails before Ray starts
        registry.resolve(arguments.model, allow_cached=True)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    voices = storage.absolute(arguments.voices)
    if not any(True for _ in storage.list_files(voices, (".wav",))):
        logging.warning("no voices in %s: put a wav there, or `valle.jobs.starter_voices`", voices)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    args = AppArgs(model=arguments.model, voices=voices)
    with connect(), endpoint(args, arguments.port, arguments.host) as url:
        logging.getLogger("ray.serve").warning(
            "POST %s/v1/audio/speech with a voice of %s, documentation at %s/docs, Ctrl-C stops",
            url,
            voices,
            url,
        )
        stop.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
