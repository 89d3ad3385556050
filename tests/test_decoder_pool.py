"""Decoder processes: they agree with the decoder in this process, and a crash ends only one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.recordings import speech
from helpers.sound_files import WRITERS

from valle.platform import audio, decoder_pool, decoder_process, decoding, settings
from valle.platform.audio import AudioError
from valle.platform.decoder_pool import DecoderBusyError, DecoderPool

WAV = WRITERS["wav 16 bit"](speech(2))


@pytest.fixture(scope="module")
def shared() -> Iterator[DecoderPool]:
    with DecoderPool() as pool:
        yield pool


@pytest.mark.parametrize("name", WRITERS)
def test_pool_equals_the_decoder_in_this_process(shared: DecoderPool, name: str) -> None:
    data = WRITERS[name](speech(1))
    samples, rate = shared.decode(data, 10)
    expected, expected_rate = decoding.decode(data, 10)
    assert rate == expected_rate and np.array_equal(samples, expected)
    wave = audio.read(data, max_seconds=10, decode=shared.decode)
    assert np.array_equal(wave, audio.read(data, max_seconds=10))


@pytest.mark.parametrize(
    "data", [b"", b"nothing", b"RIFF\0\0\0\0WAVEjunk", WAV[:20], WAV * 3, b"fLaC" + bytes(99)]
)
def test_pool_refuses_in_the_same_words(shared: DecoderPool, data: bytes) -> None:
    with pytest.raises(AudioError) as expected:
        decoding.decode(data, 1)
    with pytest.raises(AudioError) as refused:
        shared.decode(data, 1)
    assert str(refused.value) == str(expected.value)
    assert shared.decode(WAV, 10)[1] == 24_000


def test_pool_reads_comments(shared: DecoderPool) -> None:
    comment = '{"consent": "Ann", "x": "%s"}' % ("é" * 50_000)
    assert shared.read_comment(audio.flac_bytes(speech(1), comment)) == comment
    for data in (WAV, WRITERS["m4a"](speech(1))):
        assert shared.read_comment(data) == decoding.read_comment(data) == ""


def test_pool_keeps_a_process_and_restarts_one_that_is_gone() -> None:
    with DecoderPool() as pool:
        assert pool.pids == []
        pool.decode(WAV, 10)
        [first] = pool.pids
        pool.decode(WAV, 10)
        assert pool.pids == [first]
        os.kill(first, signal.SIGKILL)  # while it is idle
        assert pool.decode(WAV, 10)[1] == 24_000
        [second] = pool.pids
        assert second != first
    assert not Path(f"/proc/{second}").exists()


def test_pool_survives_a_decoder_that_is_killed_in_the_midst() -> None:
    """Once may be the machine's fault, twice is the recording's; the next one is served."""
    with DecoderPool(time_limit=20) as pool, ThreadPoolExecutor(1) as thread:
        for kills in (1, 2):
            pool.decode(WAV, 10)
            [pid] = pool.pids
            os.kill(pid, signal.SIGSTOP)  # it is in the midst for as long as we like
            answer = thread.submit(pool.decode, WAV, 10)
            seen = {pid}
            for remaining in range(kills, 0, -1):
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                while remaining > 1 and (not pool.pids or pool.pids[0] in seen):
                    time.sleep(0.001)
                if remaining > 1:
                    [pid] = pool.pids
                    seen.add(pid)
                    os.kill(pid, signal.SIGSTOP)
            if kills == 1:
                assert len(answer.result(timeout=30)[0]) == 48_000
            else:
                with pytest.raises((AudioError, RuntimeError), match="crashed|did not start"):
                    answer.result(timeout=30)
            assert len(pool.decode(WAV, 10)[0]) == 48_000


def test_pool_ends_a_decoder_that_hangs() -> None:
    with DecoderPool(time_limit=0.5) as pool:
        pool.decode(WAV, 10)
        [pid] = pool.pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(AudioError, match=r"too slow to decode: more than 0.5 s"):
            pool.decode(WAV, 10)
        assert not Path(f"/proc/{pid}").exists()
        assert len(pool.decode(WAV, 10)[0]) == 48_000


def test_pool_does_not_wait_for_a_decoder_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(decoder_pool, "START_SECONDS", 0.2)
    with DecoderPool() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            with pytest.raises(RuntimeError, match="the decoder did not start"):
                pool.decode(WAV, 10)
            assert not pool.pids
        monkeypatch.setattr(decoder_pool, "START_SECONDS", 60.0)
        assert len(pool.decode(WAV, 10)[0]) == 48_000


def test_pool_bounds_the_memory_of_a_decoder() -> None:
    minutes = WRITERS["flac"](np.zeros(24_000 * 600, np.float32))
    assert len(minutes) < 100_000  # and 58 MB of samples
    with DecoderPool(memory_bytes=64 * 2**20) as pool:
        with pytest.raises(AudioError, match="crashed|memory"):
            pool.decode(minutes, 700)
        assert len(pool.decode(WAV, 10)[0]) == 48_000


def test_another_request_passes_a_slow_one_and_a_full_pool_is_busy() -> None:
    with DecoderPool(2, time_limit=30, wait=0.2) as pool, ThreadPoolExecutor(2) as threads:
        pool.decode(WAV, 10)
        stopped = pool.pids
        os.kill(stopped[0], signal.SIGSTOP)
        slow = threads.submit(pool.decode, WAV, 10)
        time.sleep(0.05)
        assert len(pool.decode(WAV, 10)[0]) == 48_000
        [other] = set(pool.pids) - set(stopped)
        os.kill(other, signal.SIGSTOP)
        second = threads.submit(pool.decode, WAV, 10)
        time.sleep(0.05)
        with pytest.raises(DecoderBusyError, match="no decoder was free"):
            pool.decode(WAV, 10)
        for pid in (*stopped, other):
            os.kill(pid, signal.SIGCONT)
        assert len(slow.result()[0]) == len(second.result()[0]) == 48_000


def test_decoder_gives_up_what_it_does_not_need(shared: DecoderPool) -> None:
    shared.decode(WAV, 10)
    [pid] = shared.pids
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("Max open files", "Max file size", "Max core file size"):
        [line] = [line for line in limits.splitlines() if line.startswith(name)]
        assert line.split()[len(name.split())] == "0", line
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"AWS" not in environment and b"VALLE" not in environment
    assert b"torch" not in Path(f"/proc/{pid}/maps").read_bytes()


def test_decoder_ends_with_its_owner() -> None:
    """When the owner is killed, and, by the decoder's own timer, in the midst of a recording."""
    program = (
        "import sys, time; from valle.platform.decoder_pool import DecoderPool\n"
        "pool = DecoderPool(); pool.decode(sys.stdin.buffer.read(), 10)\n"
        "print(*pool.pids, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdin and owner.stdout
    owner.stdin.write(WAV)
    owner.stdin.close()
    pid = int(owner.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)

    command = [sys.executable, "-m", decoder_process.__name__, str(2**30), "0.05"]
    long = WRITERS["mp3"](speech(60))
    environment = settings.bare_environment(PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stdout.read(1) == b"R"
        header = decoder_process.REQUEST.pack(decoder_process.DECODE, 700.0, len(long) * 2)
        process.stdin.write(header + long)  # the other half never comes
        process.stdin.flush()
        assert process.wait(timeout=20) == -signal.SIGALRM


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_pool_serves_many_threads() -> None:
    """Each gets the answer to its own recording."""
    files = [WRITERS["wav 16 bit"](speech(1 + 0.1 * k, k)) for k in range(8)]
    barrier = threading.Barrier(8)

    def ask(index: int) -> bool:
        barrier.wait()
        expected = decoding.decode(files[index], 10)[0]
        return all(np.array_equal(pool.decode(files[index], 10)[0], expected) for _ in range(5))

    with DecoderPool(2) as pool, ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(8)))
        assert len(pool.pids) == 2
