"""Decodes sound files that may be hostile, in processes of their own.

libsndfile and FFmpeg are native code: a crafted file may crash them, keep them busy or make them
allocate memory without end. In a thread, nothing could stop that. So each decoder is a small
process (numpy, soundfile, av: 0.3 s to start), which is kept for the next recording. A crash, too
much memory or too much time ends the process and becomes the recording's error; the next recording
gets a new process. With two decoders, a slow recording does not hold up the next one. A new process
for each recording would cost its start each time; the pools of multiprocessing hang when a worker
is killed.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from valle.platform import decoder_process as protocol
from valle.platform import settings
from valle.platform.decoding import MAX_BYTES, MAX_SAMPLE_RATE, Samples
from valle.platform.sound_formats import CONVERSION_HINT, AudioError, detect

START_SECONDS = 60.0
"""Time of a process until it accepts requests; on a busy machine its imports take a while."""


class DecoderBusyError(RuntimeError):
    """No decoder became free within the time that a caller waits."""


class DecoderPool:
    """Decoder processes, each started at its first recording; for calls from any thread.

    A context manager; a pool that is no longer referenced ends its processes too.
    """

    def __init__(
        self,
        processes: int = 1,
        *,
        time_limit: float = 120.0,
        memory_bytes: int = 2**30,
        wait: float = 60.0,
    ) -> None:
        """`time_limit`: seconds for one recording; `memory_bytes`: of one process, beyond what it
        starts with; `wait`: seconds for which a call waits for a free decoder."""
        self._decoders = [_Decoder(time_limit, memory_bytes) for _ in range(processes)]
        self._idle: queue.LifoQueue[_Decoder] = queue.LifoQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._wait = wait
        self._finalizer = weakref.finalize(self, _stop_all, self._decoders)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        _stop_all(self._decoders)

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders that run."""
        return [pid for decoder in self._decoders if (pid := decoder.pid) is not None]

    def decode(self, data: bytes, max_seconds: float) -> tuple[Samples, int]:
        """Mono samples and sample rate, as `decoding.decode`.

        Raises AudioError, also for a crash or too much time, and DecoderBusyError.
        """
        detect(data)  # unknown formats never reach a decoder
        if len(data) > MAX_BYTES:
            raise AudioError(f"too large: {len(data) >> 20} MB, limit {MAX_BYTES >> 20} MB")
        limit = int(max_seconds * MAX_SAMPLE_RATE) * 4
        result, rate = self._ask(protocol.DECODE, max_seconds, data, limit)
        return np.frombuffer(result, np.float32), rate

    def read_comment(self, data: bytes) -> str:
        """The comment in a sound file's header, as `decoding.read_comment`. Raises as `decode`."""
        detect(data)
        result, _ = self._ask(protocol.COMMENT, 0.0, data, len(data))
        return result.decode(errors="replace")

    def _ask(
        self, operation: int, max_seconds: float, data: bytes, limit: int
    ) -> tuple[bytearray, int]:
        try:
            decoder = self._idle.get(timeout=self._wait)
        except queue.Empty:
            raise DecoderBusyError(f"no decoder was free for {self._wait:g} s") from None
        try:
            for attempt in range(2):
                try:
                    return decoder.ask(operation, max_seconds, data, limit)
                except _CrashError as error:
                    # once more: the machine may have ended the process for lack of memory
                    if attempt:
                        raise AudioError(
                            f"unreadable audio: its decoder crashed ({error}): the file is "
                            f"damaged, or needs too much memory; {CONVERSION_HINT}"
                        ) from error
            raise AssertionError("unreachable: the second crash is raised")
        finally:
            self._idle.put(decoder)


class _CrashError(Exception):
    """The process ended before it answered; the message says how."""


class _Decoder:
    """One process at a time, used by one thread at a time."""

    def __init__(self, time_limit: float, memory_bytes: int) -> None:
        self._time_limit, self._memory_bytes = time_limit, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process and process.poll() is None else None

    def ask(
        self, operation: int, max_seconds: float, data: bytes, limit: int
    ) -> tuple[bytearray, int]:
        """Result and sample rate. Raises AudioError, or _CrashError if the process ends."""
        process = self._process
        if process is None or process.poll() is not None:
            self.stop()
            process = self._process = self._start()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        # Its own timer ends the process as well. This one also helps if it is stopped or stuck
        # before that, and bounds the pipe.
        timer = threading.Timer(self._time_limit, expire)
        timer.daemon = True
        timer.start()
        try:
            outcome, rate, result = _exchange(process, operation, max_seconds, data, limit)
        except (OSError, EOFError, ValueError) as error:
            self.stop()
            if expired.is_set() or process.returncode == -signal.SIGALRM:
                message = f"too slow to decode: more than {self._time_limit:g} s; {CONVERSION_HINT}"
                raise AudioError(message) from error
            raise _CrashError(f"exit status {process.returncode}") from error
        finally:
            timer.cancel()
        if outcome == protocol.REFUSED:
            raise AudioError(result.decode(errors="replace"))
        return result, rate

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", protocol.__name__]
        process = subprocess.Popen(
            [*command, str(self._memory_bytes), str(self._time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=settings.bare_environment(
                PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
                OMP_NUM_THREADS="1",
                OPENBLAS_NUM_THREADS="1",
            ),
        )
        assert process.stdout is not None
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        answer = process.stdout.read(1)
        timer.cancel()
        if answer != protocol.READY:
            self._process = process
            self.stop()
            raise RuntimeError(f"the decoder did not start: {' '.join(command)}")
        return process


def _exchange(
    process: "subprocess.Popen[bytes]", operation: int, max_seconds: float, data: bytes, limit: int
) -> tuple[int, int, bytearray]:
    requests, replies = process.stdin, process.stdout
    assert requests is not None and replies is not None
    header = protocol.REQUEST.pack(operation, max_seconds, len(data))
    protocol.write_all(requests, header, data)
    reply = protocol.read_exactly(replies, protocol.REPLY.size)
    outcome, rate, size = protocol.REPLY.unpack(reply)
    if size > (limit if outcome == protocol.DONE else 10_000):
        raise ValueError("the decoder's reply is longer than its request allows")
    return outcome, rate, protocol.read_exactly(replies, size)


def _stop_all(decoders: Sequence[_Decoder]) -> None:
    for decoder in decoders:
        decoder.stop()
