"""Threads of an ingress replica, in a pool for each kind of work: slow storage, many texts or many
recordings take no thread from the encoders of streams, nor from each other."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from valle.serve.deployments.interface import OverloadedError
from valle.serve.web.voices import DECODERS

P = ParamSpec("P")
T = TypeVar("T")

TEXT_THREADS = 2
"""espeak works on one text at a time."""
STORAGE_THREADS = 16
DECODING_THREADS = 2 * DECODERS
"""A decoder that is free finds the next recording at hand."""
ENCODING_THREADS = 16

MAX_WAITING_RECORDINGS = 32
"""Recordings that may wait for a thread: each of them may take its decoder many seconds."""

# one for each event loop, as anyio keeps its own
_TEXT: RunVar[CapacityLimiter] = RunVar("text")
_STORAGE: RunVar[CapacityLimiter] = RunVar("storage")
_DECODING: RunVar[CapacityLimiter] = RunVar("decoding")
_ENCODING: RunVar[CapacityLimiter] = RunVar("encoding")


async def run_text(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs normalisation and phonemes of a text in a thread."""
    return await _run(_limiter(_TEXT, TEXT_THREADS), lambda: function(*args, **kwargs))


async def run_storage(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs reading and writing of voices in a thread."""
    return await _run(_limiter(_STORAGE, STORAGE_THREADS), lambda: function(*args, **kwargs))


async def run_decoding(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs what waits for a decoder in a thread. Raises OverloadedError where many wait already."""
    limiter = _limiter(_DECODING, DECODING_THREADS)
    if limiter.statistics().tasks_waiting >= MAX_WAITING_RECORDINGS:
        raise OverloadedError("many recordings wait to be decoded")
    return await _run(limiter, lambda: function(*args, **kwargs))


async def run_encoding(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs the encoding of audio for responses in a thread."""
    return await _run(_limiter(_ENCODING, ENCODING_THREADS), lambda: function(*args, **kwargs))


def _limiter(variable: RunVar[CapacityLimiter], n_threads: int) -> CapacityLimiter:
    limiter = variable.get(None)
    if limiter is None:
        limiter = CapacityLimiter(n_threads)
        variable.set(limiter)
    return limiter


async def _run(limiter: CapacityLimiter, call: Callable[[], T]) -> T:
    return await to_thread.run_sync(call, limiter=limiter)
