"""What a codec does to recordings it has never heard: words, quality, voice, use of the codebooks.

An independent recognizer reads every system's copy of a recording, DistillMOS scores it, and a
speaker encoder compares its voice with the recording's. The systems: the recording; for
nano 2 what its vocoder makes of the features unquantised; the codec with each number of codebooks
asked for. Writes `evaluation.json` beside the weights, or where `--out` says.
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

from valle.jobs.evaluation.metrics.quality import DistillMos
from valle.jobs.evaluation.metrics.speaker_similarity import SpeakerEncoder, load_speaker_encoder
from valle.jobs.evaluation.metrics.words import Recognizer, load_recognizer, word_error_rate
from valle.jobs.train_codec import codebook_usage
from valle.model.codec import encodec, nano2
from valle.model.codec.interface import SpeechCodec, Wave
from valle.model.codec.loading import CODEC_NAMES, load_codec
from valle.model.codec.nano2 import Nano2Codec
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, settings, storage
from valle.platform.progress import progress_bar

MAX_SECONDS = 20.0
"""Longer recordings are skipped: a recognizer's habits, not the codec's, would decide."""

Systems = dict[str, Callable[[list[Wave]], list[Wave]]]
"""Name of a system to what makes its audio of the recordings."""


def load_recordings(folder: str, count: int, min_seconds: float) -> tuple[list[str], list[Wave]]:
    """Transcripts and waveforms of `count` recordings, the same ones every time."""
    names = list(storage.list_files(folder, (".wav",)))
    random.Random(0).shuffle(names)
    texts: list[str] = []
    waves: list[Wave] = []
    for name in names:
        wave = audio.read(storage.read_bytes(storage.join(folder, name)), max_seconds=600)
        if min_seconds <= len(wave) / SAMPLE_RATE <= MAX_SECONDS and len(waves) < count:
            texts.append(storage.read_bytes(storage.join(folder, f"{name[:-4]}.txt")).decode())
            waves.append(wave)
    return texts, waves


def make_systems(codec: SpeechCodec, n_codebooks: Sequence[int]) -> Systems:
    """The recording, the vocoder's copy where the codec has a vocoder, and the codec's."""
    systems: Systems = {"recording": lambda waves: waves}
    if isinstance(codec, Nano2Codec):
        vocode = codec.resynthesize
        systems["unquantised"] = lambda waves: [vocode(wave) for wave in waves]

    def through_codec(count: int) -> Callable[[list[Wave]], list[Wave]]:
        return lambda waves: codec.decode([codes[:count] for codes in codec.encode(waves)])

    return systems | {f"{count} codebooks": through_codec(count) for count in n_codebooks}


class CodecMetrics:
    """A recognizer (or none, for a language it does not read), a speaker encoder, DistillMOS."""

    def __init__(self, recognizer: Recognizer | None, encoder: SpeakerEncoder) -> None:
        self._recognizer, self._encoder, self._mos = recognizer, encoder, DistillMos()

    def compute(
        self, texts: list[str], recordings: list[Wave], waves: list[Wave]
    ) -> dict[str, float]:
        """Means over one system's copies of the recordings."""
        mos_scores, cosines, hypotheses = [], [], []
        for recording, wave in zip(recordings, waves, strict=True):
            mos_scores.append(self._mos.score(wave))
            own = self._encoder.embed(recording)
            if own is not None:
                copy = self._encoder.embed(wave)
                cosines.append(0.0 if copy is None else float(own @ copy))  # no voice is left
            if self._recognizer is not None:
                hypotheses.append(self._recognizer.transcribe(wave))
        means = {"distillmos": float(np.mean(mos_scores))}
        if cosines:
            means["speaker_similarity"] = float(np.mean(cosines))
        if self._recognizer is not None:
            means["wer"] = word_error_rate(texts, hypotheses)
        return {name: round(value, 4) for name, value in means.items()}


def evaluate(
    codec: SpeechCodec,
    texts: list[str],
    recordings: list[Wave],
    metrics: CodecMetrics,
    n_codebooks: Sequence[int],
) -> dict[str, Any]:
    """Metrics of every system, and how much of each codebook is used."""
    results = {}
    systems = make_systems(codec, n_codebooks)
    with progress_bar(total=len(systems), label="evaluate", unit="system") as bar:
        for name, system in systems.items():
            results[name] = metrics.compute(texts, recordings, system(recordings))
            bar.update()
    return {
        "recordings": len(recordings),
        "seconds": round(sum(len(w) for w in recordings) / SAMPLE_RATE, 1),
        "systems": results,
        "codebook_usage": [round(use, 3) for use in codebook_usage(codec.encode(recordings))],
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
        "--recognizer", default="whisper", help="none for a language that it does not read"
    )
    parser.add_argument("--speaker-encoder", default="wespeaker", help="or resemblyzer")
    parser.add_argument("--out", help="JSON file; default: evaluation.json beside the weights")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(2)
    arguments.codec = storage.absolute(arguments.codec, CODEC_NAMES)
    codec = load_codec(arguments.codec, cache=settings.read().cache)
    texts, waves = load_recordings(arguments.recordings, arguments.count, arguments.min_seconds)
    if not waves:
        parser.exit(2, f"error: no usable recordings in {arguments.recordings}\n")
    has_recognizer = arguments.recognizer != "none"
    metrics = CodecMetrics(
        load_recognizer(arguments.recognizer) if has_recognizer else None,
        load_speaker_encoder(arguments.speaker_encoder),
    )
    report = {
        "codec": codec.identity.name,
        "sha256": codec.identity.sha256,
        "frame_rate": codec.identity.frame_rate,
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "recognizer": arguments.recognizer,
        "speaker_encoder": arguments.speaker_encoder,
        **evaluate(codec, texts, waves, metrics, arguments.codebooks),
    }
    print(json.dumps(report, indent=2))
    shipped = {"nano": encodec.NANO_CODEC_FOLDER, "nano2": nano2.NANO2_CODEC_FOLDER}
    folder = shipped.get(arguments.codec, Path(arguments.codec))
    if arguments.out or folder.is_dir():
        storage.write_json(arguments.out or str(folder / "evaluation.json"), report)


if __name__ == "__main__":
    main()
