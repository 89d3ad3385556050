"""Filling in codebooks 2 to 8: the plain way, with the prompt remembered, many at once, in chunks.

    python -m valle.jobs.bench.nar --model release/nano

Every way fills in the same speech, ways take turns, one torch thread. The plain way computes the
prompt again at every level and for every sentence, as reference implementations do; guidance is
twice the work at the levels that have it. In chunks, all that was said is filled in again for each.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from valle.jobs.bench.timing import ratio, take_turns
from valle.model.chunks import Chunking, fill_in_chunks
from valle.model.nar import NAR
from valle.model.nar_decoding import Filler, Filling, Unfilled, fill_in
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.model.valle import Synthesis
from valle.platform import registry

N_PHONEMES, PROMPT_FRAMES = 60, 225
"""A sentence of four seconds, and three seconds of a voice."""


def one_after_the_other(nar: NAR, items: Sequence[Unfilled], how: Filling) -> None:
    """The plain way."""
    for item in items:
        fill_in(nar, item, how)


def in_chunks(filler: Filler, items: Sequence[Unfilled], how: Filling, group: int) -> None:
    """Sentences as they are streamed, one after the other."""
    for item in items:
        fill_in_chunks(lambda part: filler.fill_in([part], how)[0], item, Chunking(), group)


def alone(filler: Filler, items: Sequence[Unfilled], how: Filling) -> None:
    """The prompt remembered, one sentence after the other."""
    for item in items:
        filler.fill_in([item], how)


def ways_of(
    nar: NAR, items: Sequence[Unfilled], guided_levels: int, group: int
) -> dict[str, Callable[[], object]]:
    """Each way by its name."""
    how = Synthesis().filling
    unguided, some, every = (
        replace(how, guided_levels=n) for n in (0, guided_levels, N_CODEBOOKS - 1)
    )
    filler = Filler(nar)
    found: dict[str, Callable[[], object]] = {
        "plain, all levels guided": partial(one_after_the_other, nar, items, every),
        f"plain, {guided_levels} guided": partial(one_after_the_other, nar, items, some),
        "plain, none guided": partial(one_after_the_other, nar, items, unguided),
    }
    for label, chosen in (("all levels", every), (str(guided_levels), some), ("none", unguided)):
        name = f"prompt remembered, {label} guided"
        found[f"{name}, one at a time"] = partial(alone, filler, items, chosen)
        found[f"{name}, together"] = partial(filler.fill_in, items, chosen)
    found[f"in chunks, {guided_levels} guided"] = partial(in_chunks, filler, items, some, group)
    return found


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
        Unfilled(
            random.integers(2, nar.config.n_phonemes, N_PHONEMES).tolist(), prompt,
            random.integers(0, CODEBOOK_SIZE, arguments.frames).astype(np.int16),
        )
        for _ in range(arguments.sentences)
    ]  # fmt: skip
    group = registry.load_ar(bundle).config.group
    ways = ways_of(nar, items, arguments.guided_levels, group)
    for run in ways.values():  # warm, prompts read
        run()
    seconds = take_turns(ways, arguments.rounds, "bench_nar")
    plain = seconds["plain, all levels guided"]
    speech = arguments.sentences * arguments.frames / FRAME_RATE
    report = {
        name: {
            "times_plain": round(ratio(plain, taken), 2),
            "real_time_factor": round(statistics.median(taken) / speech, 3),
        }
        for name, taken in seconds.items()
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
