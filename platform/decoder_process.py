"""The process in which a `DecoderPool` decodes: `python -m valle.platform.decoder_process`.

It reads requests from its standard input and answers on its standard output until the input ends.
Before the first request it gives up the rights that a decoder does not need: it can then open no
file and no socket, write no file, and use only a given amount of memory. A timer ends the process
during a recording that takes too long, whatever its owner does. Arguments: memory in bytes,
seconds.
"""

import io
import os
import select
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from valle.platform import decoding
from valle.platform.sound_formats import OGG, AudioError

REQUEST = struct.Struct("<BdQ")
"""Operation, `max_seconds`, bytes that follow: a sound file."""
REPLY = struct.Struct("<BIQ")
"""Outcome, sample rate, bytes that follow: float32 samples or text in UTF-8."""
DECODE, COMMENT = 0, 1
"""Operations: samples of a file, or the comment in its header."""
DONE, REFUSED = 0, 1
"""Outcomes: the result, or the reason why there is none."""
READY = b"R"
"""Sent once, when requests are accepted."""
_ORPHAN_CHECK_SECONDS = 5.0


def read_exactly(stream: IO[bytes], size: int) -> bytearray:
    """The next `size` bytes of a pipe. Raises EOFError if it ends before."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]  # a raw file
        if not count:
            raise EOFError("the pipe ended")
        view = view[count:]
    return data


def write_all(stream: IO[bytes], *parts: bytes | memoryview) -> None:
    """Writes everything to a pipe, which may take less at a time."""
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            view = view[stream.write(view) or 0 :]


def main() -> None:
    """Answers requests until the input ends or the owner is gone."""
    memory_bytes, seconds = int(sys.argv[1]), float(sys.argv[2])
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    owner = os.getppid()
    _warm_up()
    with open(os.devnull, "wb") as nothing:  # the libraries print warnings of their own
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    _give_up_rights(memory_bytes)
    replies.write(READY)
    with suppress(EOFError, BrokenPipeError):
        while _wait(requests, owner):
            operation, max_seconds, size = REQUEST.unpack(read_exactly(requests, REQUEST.size))
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process
            outcome, rate, result = _answer(
                operation, max_seconds, bytes(read_exactly(requests, size))
            )
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_all(replies, REPLY.pack(outcome, rate, len(result)), result)


def _answer(operation: int, max_seconds: float, data: bytes) -> tuple[int, int, bytes]:
    try:
        if operation == COMMENT:
            return DONE, 0, decoding.read_comment(data).encode("utf-8", "replace")
        samples, rate = decoding.decode(data, max_seconds)
        return DONE, rate, samples.tobytes()
    except AudioError as error:
        return REFUSED, 0, str(error).encode()


def _wait(requests: IO[bytes], owner: int) -> bool:
    """Waits for a request; False when the owner is gone, even if others hold the pipe's end."""
    while not select.select([requests], [], [], _ORPHAN_CHECK_SECONDS)[0]:
        if os.getppid() != owner:
            return False
    return True


def _warm_up() -> None:
    """Makes the libraries load what they load at their first use, since later no file can be
    opened."""
    for format_name in ("WAV", "OGG"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.zeros(4_000), 8_000, format=format_name)
        decoding.decode(buffer.getvalue(), 1)
        with suppress(AudioError):
            decoding.decode(buffer.getvalue()[:-600], 1)
    data = buffer.getvalue()
    for _ in decoding.read_with_ffmpeg(data, OGG):
        pass
    decoding.read_comment(data)


def _give_up_rights(memory_bytes: int) -> None:
    if sys.platform != "linux":  # elsewhere the limits do not hold; the process still isolates
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for limit, value in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main()
