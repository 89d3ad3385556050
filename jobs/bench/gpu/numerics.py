"""P1, numerics: the device equals the CPU, and every fast path equals its slow twin.

The reference is the same model on the CPU in float64, and the card is held to float32 with TF32
off. Random numbers are compared exactly: the counter-based generator gives the same ones on every
device. Across devices only greedy speech must be equal; a sampled token may lie so near the border
of two that the last digit of a logit decides, so that share is a measurement.
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
from valle.model.sampling import MAX_SEED, Sampling, draw_uniforms
from valle.model.sequence import Batch
from valle.model.tokens import EOS
from valle.serve.engine.engine import Engine
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

TOLERANCE = 1e-3
"""Relative error allowed for logits, losses and gradients."""

MIN_EQUAL_CODES = 0.999
"""Share of the codec's codes that must be equal on the device and on the CPU."""

WIDE = ModelConfig(width=256, n_heads=4, n_layers=4, dropout=0.0)
"""Large enough for the device's own attention and matrix kernels."""

GREEDY = Sampling(temperature=0.0)
SPEECH_SAMPLINGS = (GREEDY, *synthetic.SAMPLINGS)
N_LEVELS = 7
GOLDEN_STEPS = 20


def run(context: PhaseContext) -> None:
    """Runs all comparisons."""
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
    attempt("uniforms", partial(compare_uniforms, record, device))
    for group in (1, 2):
        attempt(f"cached, group {group}", partial(compare_cached, record, group, device))
        attempt(f"engine, group {group}", partial(compare_engine, record, group, device))
    attempt("NAR", partial(compare_nar, record, device))
    seconds = (0.4, 0.7) if context.quick else (4.0, 7.0, 9.0)
    attempt("codec", partial(compare_codec, record, device, seconds))


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model for a batch; tensors are float64 on the CPU, whatever computed them."""

    logits: Tensor
    loss: float
    """The loss function rounds logits to float32, also those of a float64 model: an error of some
    1e-7, a ten-thousandth of the tolerance."""
    gradients: dict[str, Tensor]
    """By parameter."""


def compute_outputs(model: AR | NAR, batch: Batch) -> ModelOutputs:
    """Logits, loss and gradients of a batch; the rows of a NAR model take turns in its levels."""
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
    """Checks logits, loss and gradients against a reference."""
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
        f"{name}: gradients",
        same and errors[worst] <= TOLERANCE,
        parameters=len(errors),
        relative_error=errors[worst],
        of=worst,
    )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference by the norm of the reference; infinite if `value` is not finite."""
    if not bool(value.isfinite().all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))


def golden_run(record: Record, kind: Kind, device: torch.device) -> None:
    """Checks logits of the golden weights, and the first losses of training them, against the
    committed numbers."""
    expected = load_file(synthetic.GOLDEN / f"{kind}_expected.safetensors")
    model = synthetic.golden_model(kind).to(device)
    batch = synthetic.random_batch(18, 25, seed=5).to(device)
    inputs = (batch,) if isinstance(model, AR) else (batch, torch.tensor([2, 6], device=device))
    with torch.inference_mode():
        logits = model(*inputs)[:, :4, :32].cpu()
    error = relative_error(logits, expected["logits"])
    record.check(f"golden {kind}: pinned logits", error <= TOLERANCE, relative_error=error)

    # the training loop of tests/helpers/golden.py
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
        f"golden {kind}: pinned losses of {GOLDEN_STEPS} steps",
        error <= TOLERANCE,
        relative_error=error,
        last=float(losses[-1]),
    )


def compare_uniforms(record: Record, device: torch.device) -> None:
    """Checks that the sampling's random numbers are the CPU's, to the last bit."""
    positions = torch.arange(1000).repeat(4)
    seeds = torch.tensor([0, 1, 2**31, MAX_SEED]).repeat_interleave(1000)
    equal = True
    for codebook in (0, N_LEVELS):
        uniforms = draw_uniforms(seeds.to(device), positions.to(device), codebook)
        equal = equal and torch.equal(uniforms.cpu(), draw_uniforms(seeds, positions, codebook))
    record.check("uniforms = the CPU's", equal)


def compare_cached(record: Record, group: int, device: torch.device) -> None:
    """Checks `AR.generate` with its cache against itself without, and its speech against the
    CPU's."""
    model = synthetic.short_ar(group).to(device)
    equal, lengths = True, []
    for number, sampling in enumerate(SPEECH_SAMPLINGS):
        cached, uncached = (
            _generate(model, number, sampling, device, use_cache=use_cache)
            for use_cache in (True, False)
        )
        equal = equal and cached == uncached
        lengths.append(len(cached))
    record.check(f"cached = uncached, group {group}", equal, frames=sum(lengths))
    endless = synthetic.short_ar(group)
    endless.head.bias.data[EOS] = -1e9
    codes, reference = (
        [_generate(endless.to(target), 0, sampling, target) for sampling in SPEECH_SAMPLINGS]
        for target in (device, torch.device("cpu"))
    )
    record.check(
        f"greedy speech = the CPU's, group {group}", codes[0] == reference[0],
        frames=len(codes[0]), distinct=len(set(reference[0])),
    )  # fmt: skip
    record.measurement(
        f"sampled speech = the CPU's, group {group}",
        share=sum(a == b for a, b in zip(codes[1:], reference[1:], strict=True)) / len(codes[1:]),
    )


def _generate(
    model: AR, number: int, sampling: Sampling, device: torch.device, *, use_cache: bool = True
) -> list[int]:
    """Codes of a random text and prompt, at most 40; `number` is their seed and the sampling's."""
    phonemes, prompt, _ = synthetic.random_items(20 + number, seed=number)[0]
    output = model.generate(
        phonemes.to(device), prompt.to(device), sampling=sampling, max_frames=40, seed=number,
        use_cache=use_cache,
    )  # fmt: skip
    codes: list[int] = output.codes.tolist()
    return codes


def compare_engine(record: Record, group: int, device: torch.device) -> None:
    """Checks an engine of four guided slots against `generate`, with more requests than slots, of
    unequal lengths."""
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
            sampling=request.sampling,
            max_frames=request.max_frames,
            seed=request.seed,
        )
        if output.codes.tolist() != codes[request.id]:
            different.append(request.id)
    record.check(
        f"engine with four guided slots = generate, group {group}",
        not different,
        requests=len(requests),
        frames=sum(len(c) for c in codes.values()),
        different=different,
    )


def compare_nar(record: Record, device: torch.device) -> None:
    """Checks batched NAR decoding with cached prompts against one sentence at a time."""
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
    """Checks the shipped codec's codes and samples against the CPU's, and batched against single.

    With TF32 on, the share of equal codes is only recorded.
    """
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
