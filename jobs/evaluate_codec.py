"""What a codec does to recordings it has never heard: words, quality, use of the codebooks.

An independent recogniser reads the original and the reconstruction; DistillMOS scores both.
Writes `evaluation.json` beside the weights.
"""

import argparse
import json
import platform
import random
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from valle.jobs.codec import codebook_use
from valle.jobs.judges.quality import DistillMos
from valle.jobs.judges.recogniser import Whisper, word_error_rate
from valle.model import codec as codecs
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, settings, storage
from valle.platform.progress import progress

MAX_SECONDS = 20.0
"""Longer recordings are skipped: a recogniser's habits, not the codec's, would decide."""


def load_recordings(
    folder: str, count: int, min_seconds: float
) -> tuple[list[str], list[audio.Wave]]:
    """Transcripts and waveforms of `count` recordings, the same ones every time."""
    root = storage.absolute(folder)
    names = list(storage.list_files(root, (".wav",)))
    random.Random(0).shuffle(names)
    texts: list[str] = []
    waves: list[audio.Wave] = []
    for name in names:
        wave = audio.read(storage.read_bytes(storage.join(root, name)), max_seconds=600)
        if min_seconds <= len(wave) / SAMPLE_RATE <= MAX_SECONDS and len(waves) < count:
            texts.append(storage.read_bytes(storage.join(root, f"{name[:-4]}.txt")).decode())
            waves.append(wave)
    return texts, waves


def evaluate(
    codec: codecs.Codec, texts: list[str], waves: list[audio.Wave]
) -> dict[str, float | list[float]]:
    """Word error rate and DistillMOS before and after, and codebook use."""
    whisper, mos = Whisper(), DistillMos()
    codes = codec.encode(waves)
    rebuilt = codec.decode(codes)
    heard: dict[str, list[str]] = {"original": [], "reconstruction": []}
    scores: dict[str, list[float]] = {"original": [], "reconstruction": []}
    bar = progress(total=len(waves), label="evaluate", unit="recording")
    for before, after in zip(waves, rebuilt, strict=True):
        for name, wave in (("original", before), ("reconstruction", after)):
            heard[name].append(whisper.transcribe(wave))
            scores[name].append(mos.score(wave))
        bar.update()
    bar.close()
    return {
        "recordings": len(waves),
        "seconds": round(sum(len(w) for w in waves) / SAMPLE_RATE, 1),
        "wer_original": round(word_error_rate(texts, heard["original"]), 4),
        "wer_reconstruction": round(word_error_rate(texts, heard["reconstruction"]), 4),
        "distillmos_original": round(float(np.mean(scores["original"])), 3),
        "distillmos_reconstruction": round(float(np.mean(scores["reconstruction"])), 3),
        "codebook_use": [round(use, 3) for use in codebook_use(codes)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate_codec`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="nano", help="nano, encodec-24khz, or a path")
    parser.add_argument(
        "--recordings", default="data/codec/corpus/asterisk-en",
        help="folder of English wav + txt the codec was not trained on",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=120, help="recordings to judge")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="skip shorter ones")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(2)
    codec = codecs.load(arguments.codec, cache=settings.read().cache)
    texts, waves = load_recordings(arguments.recordings, arguments.count, arguments.min_seconds)
    if not waves:
        parser.exit(2, f"error: no usable recordings in {arguments.recordings}\n")
    report = {
        "codec": codec.identity.name,
        "sha256": codec.identity.sha256,
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        **evaluate(codec, texts, waves),
    }
    print(json.dumps(report, indent=2))
    folder = codecs.NANO_FOLDER if arguments.codec == "nano" else Path(arguments.codec)
    if folder.is_dir():
        storage.write_json(str(folder / "evaluation.json"), report)


if __name__ == "__main__":
    main()
