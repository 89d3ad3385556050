"""A long text read aloud through HTTP: is it all there, in time, and in bounded memory?

    python -m valle.jobs.bench.chapter --characters 10000

One request for a text of many sentences, streamed as it is made. Reports first audio, real-time
factor, the share of chunks that were there before playback needed them, the memory of every replica
while the text was read, and the words that a recognizer heard wrong in the whole of it.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from ray import serve

from valle.jobs.bench.replicas import replica_memory
from valle.jobs.bench.serve import BYTES_PER_SECOND
from valle.jobs.evaluation.metrics import words
from valle.jobs.speakers.texts import load_sentences
from valle.jobs.starter_voices import make_starter_voices
from valle.model.codec.interface import Wave
from valle.platform import audio, registry, settings
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs

CHARACTERS_PER_SECOND = 15
"""About; for the progress bar."""

MEMORY_INTERVAL = 20.0
"""Seconds of speech between two looks at the memory."""


def long_text(characters: int) -> str:
    """Sentences that no model here was trained on, in paragraphs."""
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
    """The speech, and how it came."""
    chunks: list[bytes] = []
    megabytes: dict[str, list[float]] = defaultdict(list)
    in_time = []
    received, first, next_look = 0, 0.0, 0.0
    expected = len(body["input"]) // CHARACTERS_PER_SECOND
    started = time.perf_counter()
    with (
        httpx.stream("POST", url, json=body, timeout=600) as response,
        progress_bar(total=expected, label="bench.chapter", unit="s of speech") as bar,
    ):
        response.raise_for_status()
        for data in response.iter_raw():
            now = time.perf_counter()
            first = first or now
            in_time.append(now - first <= received / BYTES_PER_SECOND)
            chunks.append(data)
            received += len(data)
            if received / BYTES_PER_SECOND >= next_look:
                for name, value in replica_memory().items():
                    megabytes[name].append(value)
                bar.update(round(MEMORY_INTERVAL) if next_look else 0)
                next_look += MEMORY_INTERVAL
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


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--characters", type=int, default=10_000)
    parser.add_argument("--voice", default="joe")
    parser.add_argument("--chunked", action="store_true", help="sound before a sentence is done")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--out", type=Path, help="wav to write")
    arguments = parser.parse_args(argv)
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    text = long_text(arguments.characters)
    body = {
        "input": text, "voice": arguments.voice, "response_format": "pcm",
        "chunked": arguments.chunked,
    }  # fmt: skip
    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        args = AppArgs(
            model=registry.pin(arguments.model), voices=voices, max_replicas=1,
            max_characters=len(text), max_seconds=3600,
        )  # fmt: skip
        serve.run(build_app(args), name="valle")
        url = f"http://127.0.0.1:{arguments.port}/v1/audio/speech"
        httpx.post(url, json=body | {"input": "Warm."}, timeout=60).raise_for_status()
        wave, report = stream_speech(url, body)
        serve.shutdown()
    if arguments.out:
        arguments.out.write_bytes(audio.wav_bytes(wave))
    hypothesis = words.Whisper(threads=2).transcribe(wave)
    errors = asdict(words.count_edits(text, hypothesis))
    print(json.dumps({"characters": len(text), **report, **errors}, indent=2))


if __name__ == "__main__":
    main()
