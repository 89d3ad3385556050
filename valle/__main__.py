"""`python -m valle "text" ref.wav out.wav`: speech without any server."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from valle.model.codec.interface import Wave
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.model.valle import GUIDANCE_SCALE, Synthesis, Synthesizer
from valle.platform import audio, checkpoint, registry


def load_synthesizer(arguments: argparse.Namespace) -> Synthesizer:
    """The networks named on the command line."""
    if not arguments.ar_ckpt and not arguments.nar_ckpt:
        return registry.load_synthesizer(registry.resolve(arguments.model), arguments.device)
    from valle.model.ar import AR
    from valle.model.codec import encodec
    from valle.model.nar import NAR

    if not (arguments.ar_ckpt and arguments.nar_ckpt):
        raise ValueError("--ar-ckpt and --nar-ckpt go together")
    codec = encodec.load(arguments.codec, device=arguments.device)
    ar, ar_metadata = checkpoint.load(arguments.ar_ckpt, arguments.device)
    nar, nar_metadata = checkpoint.load(arguments.nar_ckpt, arguments.device)
    if not isinstance(ar, AR) or not isinstance(nar, NAR):
        raise ValueError("--ar-ckpt must hold an AR model, --nar-ckpt a NAR model")
    codec.identity.check(ar_metadata.codec, "the AR checkpoint")
    codec.identity.check(nar_metadata.codec, "the NAR checkpoint")
    return Synthesizer(ar, nar, codec)


def read_reference(names: str, seconds: float) -> Wave:
    """The recording at a path, or an equal share of each of several, `a.wav;b.wav`, such that
    the first `seconds` of the whole have something of all."""
    waves = [audio.read(Path(name).read_bytes(), max_seconds=60) for name in names.split(";")]
    if len(waves) == 1:
        return waves[0]
    share = int(seconds / len(waves) * SAMPLE_RATE)
    return np.concatenate([audio.trim(wave)[:share] for wave in waves])


def main(argv: Sequence[str] | None = None) -> int:
    """Speaks one text; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m valle", description=__doc__)
    parser.add_argument("text", help="what to say")
    parser.add_argument(
        "reference", help="recording of the voice (wav, flac, mp3), or several: 'a.wav;b.wav'"
    )
    parser.add_argument("out", type=Path, help="wav file to write")
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--ar-ckpt", type=Path, help="AR checkpoint, instead of --model")
    parser.add_argument("--nar-ckpt", type=Path, help="NAR checkpoint, instead of --model")
    parser.add_argument("--codec", default="nano", help="codec of --ar-ckpt and --nar-ckpt")
    parser.add_argument("--max-ar-steps", type=int, default=1500, help="length limit in frames")
    parser.add_argument("--ar-temp", type=float, default=1.0, help="temperature of the AR model")
    parser.add_argument("--nar-temp", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=GUIDANCE_SCALE,
        help="how closely both models keep to the text; 1 is off, with half the rows to compute",
    )
    parser.add_argument("--language", default="en-us", help="espeak voice name of the text")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same speech")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    try:
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
        result = synthesizer.synthesize(arguments.text, prompt, synthesis)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_bytes(audio.wav_bytes(result.wave))
    seconds = len(result.wave) / SAMPLE_RATE
    elapsed = time.perf_counter() - started
    limit = ", cut off by the length limit" if result.hit_limit else ""
    print(f"{arguments.out}: {seconds:.2f} s of speech in {elapsed:.2f} s{limit}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
