"""What a codec does to recordings it has never heard: words, quality, voice, use of the codebooks.

An independent recogniser reads every version of a recording, DistillMOS scores it, and a speaker
encoder compares its voice with the recording's. The versions: the recording; for nano 2 what its
vocoder makes of the features unquantised; the codec with each number of codebooks asked for.
Writes `evaluation.json` beside the weights, or where `--out` says.
"""

import argparse
import json
import platform
import random
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from valle.jobs.evaluation.metrics.likeness import SpeakerEncoder, load_encoder
from valle.jobs.evaluation.metrics.quality import DistillMos
from valle.jobs.evaluation.metrics.recogniser import Recogniser, load_recogniser, word_error_rate
from valle.jobs.train_codec import codebook_use
from valle.model.codec import encodec, nano2
from valle.model.codec.interface import SpeechCodec, Wave
from valle.model.codec.loading import load_codec
from valle.model.codec.nano2 import Nano2
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, settings, storage
from valle.platform.progress import progress

MAX_SECONDS = 20.0
"""Longer recordings are skipped: a recogniser's habits, not the codec's, would decide."""

Versions = dict[str, Callable[[list[Wave]], list[Wave]]]
"""Name of a version to what makes it of the recordings."""


def load_recordings(folder: str, count: int, min_seconds: float) -> tuple[list[str], list[Wave]]:
    """Transcripts and waveforms of `count` recordings, the same ones every time."""
    root = storage.absolute(folder)
    names = list(storage.list_files(root, (".wav",)))
    random.Random(0).shuffle(names)
    texts: list[str] = []
    waves: list[Wave] = []
    for name in names:
        wave = audio.read(storage.read_bytes(storage.join(root, name)), max_seconds=600)
        if min_seconds <= len(wave) / SAMPLE_RATE <= MAX_SECONDS and len(waves) < count:
            texts.append(storage.read_bytes(storage.join(root, f"{name[:-4]}.txt")).decode())
            waves.append(wave)
    return texts, waves


def versions(codec: SpeechCodec, n_codebooks: Sequence[int]) -> Versions:
    """The recording, the vocoder's copy where the codec has a vocoder, and the codec's."""
    makers: Versions = {"recording": lambda waves: waves}
    if isinstance(codec, Nano2):
        vocoded = codec.unquantised
        makers["unquantised"] = lambda waves: [vocoded(wave) for wave in waves]

    def coded(count: int) -> Callable[[list[Wave]], list[Wave]]:
        return lambda waves: codec.decode([codes[:count] for codes in codec.encode(waves)])

    return makers | {f"{count} codebooks": coded(count) for count in n_codebooks}


class Judges:
    """A recogniser (or none, for a language it does not read), a speaker encoder, DistillMOS."""

    def __init__(self, recogniser: Recogniser | None, encoder: SpeakerEncoder) -> None:
        self._recogniser, self._encoder, self._mos = recogniser, encoder, DistillMos()

    def figures(
        self, texts: list[str], recordings: list[Wave], waves: list[Wave]
    ) -> dict[str, float]:
        """Means over one version of the recordings."""
        scores, cosines, hypotheses = [], [], []
        for recording, wave in zip(recordings, waves, strict=True):
            scores.append(self._mos.score(wave))
            own = self._encoder.embed(recording)
            if own is not None:
                copy = self._encoder.embed(wave)
                cosines.append(0.0 if copy is None else float(own @ copy))  # no voice is left
            if self._recogniser is not None:
                hypotheses.append(self._recogniser.transcribe(wave))
        figures = {"distillmos": float(np.mean(scores))}
        if cosines:
            figures["similarity"] = float(np.mean(cosines))
        if self._recogniser is not None:
            figures["wer"] = word_error_rate(texts, hypotheses)
        return {name: round(value, 4) for name, value in figures.items()}


def evaluate(
    codec: SpeechCodec,
    texts: list[str],
    recordings: list[Wave],
    judges: Judges,
    n_codebooks: Sequence[int],
) -> dict[str, Any]:
    """Figures of every version, and how much of each codebook is used."""
    table = {}
    makers = versions(codec, n_codebooks)
    with progress(total=len(makers), label="evaluate", unit="version") as bar:
        for name, make in makers.items():
            table[name] = judges.figures(texts, recordings, make(recordings))
            bar.update()
    return {
        "recordings": len(recordings),
        "seconds": round(sum(len(w) for w in recordings) / SAMPLE_RATE, 1),
        "versions": table,
        "codebook_use": [round(use, 3) for use in codebook_use(codec.encode(recordings))],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate_codec`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="nano", help="nano, nano2, encodec-24khz, or a path")
    parser.add_argument(
        "--recordings", default="data/codec/corpus/asterisk-en",
        help="folder of wav + txt the codec was not trained on",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=120, help="recordings to judge")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="skip shorter ones")
    parser.add_argument(
        "--codebooks", type=int, nargs="+", default=[8], help="the first N of them, for each N"
    )
    parser.add_argument(
        "--recogniser", default="whisper", help="none for a language that it does not read"
    )
    parser.add_argument("--speaker-encoder", default="wespeaker", help="or resemblyzer")
    parser.add_argument("--out", help="JSON file; default: evaluation.json beside the weights")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(2)
    codec = load_codec(arguments.codec, cache=settings.read().cache)
    texts, waves = load_recordings(arguments.recordings, arguments.count, arguments.min_seconds)
    if not waves:
        parser.exit(2, f"error: no usable recordings in {arguments.recordings}\n")
    reads = arguments.recogniser != "none"
    judges = Judges(
        load_recogniser(arguments.recogniser) if reads else None,
        load_encoder(arguments.speaker_encoder),
    )
    report = {
        "codec": codec.identity.name,
        "sha256": codec.identity.sha256,
        "frame_rate": codec.identity.frame_rate,
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "recogniser": arguments.recogniser,
        "speaker_encoder": arguments.speaker_encoder,
        **evaluate(codec, texts, waves, judges, arguments.codebooks),
    }
    print(json.dumps(report, indent=2))
    shipped = {"nano": encodec.NANO_FOLDER, "nano2": nano2.FOLDER}
    folder = shipped.get(arguments.codec, Path(arguments.codec))
    if arguments.out or folder.is_dir():
        storage.write_json(arguments.out or str(folder / "evaluation.json"), report)


if __name__ == "__main__":
    main()
