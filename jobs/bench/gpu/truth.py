"""P1, truth: the card computes what the CPU computes, and every fast path what its slow twin does.

The reference is the same model on the CPU in float64, and the card is held to float32 with TF32
off. Where tokens are drawn, both sides draw on one device, whose generator has numbers of its own;
across devices the most likely tokens are compared.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from valle.jobs.bench.gpu import samples, timing
from valle.jobs.bench.gpu.record import Bench, Record
from valle.jobs.training.objective import (
    Loss,
    Objective,
    Optimization,
    ar_loss,
    build_optimizer,
    draw_levels,
    nar_loss,
)
from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.codec.interface import Codes
from valle.model.config import Kind, ModelConfig
from valle.model.nar import NAR
from valle.model.nar_decoding import Filler, Filling, Unfilled, fill_in
from valle.model.sampling import Sampling
from valle.model.sequence import Batch
from valle.serve.engine.engine import Engine
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

TOLERANCE = 1e-3
"""Relative, of logits, losses and gradients."""

EQUAL_CODES = 0.999
"""Share of a codec's codes that the card must have in common with the CPU."""

WIDE = ModelConfig(width=256, n_heads=4, n_layers=4, dropout=0.0)
"""Large enough for the card's own attention and matrix kernels."""

GREEDY = Sampling(temperature=0.0)
LEVELS = 7
GOLDEN_STEPS = 20


def run(bench: Bench) -> None:
    """All comparisons."""
    record, device = bench.record, bench.device
    attempt = partial(record.attempt, required=True)
    timing.allow_tf32(matmul=False, convolution=False)
    kinds: tuple[Kind, ...] = ("ar", "nar")
    for kind in kinds:
        name = f"golden {kind}"
        attempt(name, partial(compare, record, name, samples.golden(kind), device))
        attempt(f"{name}, trained", partial(golden_run, record, kind, device))
        if not bench.quick:
            wide = samples.build(kind, WIDE, torch.device("cpu")).eval()
            samples.perturb(wide, 0.02)
            attempt(f"wide {kind}", partial(compare, record, f"wide {kind}", wide, device))
    for group in (1, 2):
        attempt(f"cached, group {group}", partial(compare_cached, record, group, device))
        attempt(f"engine, group {group}", partial(compare_engine, record, group, device))
    attempt("filling", partial(filling, record, device))
    seconds = (0.4, 0.7) if bench.quick else (4.0, 7.0, 9.0)
    attempt("codec", partial(codec, record, device, seconds))


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a batch, on whichever device and in whichever precision it computed."""

    logits: Tensor
    """Moved to the CPU, in float64; so are gradients."""
    loss: float
    """Of float32 logits, also where the model is in float64: the loss function rounds them. Its
    error is some 1e-7, a ten-thousandth of the tolerance."""
    gradients: dict[str, Tensor]
    """By parameter."""


def outcome(model: AR | NAR, batch: Batch) -> Outcome:
    """Logits, loss and gradients; of a NAR model, one row a level."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    level = torch.arange(len(batch.frames), device=device) % LEVELS + 1
    model.zero_grad()
    logits = model(batch) if isinstance(model, AR) else model(batch, level)
    loss: Loss = ar_loss(logits, batch) if isinstance(model, AR) else nar_loss(logits, batch, level)
    loss.loss.backward()
    gradients = {
        name: parameter.grad.double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Outcome(logits.detach().double().cpu(), loss.loss.item(), gradients)


def compare(record: Record, name: str, model: AR | NAR, device: torch.device) -> None:
    """Checks a model's logits, loss and gradients on the device against the CPU's."""
    batch = samples.random_batch(18, 25, 40, 33, 12, 29, 50, seed=3)
    reference = outcome(copy.deepcopy(model).double(), batch)
    check_outcome(record, name, outcome(copy.deepcopy(model).float().to(device), batch), reference)


def check_outcome(record: Record, name: str, found: Outcome, reference: Outcome) -> None:
    """Records whether two outcomes agree, and by how much."""
    error = relative(found.logits, reference.logits)
    record.check(f"{name}: logits", error <= TOLERANCE, relative_error=error)
    error = abs(found.loss - reference.loss) / abs(reference.loss)
    record.check(f"{name}: loss", error <= TOLERANCE, relative_error=error, loss=found.loss)
    same = found.gradients.keys() == reference.gradients.keys()
    errors = {
        parameter: relative(found.gradients[parameter], gradient)
        for parameter, gradient in reference.gradients.items()
        if parameter in found.gradients
    }
    worst = max(errors, key=lambda parameter: errors[parameter])
    record.check(
        f"{name}: gradients", same and errors[worst] <= TOLERANCE, parameters=len(errors),
        relative_error=errors[worst], of=worst,
    )  # fmt: skip


def relative(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference by the norm of the reference; infinite where a number is not."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - reference).norm() / reference.norm().clamp_min(1e-12))


def golden_run(record: Record, kind: Kind, device: torch.device) -> None:
    """Checks logits of the golden weights, and the first losses of training them, against the
    numbers that the repository pins."""
    expected = load_file(samples.GOLDEN / f"{kind}_expected.safetensors")
    model = samples.golden(kind).to(device)
    batch = samples.random_batch(18, 25, seed=5).to(device)
    given = (batch,) if isinstance(model, AR) else (batch, torch.tensor([2, 6], device=device))
    with torch.inference_mode():
        logits = model(*given)[:, :4, :32].cpu()
    error = relative(logits, expected["logits"])
    record.check(f"golden {kind}: pinned logits", error <= TOLERANCE, relative_error=error)
    optimizer, objective = build_optimizer(model, Optimization()), Objective(model).train()
    losses = []
    for step in range(GOLDEN_STEPS):
        loss = objective(batch, draw_levels(2, 8, f"golden/{step}").to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    error = relative(torch.stack(losses), expected["losses"][:GOLDEN_STEPS])
    record.check(
        f"golden {kind}: pinned losses of {GOLDEN_STEPS} steps", error <= TOLERANCE,
        relative_error=error, last=float(losses[-1]),
    )  # fmt: skip


def compare_cached(record: Record, group: int, device: torch.device) -> None:
    """Checks `AR.generate` with its cache against itself without, and greedy speech against the
    CPU's."""
    model = samples.lively(group).to(device)
    lengths = []
    equal = True
    for number, sampling in enumerate((GREEDY, *samples.SAMPLINGS)):
        phonemes, prompt, _ = samples.random_items(20 + number, seed=number)[0]
        said = [
            model.generate(
                phonemes.to(device), prompt.to(device), sampling=sampling, max_frames=40,
                generator=torch.Generator(device).manual_seed(number), use_cache=use_cache,
            ).codes.tolist()
            for use_cache in (True, False)
        ]  # fmt: skip
        equal = equal and said[0] == said[1]
        lengths.append(len(said[0]))
    record.check(f"cached = uncached, group {group}", equal, frames=sum(lengths))
    phonemes, prompt, _ = samples.random_items(20)[0]
    talk = []
    for where in (device, torch.device("cpu")):
        speaker = samples.lively(group)
        speaker.head.bias.data[-1] = -1e9  # EOS: it may not stop
        talk.append(
            speaker.to(where).generate(
                phonemes.to(where), prompt.to(where), sampling=GREEDY, max_frames=40,
                generator=torch.Generator(where),
            ).codes.tolist()
        )  # fmt: skip
    record.check(
        f"greedy speech = the CPU's, group {group}", talk[0] == talk[1], frames=len(talk[0]),
        distinct=len(set(talk[1])),
    )  # fmt: skip


def compare_engine(record: Record, group: int, device: torch.device) -> None:
    """Checks an engine of four guided slots against `generate`: more requests than slots, of
    unequal lengths, that come and go."""
    model = samples.lively(group).to(device)
    asked = samples.requests(10)
    runner = Runner(model, slots=4, positions=400, guided=True, piece=16)
    speaker = Engine(runner, Scheduler(4))
    codes: dict[str, list[int]] = {one.id: [] for one in asked}
    for one in asked:
        speaker.add(one)
    while not speaker.idle:
        for event in speaker.step():
            codes[event.id] += event.codes
    different = []
    for one in asked:
        alone = model.generate(
            torch.tensor(one.phonemes, device=device),
            torch.from_numpy(one.prompt.astype(np.int64)).to(device),
            sampling=one.sampling, max_frames=one.max_frames,
            generator=torch.Generator(device).manual_seed(one.seed),
        )  # fmt: skip
        if alone.codes.tolist() != codes[one.id]:
            different.append(one.id)
    record.check(
        f"engine with four guided slots = generate, group {group}", not different,
        requests=len(asked), frames=sum(len(said) for said in codes.values()), different=different,
    )  # fmt: skip


def filling(record: Record, device: torch.device) -> None:
    """Checks the NAR model's batches, prompts remembered, against one sentence at a time."""
    model = samples.golden("nar")
    assert isinstance(model, NAR)
    samples.perturb(model, 0.3)
    nar = model.to(device)
    items = [
        Unfilled(phonemes.tolist(), prompt.numpy().astype(np.int16), codes[0].numpy().astype("i2"))
        for phonemes, prompt, codes in samples.random_items(30, 17, 25, seed=2)
    ]
    items.append(replace(items[0], prompt=items[1].prompt))
    how = Filling(sampling=replace(GREEDY, guidance_scale=1.5), guided_levels=2)
    together = Filler(nar).fill_in(items, how)
    plain = [fill_in(nar, item, how) for item in items]
    equal = sum(int((a == b).sum()) for a, b in zip(together, plain, strict=True))
    total = sum(codes.size for codes in plain)
    record.check("NAR batched = plain", equal == total, codes=total, share=equal / total)


def codec(record: Record, device: torch.device, seconds: tuple[float, ...]) -> None:
    """Checks the shipped codec's codes and samples against the CPU's, and batched against single;
    with TF32 on, the share of equal codes is written down only."""
    waves = [samples.recording(length, seed) for seed, length in enumerate(seconds)]
    on_cpu = encodec.load("nano")
    codes = on_cpu.encode(waves)
    found = encodec.load("nano", device=str(device))
    for tf32 in (False, True):
        timing.allow_tf32(matmul=False, convolution=tf32)
        share = _share(found.encode(waves), codes)
        name = f"codec: codes equal to the CPU's, TF32 {'on' if tf32 else 'off'}"
        if tf32:
            record.measurement(name, share=share)
        else:
            record.check(name, share >= EQUAL_CODES, share=share)
    timing.allow_tf32(matmul=False, convolution=False)
    share = _share([found.encode([wave])[0] for wave in waves], found.encode(waves, 60))
    record.check("codec: codes batched = single", share >= EQUAL_CODES, share=share)
    error = max(
        relative(torch.from_numpy(one), torch.from_numpy(other))
        for one, other in zip(found.decode(codes), on_cpu.decode(codes), strict=True)
    )
    record.check("codec: samples equal to the CPU's", error <= TOLERANCE, relative_error=error)


def _share(found: list[Codes], reference: list[Codes]) -> float:
    equal = sum(int((a == b).sum()) for a, b in zip(found, reference, strict=True))
    return equal / sum(item.size for item in reference)
