"""Speaks a text in the voice of a recording, and writes an audio file. Needs no server.

    valle speak "Hello there." reference.wav out.wav

The text is spoken sentence by sentence, as in the endpoint. The model is the registry's champion,
a bundle's folder (`--model`), or two checkpoints.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.codec.interface import Wave
from valle.model.codec.loading import CODEC_NAMES
from valle.model.nar import NAR
from valle.model.sentences import join_waves, phoneme_budget, sentence_phoneme_ids
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.model.valle import GUIDANCE_SCALE, Synthesis, Synthesizer
from valle.platform import audio, checkpoint, registry, storage
from valle.platform.reference import ReferenceReader
from valle.serve.web.audio_formats import AudioFormat, encode_audio


def load_synthesizer(arguments: argparse.Namespace) -> Synthesizer:
    """The networks named on the command line.

    Raises ValueError for checkpoints that do not belong together or to the codec.
    """
    if not arguments.ar_ckpt and not arguments.nar_ckpt:
        folder = registry.resolve(arguments.model, allow_cached=True)
        return registry.load_synthesizer(folder, arguments.device)
    if not (arguments.ar_ckpt and arguments.nar_ckpt):
        raise ValueError("--ar-ckpt and --nar-ckpt go together")
    codec_path = storage.absolute(arguments.codec, CODEC_NAMES)
    codec = encodec.load(codec_path, device=arguments.device)
    ar_path, nar_path = (
        Path(storage.absolute(path)) for path in (arguments.ar_ckpt, arguments.nar_ckpt)
    )
    ar, ar_metadata = checkpoint.load(ar_path, arguments.device)
    nar, nar_metadata = checkpoint.load(nar_path, arguments.device)
    if not isinstance(ar, AR) or not isinstance(nar, NAR):
        raise ValueError("--ar-ckpt must hold an AR model, --nar-ckpt a NAR model")
    codec.identity.check(ar_metadata.codec, "the AR checkpoint")
    codec.identity.check(nar_metadata.codec, "the NAR checkpoint")
    return Synthesizer(ar, nar, codec)


def read_reference(paths: str, seconds: float) -> Wave:
    """The recording at a path; for several paths, `a.wav;b.wav`, their beginnings in sequence.

    Each of several contributes an equal share of `seconds`, so that a prompt of that length holds
    all of them. Raises ValueError, with the path, for an unusable recording.
    """
    reader = ReferenceReader()
    waves = []
    for path in paths.split(";"):
        try:
            waves.append(reader.read(Path(path).read_bytes()))
        except audio.AudioError as error:
            raise ValueError(f"{path}: {error}") from error
    if len(waves) == 1:
        return waves[0]
    share = int(seconds / len(waves) * SAMPLE_RATE)
    return np.concatenate([wave[:share] for wave in waves])


def check_output(path: Path) -> AudioFormat:
    """The audio format that a path's suffix names.

    Raises ValueError for another suffix, and for a path where no file can be written.
    """
    name = path.suffix.lower().removeprefix(".")
    if name not in get_args(AudioFormat):
        suffixes = ", ".join(f".{known}" for known in get_args(AudioFormat))
        raise ValueError(f"out: {path} has the suffix {path.suffix!r}; known are {suffixes}")
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"out: there is no folder {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"out: {path} cannot be written")
    return cast(AudioFormat, name)


def speak(
    synthesizer: Synthesizer, text: str, reference: Wave, synthesis: Synthesis
) -> tuple[Wave, bool]:
    """The sentences of a text one after the other, at 24 kHz; and whether the length limit of a
    sentence cut one off. Raises ValueError for a text that cannot be spoken."""
    budget = phoneme_budget(synthesis.max_seconds)
    sentences = sentence_phoneme_ids(text, synthesis.language, budget)
    prompt = synthesizer.encode_prompt(reference, synthesis)
    results = [
        synthesizer.synthesize_phonemes(
            ids, prompt, replace(synthesis, seed=(synthesis.seed + index) % 2**63)
        )
        for index, ids in enumerate(sentences)
    ]
    return join_waves([result.wave for result in results]), any(r.hit_limit for r in results)


def main(argv: Sequence[str] | None = None) -> int:
    """Speaks one text; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="text to speak")
    parser.add_argument(
        "reference", help="recording of the voice (any usual format), or several: 'a.wav;b.wav'"
    )
    parser.add_argument("out", type=Path, help="file to write; its suffix is the format")
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--ar-ckpt", help="AR checkpoint, instead of --model")
    parser.add_argument("--nar-ckpt", help="NAR checkpoint, instead of --model")
    parser.add_argument("--codec", default="nano", help="codec of --ar-ckpt and --nar-ckpt")
    parser.add_argument(
        "--max-ar-steps", type=int, default=1500, help="length limit of a sentence in frames"
    )
    parser.add_argument("--ar-temp", type=float, default=1.0, help="temperature of the AR model")
    parser.add_argument("--nar-temp", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=GUIDANCE_SCALE,
        help="weight of the text and the voice in both models; 1 is off and halves the work",
    )
    parser.add_argument("--language", default="en-us", help="BCP 47 tag of the text")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same speech")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    try:
        audio_format = check_output(arguments.out)
        default, scale = Synthesis(), arguments.guidance_scale
        synthesis = replace(
            default,
            ar=replace(default.ar, temperature=arguments.ar_temp, guidance_scale=scale),
            nar=replace(default.nar, temperature=arguments.nar_temp, guidance_scale=scale),
            max_seconds=arguments.max_ar_steps / FRAME_RATE,
            language=arguments.language,
            seed=arguments.seed,
        )
        synthesizer = load_synthesizer(arguments)
        prompt = read_reference(arguments.reference, synthesis.prompt_seconds)
        started = time.perf_counter()
        wave, hit_limit = speak(synthesizer, arguments.text, prompt, synthesis)
        arguments.out.write_bytes(encode_audio(wave, audio_format))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = len(wave) / SAMPLE_RATE
    elapsed = time.perf_counter() - started
    suffix = ", cut off by the length limit of a sentence" if hit_limit else ""
    print(f"{arguments.out}: {seconds:.2f} s of speech in {elapsed:.2f} s{suffix}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
