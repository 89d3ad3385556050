"""Evaluates a codec on recordings it was not trained on: words, quality, speaker, codebook usage.

A recognizer transcribes every system's copy of a recording, DistillMOS scores it, and a speaker
encoder compares its speaker with the recording's. Systems are the recording, the output of nano 2's
vocoder for unquantised features, and the codec with the first N codebooks, for each N of
`--codebooks`. Writes `evaluation.json` beside the codec's weights, or to `--out`.
"""

import argparse
import json
import platform
import random
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from valle.jobs.evaluation.codec_report import CodecMetrics, CodecReport
from valle.jobs.evaluation.metrics.quality import DistillMos
from valle.jobs.evaluation.metrics.speaker_similarity import SpeakerEncoder, load_speaker_encoder
from valle.jobs.evaluation.metrics.words import Recognizer, load_recognizer, word_error_rate
from valle.model.codec import encodec, nano2
from valle.model.codec.interface import Codes, SpeechCodec, Wave
from valle.model.codec.loading import CODEC_NAMES, load_codec
from valle.model.codec.nano2 import Nano2Codec
from valle.model.tokens import CODEBOOK_SIZE, SAMPLE_RATE
from valle.platform import audio, settings, storage
from valle.platform.progress import progress_bar

MAX_SECONDS = 20.0
"""Seconds; longer recordings are skipped: recognizers make errors of their own on them."""

Systems = dict[str, Callable[[list[Wave]], list[Wave]]]
"""Name of a system: the function from recordings to their copies."""


def load_recordings(folder: str, count: int, min_seconds: float) -> tuple[list[str], list[Wave]]:
    """Transcripts and waveforms of at most `count` recordings, the same ones in every call."""
    names = list(storage.list_files(folder, (".wav",)))
    random.Random(0).shuffle(names)
    texts: list[str] = []
    waves: list[Wave] = []
    for name in names:
        wave = audio.read_file(storage.join(folder, name), max_seconds=600)
        if min_seconds <= len(wave) / SAMPLE_RATE <= MAX_SECONDS and len(waves) < count:
            texts.append(storage.read_bytes(storage.join(folder, f"{name[:-4]}.txt")).decode())
            waves.append(wave)
    return texts, waves


def make_systems(codec: SpeechCodec, n_codebooks: Sequence[int]) -> Systems:
    """The recording, the copy of a vocoder where the codec has one, and the codec's copies."""
    systems: Systems = {"recording": lambda waves: waves}
    if isinstance(codec, Nano2Codec):
        vocode = codec.resynthesize
        systems["unquantised"] = lambda waves: [vocode(wave) for wave in waves]

    def through_codec(count: int) -> Callable[[list[Wave]], list[Wave]]:
        return lambda waves: codec.decode([codes[:count] for codes in codec.encode(waves)])

    return systems | {f"{count} codebooks": through_codec(count) for count in n_codebooks}


class CodecEvaluator:
    """The metric models: a recognizer (None: word errors are not measured), a speaker encoder,
    DistillMOS."""

    def __init__(self, recognizer: Recognizer | None, encoder: SpeakerEncoder) -> None:
        self._recognizer, self._encoder, self._distillmos = recognizer, encoder, DistillMos()

    def measure(self, texts: list[str], recordings: list[Wave], copies: list[Wave]) -> CodecMetrics:
        """Metrics of one system's copies of the recordings."""
        wer = None
        if self._recognizer is not None:
            wer = word_error_rate(texts, [self._recognizer.transcribe(copy) for copy in copies])
        cosines = []
        for recording, copy in zip(recordings, copies, strict=True):
            embedding = self._encoder.embed(recording)
            if embedding is not None:
                copy_embedding = self._encoder.embed(copy)
                # a copy without a voice has lost the speaker
                cosines.append(0.0 if copy_embedding is None else float(embedding @ copy_embedding))
        return CodecMetrics(
            distillmos=round(float(np.mean([self._distillmos.score(copy) for copy in copies])), 4),
            speaker_similarity=round(float(np.mean(cosines)), 4) if cosines else None,
            wer=None if wer is None else round(wer, 4),
        )


def evaluate(
    codec: SpeechCodec,
    texts: list[str],
    recordings: list[Wave],
    evaluator: CodecEvaluator,
    n_codebooks: Sequence[int],
) -> dict[str, CodecMetrics]:
    """Metrics of every system."""
    metrics = {}
    systems = make_systems(codec, n_codebooks)
    with progress_bar(total=len(systems), label="evaluate", unit="system") as bar:
        for name, system in systems.items():
            metrics[name] = evaluator.measure(texts, recordings, system(recordings))
            bar.update()
    return metrics


def codebook_usage(codes: Sequence[Codes]) -> tuple[float, ...]:
    """Share of the 1024 entries that occur in `codes`, per codebook."""
    books = np.concatenate(codes, axis=1)
    return tuple(round(len(np.unique(book)) / CODEBOOK_SIZE, 3) for book in books)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="nano", help="nano, nano2, encodec-24khz, or a path")
    parser.add_argument(
        "--recordings",
        default="data/codec/corpus/asterisk-en",
        help="folder of wav + txt that the codec was not trained on",
    )
    parser.add_argument("--count", type=int, default=120, help="recordings at most")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="skip shorter ones")
    parser.add_argument(
        "--codebooks", type=int, nargs="+", default=[8], help="the first N of them, for each N"
    )
    parser.add_argument(
        "--recognizer", default="whisper", help="none: no word errors (speech that is not English)"
    )
    parser.add_argument("--speaker-encoder", default="wespeaker", help="or resemblyzer")
    parser.add_argument("--out", help="JSON file; default: evaluation.json beside the weights")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate_codec`."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    torch.set_num_threads(2)
    arguments.codec = storage.absolute(arguments.codec, CODEC_NAMES)
    codec = load_codec(arguments.codec, cache=settings.read().cache)
    texts, waves = load_recordings(arguments.recordings, arguments.count, arguments.min_seconds)
    if not waves:
        parser.exit(2, f"error: no usable recordings in {arguments.recordings}\n")
    has_recognizer = arguments.recognizer != "none"
    evaluator = CodecEvaluator(
        load_recognizer(arguments.recognizer) if has_recognizer else None,
        load_speaker_encoder(arguments.speaker_encoder),
    )
    report = CodecReport(
        codec=codec.identity.name,
        sha256=codec.identity.sha256,
        frame_rate=codec.identity.frame_rate,
        date=date.today().isoformat(),
        hardware=f"{platform.machine()}, {torch.get_num_threads()} threads",
        recognizer=arguments.recognizer,
        speaker_encoder=arguments.speaker_encoder,
        recordings=len(waves),
        seconds=round(sum(len(wave) for wave in waves) / SAMPLE_RATE, 1),
        systems=evaluate(codec, texts, waves, evaluator, arguments.codebooks),
        codebook_usage=codebook_usage(codec.encode(waves)),
    ).to_json()
    print(json.dumps(report, indent=2))
    shipped = {"nano": encodec.NANO_CODEC_FOLDER, "nano2": nano2.NANO2_CODEC_FOLDER}
    folder = shipped.get(arguments.codec, Path(arguments.codec))
    if arguments.out or folder.is_dir():
        storage.write_json(arguments.out or str(folder / "evaluation.json"), report)


if __name__ == "__main__":
    main()
