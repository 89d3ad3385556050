"""NAR decoding of codebooks 2 to 8: plain, with the prompt cached, in batches, and in chunks.

    python -m valle.jobs.bench.nar --model release/nano

Every variant decodes the same speech, on one torch thread, in alternating rounds. The plain variant
computes the prompt again at every level and for every sentence, as reference implementations do.
Guidance doubles the work of the levels that have it. In chunks, everything decoded so far is
decoded again for each chunk.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from valle.jobs.bench.command_line import build_parser, print_report
from valle.jobs.bench.gpu.workload import nar_requests
from valle.jobs.bench.timing import median_ratio, time_interleaved
from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest, nar_decode
from valle.model.tokens import FRAME_RATE, N_CODEBOOKS
from valle.model.valle import Synthesis
from valle.platform import registry

REFERENCE = "plain, all levels guided"
"""The variant that the others are compared with."""


def decode_plain(nar: NAR, items: Sequence[NARRequest], decoding: NARDecoding) -> None:
    """Nothing is cached and nothing batched."""
    for item in items:
        nar_decode(nar, item, decoding)


def decode_one_at_a_time(
    nar_decoder: NARDecoder, items: Sequence[NARRequest], decoding: NARDecoding
) -> None:
    """Prompts are cached, sentences are not batched."""
    for item in items:
        nar_decoder.decode([item], decoding)


def decode_chunked(
    nar_decoder: NARDecoder, items: Sequence[NARRequest], decoding: NARDecoding, group: int
) -> None:
    """Sentences one after the other, each in the chunks in which an endpoint streams it."""
    for item in items:
        nar_decode_chunks(
            lambda part: nar_decoder.decode([part], decoding)[0], item, Chunking(), group
        )


def decoding_variants(
    nar: NAR, items: Sequence[NARRequest], guided_levels: int, group: int
) -> dict[str, Callable[[], object]]:
    """Each variant by its name; `group` is the AR model's, which bounds chunks."""
    decoding = Synthesis().nar_decoding
    unguided, some, every = (
        replace(decoding, guided_levels=n) for n in (0, guided_levels, N_CODEBOOKS - 1)
    )
    nar_decoder = NARDecoder(nar)
    variants: dict[str, Callable[[], object]] = {
        REFERENCE: partial(decode_plain, nar, items, every),
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--frames", type=int, default=300, help="length of the speech")
    parser.add_argument("--sentences", type=int, default=4, help="of the same voice")
    parser.add_argument("--guided-levels", type=int, default=Synthesis().guided_levels)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    bundle = registry.resolve(arguments.model)
    nar, group = registry.load_nar(bundle), registry.load_ar(bundle).config.group_size
    items = nar_requests(arguments.sentences, frames=arguments.frames)
    variants = decoding_variants(nar, items, arguments.guided_levels, group)
    for run in variants.values():  # warm-up: prompts enter the cache
        run()
    seconds = time_interleaved(variants, arguments.rounds, "bench.nar")
    speech = arguments.sentences * arguments.frames / FRAME_RATE
    print_report(
        {
            name: {
                "speedup_over_plain": round(median_ratio(seconds[REFERENCE], elapsed), 2),
                "real_time_factor": round(statistics.median(elapsed) / speech, 3),
            }
            for name, elapsed in seconds.items()
        }
    )


if __name__ == "__main__":
    main()
