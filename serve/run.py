"""`make serve`: an embedded Ray, the endpoint on a port, until Ctrl-C."""

import argparse
import logging
import signal
import threading
from collections.abc import Sequence

from valle.platform import registry, storage
from valle.platform.cluster import connect
from valle.serve.app import build_app
from valle.serve.web.schema import AppArgs


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the champion; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--voices", default="data/voices", help="folder of reference recordings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    arguments = parser.parse_args(argv)
    if arguments.model == registry.CHAMPION and (version := registry.publish_shipped()):
        logging.warning("the registry was empty: version %d is the model shipped here", version)
    try:
        registry.resolve(arguments.model)  # a missing model is better noticed before Ray starts
    except FileNotFoundError as error:
        parser.exit(2, f"error: {error}\n")
    voices = storage.absolute(arguments.voices)
    if not any(True for _ in storage.list_files(voices, (".wav",))):
        logging.warning("no voices in %s: put a wav there, or `valle.jobs.starter_voices`", voices)
    from ray import serve

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with connect():
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        app = build_app(AppArgs(model=arguments.model, voices=voices))
        serve.run(app, name="valle")
        url = f"http://{arguments.host}:{arguments.port}"
        logging.getLogger("ray.serve").warning(
            "POST %s/v1/audio/speech with a voice of %s, documentation at %s/docs, Ctrl-C stops",
            url, voices, url,
        )  # fmt: skip
        stop.wait()
        serve.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
