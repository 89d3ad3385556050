"""P6, the NAR model at work on 1, 8 and 32 sentences, and memory: planned against taken.

The plan is what an endpoint of one card will hold: the weights of both models, the engine's keys
and values for every slot, those of the text being read, and the prompts that the NAR model
remembers at each of its levels.
"""

import gc
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from valle.jobs.bench.gpu import samples, timing
from valle.jobs.bench.gpu.record import Bench
from valle.jobs.bench.gpu.streams import Task, add
from valle.model.ar import AR
from valle.model.config import ModelConfig
from valle.model.nar import NAR
from valle.model.nar_decoding import Filler, Filling, Unfilled, fill_in
from valle.model.precision import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.serve.engine.engine import Engine
from valle.serve.engine.prefill import Reader
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

FILLING = Filling(sampling=Sampling(temperature=0.0, guidance_scale=1.5), guided_levels=2)
"""The default of `model.valle.Synthesis`."""

SENTENCES: Final = (1, 8, 32)
PLAN_ERROR = 0.05
"""Share by which memory may differ from the plan, the allocator's rounding included."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one card is to hold."""

    slots: int
    positions: int
    """Of a slot: text, prompt and speech."""
    prompts: int
    """That the NAR model remembers."""
    prompt_frames: int


def run(bench: Bench) -> None:
    """Both precisions, then the plan."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    if bench.on_card and not bench.quick:
        for precision in precisions:
            bench.record.expect_floor(floor_name(precision), 1.0)
    timing.allow_tf32(matmul=False, convolution=False)
    for precision in precisions:
        model = samples.build("nar", bench.config, bench.device).eval()
        assert isinstance(model, NAR)
        nar = convert(model, precision)
        for count in (1, 3) if bench.quick else SENTENCES:
            name = f"NAR {count} {precision}"
            bench.record.attempt(name, partial(measure, bench, nar, name, count), 2)
        del model, nar
    load = Load(slots=64, positions=2727, prompts=8, prompt_frames=225)
    if bench.quick:
        load = Load(slots=3, positions=50, prompts=2, prompt_frames=9)
    for precision in precisions:
        bench.record.attempt(f"memory {precision}", partial(memory, bench, load, precision), 5)


def measure(bench: Bench, nar: NAR, name: str, count: int) -> None:
    """So many sentences of four seconds in one voice, at once, and one of them the plain way."""
    items = sentences(bench.quick, count)
    frames = len(items[0].first)
    filler = Filler(nar)
    filler.fill_in(items, FILLING)  # warm, the prompt read
    repeats = 1 if bench.quick else 3
    timing.reset_peak(bench.device)
    seconds = min(timing.seconds(bench.device, lambda: filler.fill_in(items, FILLING), repeats))
    plain = None
    if count == 1:
        fill_in(nar, items[0], FILLING)
        plain = min(timing.seconds(bench.device, lambda: fill_in(nar, items[0], FILLING), repeats))
    bench.record.measurement(
        name, milliseconds=1000 * seconds, times_real_time=count * frames / FRAME_RATE / seconds,
        plain_milliseconds=None if plain is None else 1000 * plain,
        peak_gigabytes=timing.peak_gigabytes(bench.device),
    )  # fmt: skip


def sentences(quick: bool, count: int) -> list[Unfilled]:
    """Sentences of four seconds in one voice of three; quick, short ones."""
    generator = np.random.default_rng(0)
    n_phonemes, prompt_frames, frames = (6, 9, 12) if quick else (60, 225, 300)
    prompt = samples.random_codes(generator, N_CODEBOOKS, prompt_frames)
    return [
        Unfilled(
            generator.integers(2, 100, n_phonemes).tolist(), prompt,
            samples.random_codes(generator, frames),
        )
        for _ in range(count)
    ]  # fmt: skip


def planned(config: ModelConfig, load: Load, element: int) -> dict[str, int]:
    """Bytes by purpose, for guided streams, in numbers of `element` bytes."""
    width, layers = config.width, config.n_layers
    block = 12 * width * width + 3 * width + 5 * width  # matrices; biases of qkv, feed-forward
    text = config.n_phonemes * width
    table = CODEBOOK_SIZE * width
    separators = 5 * width  # two separators, three segments
    levels = config.n_codebooks - 1
    ar = layers * (block + 4 * width) + 2 * width + text + separators
    ar += (config.n_codebooks + config.group) * table + (CODEBOOK_SIZE + 1) * (width + 1)
    nar = layers * (block + 4 * width * levels) + 2 * width * levels + text + separators
    nar += (config.n_codebooks + 2 * levels) * table
    row = 2 * layers * width  # a position's keys and values
    return {
        "ar": element * ar,
        "nar": element * nar,
        "slots": element * row * load.positions * 2 * load.slots,
        "reading": element * row * load.positions * 2,
        "prompts": element * row * load.prompt_frames * levels * load.prompts,
    }


def memory(bench: Bench, load: Load, precision: Precision) -> None:
    """Builds all of it and compares: with the allocator's count on a card, else with the sizes of
    the tensors themselves."""
    config = replace(bench.config, dropout=0.0)
    plan = planned(config, load, 2 if precision == "bf16" else 4)
    gc.collect()
    timing.reset_peak(bench.device)
    before = torch.cuda.memory_allocated(bench.device) if bench.on_card else 0
    ar = samples.build("ar", config, bench.device).eval()
    nar = samples.build("nar", config, bench.device).eval()
    assert isinstance(ar, AR) and isinstance(nar, NAR)
    convert(ar, precision), convert(nar, precision)
    runner = Runner(ar, slots=load.slots, positions=load.positions, guided=True)
    generator = np.random.default_rng(0)
    prompts = [
        nar.read_prompt(
            torch.from_numpy(
                samples.random_codes(generator, N_CODEBOOKS, load.prompt_frames).astype(np.int64)
            ),
            nar.n_levels,
        )
        for _ in range(load.prompts)
    ]
    gc.collect()
    timing.synchronize(bench.device)
    if bench.on_card and not bench.quick:  # it rounds small tensors up to 512 bytes
        taken = torch.cuda.memory_allocated(bench.device) - before
    else:
        kept = [runner._cache.keys, runner._cache.values, *_reading(runner.reader)]
        kept += [tensor for prompt in prompts for tensor in (prompt.keys, prompt.values)]
        taken = sum(_bytes(part) for part in [*ar.parameters(), *nar.parameters(), *kept])
    total = sum(plan.values())
    bench.record.check(
        f"memory as planned, {precision}", abs(taken / total - 1) <= PLAN_ERROR,
        planned_gigabytes=total / 1e9, taken_gigabytes=taken / 1e9,
        **{f"{name}_gigabytes": size / 1e9 for name, size in plan.items()},
    )  # fmt: skip
    work(bench, load, precision, runner, nar, before, total)


def work(
    bench: Bench, load: Load, precision: Precision, runner: Runner, nar: NAR, before: int, plan: int
) -> None:
    """A tick of all slots, then the most sentences that the NAR model fills in at once: holds the
    allocator's peak against the plan and what is stated for work."""
    device, config = bench.device, bench.config
    task = Task.of(bench.quick)
    count = 3 if bench.quick else SENTENCES[-1]
    engine = Engine(runner, Scheduler(load.slots))
    add(engine, task, load.slots, samples.GUIDED, task.frames)
    while engine.running < load.slots:
        engine.step()
        assert not engine.idle, "the first ended before the last had been read"
    timing.reset_peak(device)
    engine.step()
    tick = timing.peak_gigabytes(device)
    filler = Filler(nar, load.prompts)
    items = sentences(bench.quick, count)
    filler.fill_in(items[:1], FILLING)  # the prompt is read: it is in the plan
    timing.reset_peak(device)
    filler.fill_in(items, FILLING)
    filled = timing.peak_gigabytes(device)
    positions = items[0].prompt.shape[1] + len(items[0].ids) + len(items[0].first) + 2
    stated = working(config, 2 * count, positions, 2 if precision == "bf16" else 4)
    bench.record.measurement(
        f"memory at work, {precision}", tick_peak_gigabytes=tick, filling_peak_gigabytes=filled,
        before_gigabytes=before / 1e9, planned_gigabytes=plan / 1e9, stated_gigabytes=stated / 1e9,
    )  # fmt: skip
    if tick is not None and filled is not None and not bench.quick:
        most = max(tick, filled) - before / 1e9
        bench.record.floor(floor_name(precision), (plan + stated) / 1e9 / most)


def floor_name(precision: Precision) -> str:
    """Of the planned memory against the peak; below 1, an endpoint that fits on paper fails."""
    return f"memory planned, with work, by the peak, {precision}"


def working(config: ModelConfig, rows: int, positions: int, element: int) -> int:
    """Bytes stated for the NAR model's work on so many rows.

    Of each position, 24 numbers of the width: the residual stream before and after, its norm,
    queries, keys and values (twice: as projected, and with the prompt's before them), what
    attention and feed-forward (four widths, twice) leave; seven codebooks' embeddings; and logits
    of one level four times in float32. Of each pair of positions, a bias of attention.
    """
    embeddings = (config.n_codebooks - 1) * config.width
    own = element * (24 * config.width + embeddings) + 4 * 4 * CODEBOOK_SIZE
    return rows * positions * (own + element * positions)


def _reading(reader: Reader) -> list[Tensor]:
    return [reader.kept.keys, reader.kept.values]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
