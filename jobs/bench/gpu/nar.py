"""P6, NAR decoding of 1, 8 and 32 sentences, and memory: planned against allocated.

The plan lists what an endpoint holds on one device: the weights of both models, the engine's KV
cache of every slot and of the prefill, and the NAR model's cached prompts at each of its levels.
"""

import gc
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from valle.jobs.bench.gpu import device_timing, synthetic
from valle.jobs.bench.gpu.record import PhaseContext
from valle.jobs.bench.gpu.workload import (
    QUICK_FRAMES,
    QUICK_PHONEMES,
    QUICK_PROMPT_FRAMES,
    Workload,
    add_streams,
    nar_requests,
)
from valle.model.ar import AR
from valle.model.config import ModelConfig
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest, nar_decode
from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.serve.engine.engine import Engine
from valle.serve.engine.prefill import ChunkedPrefill
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

NAR_DECODING = NARDecoding(sampling=Sampling(temperature=0.0, guidance_scale=1.5), guided_levels=2)
"""The default of `model.valle.Synthesis`."""

BATCH_SIZES: Final = (1, 8, 32)
PLAN_TOLERANCE = 0.05
"""Relative difference allowed between memory and plan, the allocator's rounding included."""


@dataclass(frozen=True, kw_only=True)
class ServingLoad:
    """Capacity of an endpoint on one device."""

    slots: int
    positions: int
    """Positions of a slot: text, prompt and speech."""
    prompts: int
    """Prompts in the NAR model's cache."""
    prompt_frames: int


def run(context: PhaseContext) -> None:
    """Measures decoding in both precisions, then memory."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    if context.on_gpu and not context.quick:
        for precision in precisions:
            context.record.expect_floor(memory_floor_name(precision), 1.0)
    device_timing.allow_tf32(matmul=False, convolution=False)
    for precision in precisions:
        model = synthetic.build_model("nar", context.config, context.device).eval()
        assert isinstance(model, NAR)
        nar = convert(model, precision)
        for count in (1, 3) if context.quick else BATCH_SIZES:
            name = f"NAR {count} {precision}"
            context.record.attempt(name, partial(measure, context, nar, name, count), 2)
        del model, nar
    load = ServingLoad(slots=64, positions=2727, prompts=8, prompt_frames=225)
    if context.quick:
        load = ServingLoad(slots=3, positions=50, prompts=2, prompt_frames=9)
    for precision in precisions:
        context.record.attempt(
            f"memory {precision}", partial(check_memory, context, load, precision), 5
        )


def measure(context: PhaseContext, nar: NAR, name: str, count: int) -> None:
    """Times decoding `count` sentences as one batch, and one sentence without prompt cache."""
    items = sentences(context.quick, count)
    frames = len(items[0].first_codebook)
    nar_decoder = NARDecoder(nar)
    nar_decoder.decode(items, NAR_DECODING)  # warm-up; the prompt enters the cache
    repeats = 1 if context.quick else 3
    device_timing.reset_peak(context.device)
    seconds = min(
        device_timing.time_calls(
            context.device, lambda: nar_decoder.decode(items, NAR_DECODING), repeats
        )
    )
    plain = None
    if count == 1:
        nar_decode(nar, items[0], NAR_DECODING)
        plain = min(
            device_timing.time_calls(
                context.device, lambda: nar_decode(nar, items[0], NAR_DECODING), repeats
            )
        )
    context.record.measurement(
        name,
        milliseconds=1000 * seconds,
        times_real_time=count * frames / FRAME_RATE / seconds,
        plain_milliseconds=None if plain is None else 1000 * plain,
        peak_gigabytes=device_timing.peak_gigabytes(context.device),
    )


def sentences(quick: bool, count: int) -> list[NARRequest]:
    """`count` sentences of one voice; quick, short ones."""
    if not quick:
        return nar_requests(count)
    return nar_requests(
        count,
        n_phonemes=QUICK_PHONEMES,
        prompt_frames=QUICK_PROMPT_FRAMES,
        frames=QUICK_FRAMES,
    )


def plan_memory(config: ModelConfig, load: ServingLoad, element: int) -> dict[str, int]:
    """Bytes by purpose, for guided streams and elements of `element` bytes."""
    width, layers = config.width, config.n_layers
    block = 12 * width * width + 3 * width + 5 * width  # matrices; biases of qkv, feed-forward
    text = config.n_phonemes * width
    table = CODEBOOK_SIZE * width
    separators = 5 * width  # two separators, three segments
    levels = config.n_codebooks - 1
    ar = layers * (block + 4 * width) + 2 * width + text + separators
    ar += (config.n_codebooks + 1) * table + (CODEBOOK_SIZE + 1) * (width + 1)
    nar = layers * (block + 4 * width * levels) + 2 * width * levels + text + separators
    nar += (config.n_codebooks + 2 * levels) * table
    row = 2 * layers * width  # a position's keys and values
    return {
        "ar": element * ar,
        "nar": element * nar,
        "slots": element * row * load.positions * 2 * load.slots,
        "prefill": element * row * load.positions * 2,
        "prompts": element * row * load.prompt_frames * levels * load.prompts,
    }


def check_memory(context: PhaseContext, load: ServingLoad, precision: Precision) -> None:
    """Builds everything in the plan and compares its size: on a CUDA device by the allocator's
    count, on a CPU by the sizes of the tensors."""
    config = replace(context.config, dropout=0.0)
    plan = plan_memory(config, load, 2 if precision == "bf16" else 4)
    gc.collect()
    device_timing.reset_peak(context.device)
    before = torch.cuda.memory_allocated(context.device) if context.on_gpu else 0
    ar = synthetic.build_model("ar", config, context.device).eval()
    nar = synthetic.build_model("nar", config, context.device).eval()
    assert isinstance(ar, AR) and isinstance(nar, NAR)
    convert(ar, precision), convert(nar, precision)
    runner = Runner(ar, slots=load.slots, max_positions=load.positions, guided=True)
    generator = np.random.default_rng(0)
    prompts = [
        nar.prefill_prompt(
            torch.from_numpy(
                synthetic.random_codes(generator, N_CODEBOOKS, load.prompt_frames).astype(np.int64)
            ),
            nar.n_levels,
        )
        for _ in range(load.prompts)
    ]
    gc.collect()
    device_timing.synchronize(context.device)
    if context.on_gpu and not context.quick:  # the allocator rounds small tensors up to 512 bytes
        allocated = torch.cuda.memory_allocated(context.device) - before
    else:
        caches = [runner._cache.keys, runner._cache.values, *_prefill_cache(runner.prefill)]
        caches += [tensor for prompt in prompts for tensor in (prompt.keys, prompt.values)]
        allocated = sum(_bytes(part) for part in [*ar.parameters(), *nar.parameters(), *caches])
    total = sum(plan.values())
    context.record.check(
        f"memory as planned, {precision}",
        abs(allocated / total - 1) <= PLAN_TOLERANCE,
        planned_gigabytes=total / 1e9,
        allocated_gigabytes=allocated / 1e9,
        **{f"{name}_gigabytes": size / 1e9 for name, size in plan.items()},
    )
    measure_peak(context, load, precision, runner, nar, before, total)


def measure_peak(
    context: PhaseContext,
    load: ServingLoad,
    precision: Precision,
    runner: Runner,
    nar: NAR,
    before: int,
    plan: int,
) -> None:
    """Compares the allocator's peak with the plan plus the stated working memory.

    The peak is that of a decode step of all slots, or of the largest batch of the NAR model.
    """
    device, config = context.device, context.config
    workload = Workload.default(context.quick)
    count = 3 if context.quick else BATCH_SIZES[-1]
    engine = Engine(runner, Scheduler(load.slots))
    add_streams(engine, workload, load.slots, synthetic.GUIDED_SAMPLING, workload.frames)
    # a decode step of all slots
    while engine.n_running < load.slots:
        engine.step()
        assert not engine.idle, "a stream ended before the last prefill: raise the number of frames"
    device_timing.reset_peak(device)
    engine.step()
    step_peak = device_timing.peak_gigabytes(device)
    # the largest batch of the NAR model
    nar_decoder = NARDecoder(nar, load.prompts)
    items = sentences(context.quick, count)
    nar_decoder.decode(items[:1], NAR_DECODING)  # the cached prompt is in the plan
    device_timing.reset_peak(device)
    nar_decoder.decode(items, NAR_DECODING)
    nar_peak = device_timing.peak_gigabytes(device)
    positions = items[0].prompt.shape[1] + len(items[0].phonemes) + len(items[0].first_codebook) + 2
    working = working_memory(config, 2 * count, positions, 2 if precision == "bf16" else 4)
    context.record.measurement(
        f"memory at work, {precision}",
        step_peak_gigabytes=step_peak,
        nar_peak_gigabytes=nar_peak,
        before_gigabytes=before / 1e9,
        planned_gigabytes=plan / 1e9,
        working_gigabytes=working / 1e9,
    )
    if step_peak is not None and nar_peak is not None and not context.quick:
        peak = max(step_peak, nar_peak) - before / 1e9
        context.record.floor(memory_floor_name(precision), (plan + working) / 1e9 / peak)


def memory_floor_name(precision: Precision) -> str:
    """Name of the floor; below 1, an endpoint that fits by the plan runs out of memory."""
    return f"memory planned, with work, by the peak, {precision}"


def working_memory(config: ModelConfig, rows: int, positions: int, element: int) -> int:
    """Bytes stated for the activations of the NAR model.

    For each position, 24 times the width: the residual stream before and after, its norm, queries,
    keys and values (twice: as projected, and behind the prompt's), the outputs of attention and of
    the feed-forward layer (four widths, twice); the embeddings of seven codebooks; and the logits
    of one level four times in float32. For each pair of positions, a bias of attention.
    """
    embeddings = (config.n_codebooks - 1) * config.width
    own = element * (24 * config.width + embeddings) + 4 * 4 * CODEBOOK_SIZE
    return rows * positions * (own + element * positions)


def _prefill_cache(prefill: ChunkedPrefill) -> list[Tensor]:
    return [prefill.cache.keys, prefill.cache.values]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
