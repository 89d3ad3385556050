"""A long text over HTTP: is all of it spoken, ahead of playback, and in bounded memory?

    python -m valle.jobs.bench.chapter --characters 10000

One request for a text of many sentences, streamed. Reports first audio, real-time factor, the share
of chunks that arrive before playback needs them, the memory of every replica during the stream, and
the word errors that a recognizer finds in the whole recording.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from valle.jobs.bench.clients import BYTES_PER_SECOND, SPEECH_ROUTE
from valle.jobs.bench.command_line import build_parser, endpoint_args, print_report
from valle.jobs.bench.replicas import replica_memory
from valle.jobs.evaluation.metrics import words
from valle.jobs.speakers.texts import load_sentences
from valle.model.codec.interface import Wave
from valle.platform import audio
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.run import endpoint

CHARACTERS_PER_SECOND = 15
"""Of English speech, roughly; for the progress bar."""

MEMORY_INTERVAL = 20.0
"""Seconds of speech between two samples of the replicas' memory."""


def long_text(characters: int) -> str:
    """Held-out sentences in paragraphs of eight; no model was trained on them."""
    lines: list[str] = []
    size = 0
    for number, line in enumerate(load_sentences("held_out")):
        if size + len(line) > characters:
            break
        lines.append(line)
        lines.append("\n\n" if number % 8 == 7 else " ")
        size += len(line) + 1
    return "".join(lines).strip()


def stream_speech(url: str, body: dict[str, Any]) -> tuple[Wave, dict[str, Any]]:
    """Streams one answer; returns its waveform, and the figures of its delivery."""
    chunks: list[bytes] = []
    megabytes: dict[str, list[float]] = defaultdict(list)
    in_time = []
    received, first, next_sample = 0, 0.0, 0.0
    expected = len(body["input"]) // CHARACTERS_PER_SECOND
    started = time.perf_counter()
    with (
        httpx.stream("POST", url, json=body, timeout=600) as response,
        progress_bar(total=expected, label="bench.chapter", unit="s of speech") as bar,
    ):
        response.raise_for_status()
        for data in response.iter_raw():
            # playback starts with the first chunk and needs each chunk when the ones before end
            now = time.perf_counter()
            first = first or now
            in_time.append(now - first <= received / BYTES_PER_SECOND)
            chunks.append(data)
            received += len(data)
            # memory by position in the speech, so that growth with length shows
            if received / BYTES_PER_SECOND >= next_sample:
                for name, value in replica_memory().items():
                    megabytes[name].append(value)
                bar.update(round(MEMORY_INTERVAL) if next_sample else 0)
                next_sample += MEMORY_INTERVAL
    seconds = received / BYTES_PER_SECOND
    wave = np.frombuffer(b"".join(chunks), "<i2").astype(np.float32) / np.float32(32768)
    return wave, {
        "minutes_of_speech": round(seconds / 60, 2),
        "first_audio": round(first - started, 2),
        "real_time_factor": round((time.perf_counter() - started) / seconds, 3),
        "chunks": len(in_time),
        "chunks_in_time": round(float(np.mean(in_time)), 3),
        "megabytes_first_median_last": {
            name: [values[0], float(np.median(values)), values[-1]]
            for name, values in megabytes.items()
        },
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, serves=True)
    parser.add_argument("--characters", type=int, default=10_000)
    parser.add_argument("--voice", default="joe")
    parser.add_argument("--chunked", action="store_true", help="stream within sentences")
    parser.add_argument("--out", type=Path, help="wav to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    text = long_text(arguments.characters)
    args = endpoint_args(
        arguments.model, max_replicas=1, max_characters=len(text), max_seconds=3600
    )
    body = {
        "input": text,
        "voice": arguments.voice,
        "response_format": "pcm",
        "chunked": arguments.chunked,
    }
    with connect(), endpoint(args, arguments.port) as url:
        speech_url = url + SPEECH_ROUTE
        warm_up = httpx.post(speech_url, json=body | {"input": "Warm."}, timeout=60)
        warm_up.raise_for_status()
        wave, report = stream_speech(speech_url, body)
    if arguments.out:
        arguments.out.write_bytes(audio.wav_bytes(wave))
    # after the endpoint has stopped: the recognizer takes both cores
    hypothesis = words.Whisper(threads=2).transcribe(wave)
    errors = asdict(words.count_edits(text, hypothesis))
    print_report({"characters": len(text), **report, **errors})


if __name__ == "__main__":
    main()
