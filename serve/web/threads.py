"""Threads of an ingress replica, in a pool for each kind of work: slow storage or many texts take
no thread from the encoders of streams."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

P = ParamSpec("P")
T = TypeVar("T")

TEXT_THREADS = 2
"""espeak works on one text at a time."""
STORAGE_THREADS = 16
ENCODING_THREADS = 16

# one for each event loop, as anyio keeps its own
_TEXT: RunVar[CapacityLimiter] = RunVar("text")
_STORAGE: RunVar[CapacityLimiter] = RunVar("storage")
_ENCODING: RunVar[CapacityLimiter] = RunVar("encoding")


async def run_text(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs normalisation and phonemes of a text in a thread."""
    return await _run(_limiter(_TEXT, TEXT_THREADS), lambda: function(*args, **kwargs))


async def run_storage(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs reading and writing of voices, and the decoding of recordings, in a thread."""
    return await _run(_limiter(_STORAGE, STORAGE_THREADS), lambda: function(*args, **kwargs))


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
