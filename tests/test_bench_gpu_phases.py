"""Parts of the phases of `make gpu`: checks that can fail, cases, counts."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch
from torch.utils.flop_counter import FlopCounterMode

from valle.jobs.bench.gpu import (
    attention,
    compiling,
    engine_numerics,
    nar,
    numerics,
    synthetic,
    training,
)
from valle.jobs.bench.gpu.device import DeviceLimits
from valle.jobs.bench.gpu.record import TINY, PhaseContext, Record
from valle.jobs.bench.gpu.workload import Workload, add_streams, build_engine
from valle.jobs.training.objective import Objective
from valle.model.ar import AR
from valle.model.config import SIZES
from valle.model.valle import Synthesis
from valle.serve.engine.runner import SlotCache


def make_context(tmp_path: Path, **changes: Any) -> PhaseContext:
    record = Record(tmp_path / "record.json", time.time() + 60)
    values = {
        "device": torch.device("cpu"),
        "config": TINY,
        "quick": True,
        "record": record,
        "scratch": tmp_path,
        "limits": DeviceLimits("test", 1e12, 1e12, 1e12, 1e12, 1e-6),
    }
    return PhaseContext(**values | changes)


def test_unavailable_reason_names_the_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    reason = compiling.unavailable_reason(torch.device("cpu"))
    assert reason is not None and "RuntimeError: Failed to find C compiler. (" in reason
    assert "none on the PATH, and CC is not set" in reason
    assert "Please specify via CC" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda values: values)
    assert "AssertionError" in (compiling.unavailable_reason(torch.device("cpu")) or ""), (
        "wrong numbers"
    )


def test_strict_raises_at_the_recompilation_limit() -> None:
    """Beyond the limit dynamo would run eagerly, and a case named compiled would be slow."""

    # a backend that compiles nothing: dynamo's limit is tested
    def step(values: torch.Tensor, factor: int) -> torch.Tensor:
        return values * factor

    values = torch.ones(3)
    with compiling.strict() as counters:
        compiled = torch.compile(step, backend="eager", dynamic=False)
        for factor in range(2, 6):
            compiled(values, factor)
        assert counters.graphs == 4
        with pytest.raises(Exception, match="recompile_limit"):
            for factor in range(6, 20):
                compiled(values, factor)
    with compiling.strict() as counters:
        assert counters.graphs == 0, "counters start at zero"


def test_step_both_separates_equal_and_different_engines(tmp_path: Path) -> None:
    workload, frames = Workload.default(quick=True), 12
    right = synthetic.short_ar(1)
    with torch.no_grad():
        right.head.bias[-1] = -1e9

    def engine(model: AR) -> Any:
        pair = build_engine(model, workload, 3, guided=True, compiled=False)
        add_streams(pair[0], workload, 3, synthetic.GUIDED_SAMPLING, frames)
        return pair

    assert engine_numerics.step_both([engine(right), engine(right)]) == (0, frames)
    other = copy.deepcopy(right)
    with torch.no_grad():
        other.transformer.blocks[-1].ffn[-1].bias += 1e-2 * torch.arange(16)
    error, _ = engine_numerics.step_both([engine(right), engine(other)])
    assert error > engine_numerics.TOLERANCE
    context = make_context(tmp_path)
    engine_numerics.check_against_generate(context, workload)
    (check,) = context.record.checks
    assert check["passed"] and check["states"] == 11 and check["relative_error"] > 0
    counters = compiling.CompileCounters()
    engine_numerics.check_cudagraphs(context, "none", counters, replays=3, steps=11)
    engine_numerics.check_cudagraphs(context, "all", counters, replays=11, steps=11)
    assert [check["passed"] for check in context.record.checks[1:]] == [False, True]


def test_check_against_generate_fails_for_wrong_cache_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states of the first frame are right, later ones are not."""
    context = make_context(tmp_path)
    advance = SlotCache.advance
    monkeypatch.setattr(SlotCache, "advance", lambda cache, positions: advance(cache, 0))
    engine_numerics.check_against_generate(context, Workload.default(quick=True))
    assert not context.record.checks[0]["passed"]


def test_check_outputs_fails_for_each_wrong_output(tmp_path: Path) -> None:
    """Logits, loss and gradients are separate checks."""
    batch = random_batch(18, 25, 40)
    for kind in ("ar", "nar"):
        reference = numerics.compute_outputs(synthetic.golden_model(kind).double(), batch)
        right = Record(tmp_path / "right.json", time.time() + 60)
        numerics.check_outputs(
            right, kind, numerics.compute_outputs(synthetic.golden_model(kind), batch), reference
        )
        assert all(check["passed"] for check in right.checks)
        other = synthetic.golden_model(kind)
        synthetic.perturb(other, 0.01)
        wrong = Record(tmp_path / "wrong.json", time.time() + 60)
        numerics.check_outputs(wrong, kind, numerics.compute_outputs(other, batch), reference)
        assert not wrong.checks[0]["passed"] and not wrong.checks[2]["passed"]
        worse = replace(reference, loss=reference.loss * 1.01)
        numerics.check_outputs(wrong, kind, worse, reference)
        assert [check["passed"] for check in wrong.checks[3:]] == [True, False, True]
        missing = copy.copy(reference.gradients)
        missing.popitem()
        numerics.check_outputs(wrong, kind, replace(reference, gradients=missing), reference)
        assert not wrong.checks[8]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_model_flops_equal_those_that_pytorch_counts(kind: str) -> None:
    """PyTorch counts masked pairs too: half of a causal matrix, and those that the NAR prompt does
    not attend to."""
    config = replace(TINY, width=32)
    model = synthetic.build_model(kind, config, torch.device("cpu"))
    batch = random_batch(30, 30)
    level = torch.tensor([1, 2])
    with FlopCounterMode(display=False) as counter:
        Objective(model)(batch, level)
    positions = batch.phoneme_lengths + batch.prompt_frames + batch.frames + 2
    if isinstance(model, AR):
        unseen = positions**2 / 2
    else:
        unseen = batch.prompt_frames * (positions - batch.prompt_frames)
    masked = 12 * config.n_layers * config.width * float(unseen.sum())
    expected = 3 * counter.get_total_flops()
    assert training.model_flops(kind, config, batch) + masked == pytest.approx(expected)


def test_check_memory_fails_for_a_wrong_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path)
    load = nar.ServingLoad(slots=3, positions=50, prompts=2, prompt_frames=9)
    plan_memory = nar.plan_memory
    monkeypatch.setattr(
        nar,
        "plan_memory",
        lambda *arguments: {**plan_memory(*arguments), "ar": plan_memory(*arguments)["ar"] // 2},
    )
    nar.check_memory(context, load, "fp32")
    assert not context.record.checks[0]["passed"]


def test_causal_arguments_of_both_versions() -> None:
    def newer(query: object, *, scale: float | None = None, window_size: object = (-1, -1)) -> None:
        """torch 2.11 and later."""

    def older(query: object, is_causal: bool = False) -> None:
        """torch 2.10."""

    assert attention.causal_arguments(newer) == {"window_size": (-1, 0)}
    assert attention.causal_arguments(older) == {"is_causal": True}
    with pytest.raises(ValueError, match="neither window_size nor is_causal"):
        attention.causal_arguments(lambda query: query)


def test_synthetic_defaults_equal_those_of_the_model() -> None:
    assert Synthesis(ar=synthetic.GUIDED_SAMPLING) == Synthesis()
    assert Synthesis().nar_decoding == nar.NAR_DECODING
    assert torch.equal(synthetic.random_batch(7, 9, seed=3).codes, random_batch(7, 9, seed=3).codes)


def test_training_cases_and_their_estimated_seconds(tmp_path: Path) -> None:
    h100 = DeviceLimits("NVIDIA H100 80GB HBM3", 8e14, 4e14, 5e13, 3e12, 5e-6)
    context = make_context(tmp_path, limits=h100, config=SIZES["full"], quick=False)
    order = training.cases(quick=False, on_gpu=True)
    assert len(order) == len(set(order)) == 24
    assert [case.name for case in order[:2]] == ["ar 32000 bf16", "ar 32000 bf16 + compile"]
    needed = {case.name: case.estimated_seconds(context) for case in order}
    assert 12 < needed["ar 64000 fp32"] < 30 and needed["ar 4000 bf16"] < 5
    assert 60 < needed["ar 32000 bf16 + compile"] < 90
    assert (
        h100.data_sheet_flops == 989e12
        and replace(h100, name="NVIDIA H100 PCIe").data_sheet_flops == 756e12
    )
    assert replace(h100, name="another").data_sheet_flops is None
