"""Filling in codebooks 2 to 8: the plain way, with the prompt remembered, many at once, in chunks.

    python -m valle.jobs.bench.nar --model release/nano

Every variant fills in the same speech, variants take turns, one torch thread. The plain way
computes the prompt again at every level and for every sentence, as reference implementations do;
guidance is twice the work at the levels that have it. In chunks, all that was said is filled in
again for each.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from valle.jobs.bench.timing import median_ratio, time_interleaved
from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest, nar_decode
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.model.valle import Synthesis
from valle.platform import registry

N_PHONEMES, PROMPT_FRAMES = 60, 225
"""A sentence of four seconds, and three seconds of a voice."""


def decode_plain(nar: NAR, items: Sequence[NARRequest], decoding: NARDecoding) -> None:
    """The plain way."""
    for item in items:
        nar_decode(nar, item, decoding)


def decode_chunked(
    nar_decoder: NARDecoder, items: Sequence[NARRequest], decoding: NARDecoding, group: int
) -> None:
    """Sentences as they are streamed, one after the other."""
    for item in items:
        nar_decode_chunks(
            lambda part: nar_decoder.decode([part], decoding)[0], item, Chunking(), group
        )


def decode_one_at_a_time(
    nar_decoder: NARDecoder, items: Sequence[NARRequest], decoding: NARDecoding
) -> None:
    """The prompt remembered, one sentence after the other."""
    for item in items:
        nar_decoder.decode([item], decoding)


def decoding_variants(
    nar: NAR, items: Sequence[NARRequest], guided_levels: int, group: int
) -> dict[str, Callable[[], object]]:
    """Each variant by its name."""
    decoding = Synthesis().nar_decoding
    unguided, some, every = (
        replace(decoding, guided_levels=n) for n in (0, guided_levels, N_CODEBOOKS - 1)
    )
    nar_decoder = NARDecoder(nar)
    variants: dict[str, Callable[[], object]] = {
        "plain, all levels guided": partial(decode_plain, nar, items, every),
        f"plain, {guided_levels} guided": partial(decode_plain, nar, items, some),
        "plain, none guided": partial(decode_plain, nar, items, unguided),
    }
    for label, guided in (("all levels", every), (str(guided_levels), some), ("none", unguided)):
        name = f"prompt remembered, {label} guided"
        variants[f"{name}, one at a time"] = partial(
            decode_one_at_a_time, nar_decoder, items, guided
        )
        variants[f"{name}, together"] = partial(nar_decoder.decode, items, guided)
    variants[f"in chunks, {guided_levels} guided"] = partial(
        decode_chunked, nar_decoder, items, some, group
    )
    return variants


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--frames", type=int, default=300, help="length of the speech")
    parser.add_argument("--sentences", type=int, default=4, help="in the same voice")
    parser.add_argument("--guided-levels", type=int, default=Synthesis().guided_levels)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    bundle = registry.resolve(arguments.model)
    nar = registry.load_nar(bundle)
    random = np.random.default_rng(0)
    prompt = random.integers(0, CODEBOOK_SIZE, (N_CODEBOOKS, PROMPT_FRAMES)).astype(np.int16)
    items = [
        NARRequest(
            random.integers(2, nar.config.n_phonemes, N_PHONEMES).tolist(), prompt,
            random.integers(0, CODEBOOK_SIZE, arguments.frames).astype(np.int16),
        )
        for _ in range(arguments.sentences)
    ]  # fmt: skip
    group = registry.load_ar(bundle).config.group_size
    variants = decoding_variants(nar, items, arguments.guided_levels, group)
    for run in variants.values():  # warm, prompts read
        run()
    seconds = time_interleaved(variants, arguments.rounds, "bench.nar")
    plain = seconds["plain, all levels guided"]
    speech = arguments.sentences * arguments.frames / FRAME_RATE
    report = {
        name: {
            "speedup_over_plain": round(median_ratio(plain, elapsed), 2),
            "real_time_factor": round(statistics.median(elapsed) / speech, 3),
        }
        for name, elapsed in seconds.items()
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
