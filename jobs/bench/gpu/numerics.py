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

from valle.jobs.bench.gpu import device_timing, synthetic
from valle.jobs.bench.gpu.record import PhaseContext, Record
from valle.jobs.training.augmentation import draw_levels
from valle.jobs.training.objective import Loss, Objective, ar_loss, nar_loss
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.codec.interface import Codes
from valle.model.config import Kind, ModelConfig
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest, nar_decode
from valle.model.sampling import Sampling
from valle.model.sequence import Batch
from valle.serve.engine.engine import Engine
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

TOLERANCE = 1e-3
"""Relative, of logits, losses and gradients."""

MIN_EQUAL_CODES = 0.999
"""Share of a codec's codes that the card must have in common with the CPU."""

WIDE = ModelConfig(width=256, n_heads=4, n_layers=4, dropout=0.0)
"""Large enough for the card's own attention and matrix kernels."""

GREEDY = Sampling(temperature=0.0)
N_LEVELS = 7
GOLDEN_STEPS = 20


def run(context: PhaseContext) -> None:
    """All comparisons."""
    record, device = context.record, context.device
    attempt = partial(record.attempt, required=True)
    device_timing.allow_tf32(matmul=False, convolution=False)
    kinds: tuple[Kind, ...] = ("ar", "nar")
    for kind in kinds:
        name = f"golden {kind}"
        attempt(name, partial(compare_with_cpu, record, name, synthetic.golden_model(kind), device))
        attempt(f"{name}, trained", partial(golden_run, record, kind, device))
        if not context.quick:
            wide = synthetic.build_model(kind, WIDE, torch.device("cpu")).eval()
            synthetic.perturb(wide, 0.02)
            attempt(f"wide {kind}", partial(compare_with_cpu, record, f"wide {kind}", wide, device))
    for group in (1, 2):
        attempt(f"cached, group {group}", partial(compare_cached, record, group, device))
        attempt(f"engine, group {group}", partial(compare_engine, record, group, device))
    attempt("NAR", partial(compare_nar, record, device))
    seconds = (0.4, 0.7) if context.quick else (4.0, 7.0, 9.0)
    attempt("codec", partial(compare_codec, record, device, seconds))


@dataclass(frozen=True)
class ModelOutputs:
    """What a model makes of a batch, on whichever device and in whichever precision it computed."""

    logits: Tensor
    """Moved to the CPU, in float64; so are gradients."""
    loss: float
    """Of float32 logits, also where the model is in float64: the loss function rounds them. Its
    error is some 1e-7, a ten-thousandth of the tolerance."""
    gradients: dict[str, Tensor]
    """By parameter."""


def compute_outputs(model: AR | NAR, batch: Batch) -> ModelOutputs:
    """Logits, loss and gradients; of a NAR model, one row a level."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    level = torch.arange(len(batch.frames), device=device) % N_LEVELS + 1
    model.zero_grad()
    logits = model(batch) if isinstance(model, AR) else model(batch, level)
    loss: Loss = ar_loss(logits, batch) if isinstance(model, AR) else nar_loss(logits, batch, level)
    loss.loss.backward()
    gradients = {
        name: parameter.grad.double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return ModelOutputs(logits.detach().double().cpu(), loss.loss.item(), gradients)


def compare_with_cpu(record: Record, name: str, model: AR | NAR, device: torch.device) -> None:
    """Checks a model's logits, loss and gradients on the device against the CPU's."""
    batch = synthetic.random_batch(18, 25, 40, 33, 12, 29, 50, seed=3)
    reference = compute_outputs(copy.deepcopy(model).double(), batch)
    check_outputs(
        record, name, compute_outputs(copy.deepcopy(model).float().to(device), batch), reference
    )


def check_outputs(
    record: Record, name: str, outputs: ModelOutputs, reference: ModelOutputs
) -> None:
    """Records whether two outcomes agree, and by how much."""
    error = relative_error(outputs.logits, reference.logits)
    record.check(f"{name}: logits", error <= TOLERANCE, relative_error=error)
    error = abs(outputs.loss - reference.loss) / abs(reference.loss)
    record.check(f"{name}: loss", error <= TOLERANCE, relative_error=error, loss=outputs.loss)
    same = outputs.gradients.keys() == reference.gradients.keys()
    errors = {
        parameter: relative_error(outputs.gradients[parameter], gradient)
        for parameter, gradient in reference.gradients.items()
        if parameter in outputs.gradients
    }
    worst = max(errors, key=lambda parameter: errors[parameter])
    record.check(
        f"{name}: gradients", same and errors[worst] <= TOLERANCE, parameters=len(errors),
        relative_error=errors[worst], of=worst,
    )  # fmt: skip


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference by the norm of the reference; infinite where a number is not."""
    if not bool(value.isfinite().all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))


def golden_run(record: Record, kind: Kind, device: torch.device) -> None:
    """Checks logits of the golden weights, and the first losses of training them, against the
    numbers that the repository pins."""
    expected = load_file(synthetic.GOLDEN / f"{kind}_expected.safetensors")
    model = synthetic.golden_model(kind).to(device)
    batch = synthetic.random_batch(18, 25, seed=5).to(device)
    inputs = (batch,) if isinstance(model, AR) else (batch, torch.tensor([2, 6], device=device))
    with torch.inference_mode():
        logits = model(*inputs)[:, :4, :32].cpu()
    error = relative_error(logits, expected["logits"])
    record.check(f"golden {kind}: pinned logits", error <= TOLERANCE, relative_error=error)
    optimizer, objective = build_optimizer(model, Optimization()), Objective(model).train()
    losses = []
    for step in range(GOLDEN_STEPS):
        loss = objective(batch, draw_levels(2, 8, f"golden/{step}").to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    error = relative_error(torch.stack(losses), expected["losses"][:GOLDEN_STEPS])
    record.check(
        f"golden {kind}: pinned losses of {GOLDEN_STEPS} steps", error <= TOLERANCE,
        relative_error=error, last=float(losses[-1]),
    )  # fmt: skip


def compare_cached(record: Record, group: int, device: torch.device) -> None:
    """Checks `AR.generate` with its cache against itself without, and greedy speech against the
    CPU's."""
    model = synthetic.short_ar(group).to(device)
    lengths = []
    equal = True
    for number, sampling in enumerate((GREEDY, *synthetic.SAMPLINGS)):
        phonemes, prompt, _ = synthetic.random_items(20 + number, seed=number)[0]
        codes = [
            model.generate(
                phonemes.to(device), prompt.to(device), sampling=sampling, max_frames=40,
                generator=torch.Generator(device).manual_seed(number), use_cache=use_cache,
            ).codes.tolist()
            for use_cache in (True, False)
        ]  # fmt: skip
        equal = equal and codes[0] == codes[1]
        lengths.append(len(codes[0]))
    record.check(f"cached = uncached, group {group}", equal, frames=sum(lengths))
    phonemes, prompt, _ = synthetic.random_items(20)[0]
    greedy_codes = []
    for target in (device, torch.device("cpu")):
        model = synthetic.short_ar(group)
        model.head.bias.data[-1] = -1e9  # EOS: it may not stop
        greedy_codes.append(
            model.to(target).generate(
                phonemes.to(target), prompt.to(target), sampling=GREEDY, max_frames=40,
                generator=torch.Generator(target),
            ).codes.tolist()
        )  # fmt: skip
    record.check(
        f"greedy speech = the CPU's, group {group}", greedy_codes[0] == greedy_codes[1],
        frames=len(greedy_codes[0]), distinct=len(set(greedy_codes[1])),
    )  # fmt: skip


def compare_engine(record: Record, group: int, device: torch.device) -> None:
    """Checks an engine of four guided slots against `generate`: more requests than slots, of
    unequal lengths, that come and go."""
    model = synthetic.short_ar(group).to(device)
    requests = synthetic.random_requests(10)
    runner = Runner(model, slots=4, max_positions=400, guided=True, prefill_chunk=16)
    engine = Engine(runner, Scheduler(4))
    codes: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while not engine.idle:
        for step_output in engine.step():
            codes[step_output.request_id] += step_output.codes
    different = []
    for request in requests:
        output = model.generate(
            torch.tensor(request.phonemes, device=device),
            torch.from_numpy(request.prompt.astype(np.int64)).to(device),
            sampling=request.sampling, max_frames=request.max_frames,
            generator=torch.Generator(device).manual_seed(request.seed),
        )  # fmt: skip
        if output.codes.tolist() != codes[request.id]:
            different.append(request.id)
    record.check(
        f"engine with four guided slots = generate, group {group}", not different,
        requests=len(requests), frames=sum(len(c) for c in codes.values()), different=different,
    )  # fmt: skip


def compare_nar(record: Record, device: torch.device) -> None:
    """Checks the NAR model's batches, prompts remembered, against one sentence at a time."""
    model = synthetic.golden_model("nar")
    assert isinstance(model, NAR)
    synthetic.perturb(model, 0.3)
    nar = model.to(device)
    items = [
        NARRequest(
            phonemes.tolist(), prompt.numpy().astype(np.int16), codes[0].numpy().astype("i2")
        )
        for phonemes, prompt, codes in synthetic.random_items(30, 17, 25, seed=2)
    ]
    items.append(replace(items[0], prompt=items[1].prompt))
    decoding = NARDecoding(sampling=replace(GREEDY, guidance_scale=1.5), guided_levels=2)
    batched = NARDecoder(nar).decode(items, decoding)
    plain = [nar_decode(nar, item, decoding) for item in items]
    equal = sum(int((a == b).sum()) for a, b in zip(batched, plain, strict=True))
    total = sum(codes.size for codes in plain)
    record.check("NAR batched = plain", equal == total, codes=total, share=equal / total)


def compare_codec(record: Record, device: torch.device, seconds: tuple[float, ...]) -> None:
    """Checks the shipped codec's codes and samples against the CPU's, and batched against single;
    with TF32 on, the share of equal codes is written down only."""
    waves = [synthetic.recording(length, seed) for seed, length in enumerate(seconds)]
    on_cpu = encodec.load("nano")
    codes = on_cpu.encode(waves)
    codec = encodec.load("nano", device=str(device))
    for tf32 in (False, True):
        device_timing.allow_tf32(matmul=False, convolution=tf32)
        share = _equal_share(codec.encode(waves), codes)
        name = f"codec: codes equal to the CPU's, TF32 {'on' if tf32 else 'off'}"
        if tf32:
            record.measurement(name, share=share)
        else:
            record.check(name, share >= MIN_EQUAL_CODES, share=share)
    device_timing.allow_tf32(matmul=False, convolution=False)
    share = _equal_share([codec.encode([wave])[0] for wave in waves], codec.encode(waves, 60))
    record.check("codec: codes batched = single", share >= MIN_EQUAL_CODES, share=share)
    error = max(
        relative_error(torch.from_numpy(one), torch.from_numpy(other))
        for one, other in zip(codec.decode(codes), on_cpu.decode(codes), strict=True)
    )
    record.check("codec: samples equal to the CPU's", error <= TOLERANCE, relative_error=error)


def _equal_share(codes: list[Codes], reference: list[Codes]) -> float:
    equal = sum(int((a == b).sum()) for a, b in zip(codes, reference, strict=True))
    return equal / sum(item.size for item in reference)
