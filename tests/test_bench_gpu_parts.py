"""What the phases of the bench for a card rest on: checks that can fail, cases, counts."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch
from torch.utils.flop_counter import FlopCounterMode

from valle.jobs.bench.gpu import agreement, attention, compiling, filling, samples, training, truth
from valle.jobs.bench.gpu.card import Card
from valle.jobs.bench.gpu.record import TINY, Bench, Record
from valle.jobs.bench.gpu.streams import Task, add, engine_and_runner
from valle.jobs.training.objective import Objective
from valle.model.ar import AR
from valle.model.config import SIZES
from valle.model.valle import Synthesis
from valle.serve.engine.runner import SlotCache


def a_bench(tmp_path: Path, **changes: Any) -> Bench:
    record = Record(tmp_path / "record.json", time.time() + 60)
    values = {
        "device": torch.device("cpu"), "config": TINY, "quick": True, "record": record,
        "scratch": tmp_path, "card": Card("test", 1e12, 1e12, 1e12, 1e12, 1e-6),
    }  # fmt: skip
    return Bench(**values | changes)


def test_why_nothing_can_be_compiled_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    reason = compiling.missing(torch.device("cpu"))
    assert reason is not None and "RuntimeError: Failed to find C compiler. (" in reason
    assert "none on the PATH, and CC is not set" in reason
    assert "Please specify via CC" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda values: values)
    assert "AssertionError" in (compiling.missing(torch.device("cpu")) or ""), "wrong numbers"


def test_what_goes_on_eagerly_is_no_compiled_case() -> None:
    """Dynamo gives up at its limit of recompilations: an error, not a slow figure."""

    # a backend that compiles nothing: what is tested is dynamo's limit
    def step(values: torch.Tensor, factor: int) -> torch.Tensor:
        return values * factor

    values = torch.ones(3)
    with compiling.strict() as compilations:
        compiled = torch.compile(step, backend="eager", dynamic=False)
        for factor in range(2, 6):
            compiled(values, factor)
        assert compilations.graphs == 4
        with pytest.raises(Exception, match="recompile_limit"):
            for factor in range(6, 20):
                compiled(values, factor)
    with compiling.strict() as compilations:
        assert compilations.graphs == 0, "a case begins anew"


def test_engines_that_compute_differently_are_told_apart(tmp_path: Path) -> None:
    task, frames = Task.of(quick=True), 12
    right = samples.lively(1)
    with torch.no_grad():
        right.head.bias[-1] = -1e9

    def engine(model: AR) -> Any:
        pair = engine_and_runner(model, task, 3, guided=True, compiled=False)
        add(pair[0], task, 3, samples.GUIDED, frames)
        return pair

    assert agreement.in_step([engine(right), engine(right)]) == (0, frames)
    other = copy.deepcopy(right)
    with torch.no_grad():
        other.transformer.blocks[-1].ffn[-1].bias += 1e-2 * torch.arange(16)
    error, _ = agreement.in_step([engine(right), engine(other)])
    assert error > agreement.TOLERANCE
    bench = a_bench(tmp_path)
    agreement.with_reference(bench, task)
    (check,) = bench.record.checks
    assert check["passed"] and check["states"] == 11 and check["relative_error"] > 0
    compilations = compiling.Compilations()
    agreement.captured(bench, "none", compilations, replays=3, ticks=11)
    agreement.captured(bench, "all", compilations, replays=11, ticks=11)
    assert [check["passed"] for check in bench.record.checks[1:]] == [False, True]


def test_an_engine_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted wrong: the states of the first frame are right, the next are not."""
    bench = a_bench(tmp_path)
    advance = SlotCache.advance
    monkeypatch.setattr(SlotCache, "advance", lambda cache, positions: advance(cache, 0))
    agreement.with_reference(bench, Task.of(quick=True))
    assert not bench.record.checks[0]["passed"]


def test_truth_notices_a_wrong_model(tmp_path: Path) -> None:
    """Each of logits, loss and gradients is a check that can fail."""
    batch = random_batch(18, 25, 40)
    for kind in ("ar", "nar"):
        reference = truth.outcome(samples.golden(kind).double(), batch)
        right = Record(tmp_path / "right.json", time.time() + 60)
        truth.check_outcome(right, kind, truth.outcome(samples.golden(kind), batch), reference)
        assert all(check["passed"] for check in right.checks)
        other = samples.golden(kind)
        samples.perturb(other, 0.01)
        wrong = Record(tmp_path / "wrong.json", time.time() + 60)
        truth.check_outcome(wrong, kind, truth.outcome(other, batch), reference)
        assert not wrong.checks[0]["passed"] and not wrong.checks[2]["passed"]
        worse = replace(reference, loss=reference.loss * 1.01)
        truth.check_outcome(wrong, kind, worse, reference)
        assert [check["passed"] for check in wrong.checks[3:]] == [True, False, True]
        missing = copy.copy(reference.gradients)
        missing.popitem()
        truth.check_outcome(wrong, kind, replace(reference, gradients=missing), reference)
        assert not wrong.checks[8]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_model_flops_are_what_a_forward_pass_does(kind: str) -> None:
    """PyTorch counts a causal matrix whole, and the NAR prompt's view of what it does not see."""
    config = replace(TINY, width=32)
    model = samples.build(kind, config, torch.device("cpu"))
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


def test_memory_check_notices_a_wrong_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = a_bench(tmp_path)
    load = filling.Load(slots=3, positions=50, prompts=2, prompt_frames=9)
    planned = filling.planned
    monkeypatch.setattr(
        filling, "planned", lambda *given: {**planned(*given), "ar": planned(*given)["ar"] // 2}
    )
    filling.memory(bench, load, "fp32")
    assert not bench.record.checks[0]["passed"]


def test_varlen_attention_of_both_versions_is_told_to_be_causal() -> None:
    def newer(query: object, *, scale: float | None = None, window_size: object = (-1, -1)) -> None:
        """torch 2.11 and later."""

    def older(query: object, is_causal: bool = False) -> None:
        """torch 2.10."""

    assert attention.causal_arguments(newer) == {"window_size": (-1, 0)}
    assert attention.causal_arguments(older) == {"is_causal": True}
    with pytest.raises(ValueError, match="neither window_size nor is_causal"):
        attention.causal_arguments(lambda query: query)


def test_made_inputs_are_those_of_the_rest() -> None:
    assert Synthesis(ar=samples.GUIDED) == Synthesis()
    assert Synthesis().filling == filling.FILLING
    assert torch.equal(samples.random_batch(7, 9, seed=3).codes, random_batch(7, 9, seed=3).codes)


def test_training_cases_are_begun_where_they_can_end(tmp_path: Path) -> None:
    h100 = Card("NVIDIA H100 80GB HBM3", 8e14, 4e14, 5e13, 3e12, 5e-6)
    bench = a_bench(tmp_path, card=h100, config=SIZES["full"], quick=False)
    order = training.cases(quick=False, on_card=True)
    assert len(order) == len(set(order)) == 24
    assert [case.name for case in order[:2]] == ["ar 32000 bf16", "ar 32000 bf16 + compile"]
    needed = {case.name: case.seconds(bench) for case in order}
    assert 12 < needed["ar 64000 fp32"] < 30 and needed["ar 4000 bf16"] < 5
    assert 60 < needed["ar 32000 bf16 + compile"] < 90
    assert h100.data_sheet == 989e12 and replace(h100, name="NVIDIA H100 PCIe").data_sheet == 756e12
    assert replace(h100, name="another").data_sheet is None
