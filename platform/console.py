"""Separates a command's own lines, on the terminal, from the output of libraries, in a log file.

Ray, Ray Serve and MLflow log dozens of lines at a start, among which the command's own are lost.
Inside `quiet` the terminal shows what the main thread prints, progress bars, and the project's
warnings. Everything else goes to the log file, the output of Ray's workers included.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from valle.platform import settings


class RoutedStream(io.TextIOBase):
    """Takes the place of `sys.stdout` or `sys.stderr` inside `quiet`.

    With `shows_prints`, what the main thread writes is shown; otherwise all is logged. Other
    threads, such as the one by which Ray repeats its workers' output, write to the log.
    """

    def __init__(self, terminal: TextIO, log: TextIO, *, shows_prints: bool) -> None:
        self.terminal = terminal
        self._log = log
        self._shows_prints = shows_prints

    def release(self, stream: TextIO) -> None:
        """Sends everything to `stream` from now on, for libraries that keep this object after the
        block."""
        self.terminal = self._log = stream

    def write(self, text: str) -> int:
        return self._stream().write(text)

    def flush(self) -> None:
        self._stream().flush()

    def isatty(self) -> bool:
        return self._shows_prints and self.terminal.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Descriptor of the log file, to which a library may write directly."""
        return self._log.fileno()

    def _stream(self) -> TextIO:
        shown = self._shows_prints and threading.current_thread() is threading.main_thread()
        return self.terminal if shown else self._log


def terminal() -> TextIO:
    """The stream for progress and warnings: stderr; inside `quiet`, the stderr from before."""
    stream: TextIO = sys.stderr
    return stream.terminal if isinstance(stream, RoutedStream) else stream


@contextmanager
def quiet(name: str, *, verbose: bool = False) -> Iterator[Path | None]:
    """Sends the output of libraries to `logs/{name}-{time}.log` in `VALLE_HOME` during the block;
    yields the file's path. With `verbose` nothing is redirected, and None is yielded.

    File descriptors 1 and 2 are the log too, for processes that are started meanwhile.
    """
    if verbose:
        yield None
        return
    path = settings.read().home / "logs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = sys.stdout, sys.stderr
    saved = os.dup(1), os.dup(2)
    with (
        path.open("a", buffering=1) as log,
        os.fdopen(saved[0], "w", buffering=1, closefd=False) as out,
        os.fdopen(saved[1], "w", buffering=1, closefd=False) as errors,
    ):
        handler = _ShownWarnings(errors)
        logging.getLogger("valle").addHandler(handler)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = RoutedStream(out, log, shows_prints=True)
        sys.stderr = RoutedStream(errors, log, shows_prints=False)
        try:
            yield path
        finally:
            for routed, stream in zip((sys.stdout, sys.stderr), before, strict=True):
                if isinstance(routed, RoutedStream):
                    routed.release(stream)
            sys.stdout, sys.stderr = before
            logging.getLogger("valle").removeHandler(handler)
            for stream in (out, errors):  # what has no line end yet; their descriptors close below
                stream.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


class _ShownWarnings(logging.StreamHandler[TextIO]):
    """Shows the project's warnings and errors as plain lines."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setLevel(logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"
