"""Losses, augmentation, schedules, overfitting, and golden numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.golden import GOLDEN, golden_run
from helpers.tiny_models import random_batch, random_items, tiny_ar, tiny_nar
from safetensors.torch import load_file

from valle.jobs.training.augmentation import (
    draw_levels,
    drop_conditions,
    seed_step,
    truncate_responses,
)
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import (
    Optimization,
    build_codec_optimizer,
    build_optimizer,
)
from valle.model.ar import AR
from valle.model.config import ARConfig, ModelConfig, NARConfig
from valle.model.nar import NAR
from valle.model.sampling import Sampling
from valle.model.sequence import collate

SMALL = ModelConfig(width=64, n_heads=2, n_layers=2, dropout=0.0, frames_per_phoneme=4.0)


def test_learning_rate_at_linear() -> None:
    """Up to the peak, down to the final fraction, constant after the last step."""
    optimization = Optimization(learning_rate=1.0, warmup=10, final_fraction=0.1)
    rates = [optimization.learning_rate_at(step, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert max(rates) == rates[9] == rates[10]
    assert all(a > b for a, b in itertools.pairwise(rates[10:110]))
    assert rates[110] == rates[119] == pytest.approx(0.1)


def test_learning_rate_at_cosine() -> None:
    """Half a cosine over all steps, under the warm-up."""
    optimization = Optimization(learning_rate=2.0, warmup=10, schedule="cosine", final_fraction=0.0)
    expected = [min(1, (s + 1) / 10) * (1 + math.cos(math.pi * s / 100)) for s in range(100)]
    rates = [optimization.learning_rate_at(step, 100) for step in range(100)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert optimization.learning_rate_at(100, 100) == optimization.learning_rate_at(120, 100) == 0
    half = replace(optimization, final_fraction=0.5)
    assert half.learning_rate_at(100, 100) == 1.0


def test_learning_rate_at_linear_floor() -> None:
    optimization = Optimization(
        learning_rate=1.0, warmup=1, schedule="linear_floor", final_fraction=0.01
    )
    rates = [optimization.learning_rate_at(step, 200) for step in range(201)]
    assert rates == [max(0.01, 1 - step / 200) for step in range(201)]


def test_optimization_names_bad_fields() -> None:
    with pytest.raises(ValueError, match="schedule: 'step' is none of linear, cosine"):
        Optimization(schedule="step")
    with pytest.raises(ValueError, match="warmup: 0 is below 1"):
        Optimization(warmup=0)


def test_build_optimizer_decays_matrices_only() -> None:
    model = tiny_nar()
    decayed, others = build_optimizer(model, Optimization(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    spared = {id(p) for p in others["params"]}
    assert id(model.heads) in spared and id(model.code_embedding.tables) in spared
    assert id(model.transformer.blocks[0].attention.qkv.weight) not in spared


def test_build_codec_optimizer_decays_everything() -> None:
    model = tiny_nar()
    (group,) = build_codec_optimizer(model, Optimization(weight_decay=0.1)).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(model.parameters()))


def test_draw_levels_is_uniform_and_repeatable() -> None:
    levels = draw_levels(7_000, 8, "0/5/1")
    assert torch.equal(levels, draw_levels(7_000, 8, "0/5/1"))
    assert not torch.equal(levels, draw_levels(7_000, 8, "0/6/1"))
    counts = torch.bincount(levels, minlength=9)
    assert counts[0] == counts[8] == 0
    assert (counts[1:8] > 900).all()


def test_draw_levels_with_emphasis_prefers_low_ones() -> None:
    counts = torch.bincount(draw_levels(7_000, 8, "0/5/1", 1.0), minlength=8)[1:]
    expected = 7_000 / torch.arange(1, 8) / sum(1 / k for k in range(1, 8))
    torch.testing.assert_close(counts.float(), expected, rtol=0.1, atol=0)


def test_truncate_responses_keeps_texts_and_repeats() -> None:
    items = random_items(60, 80, 12) * 100
    batch = collate(*zip(*items, strict=True))
    truncated = truncate_responses(batch, "a", 0.25, 4.0)
    changed = truncated.total_frames != batch.total_frames
    shorter = truncated.frames < batch.frames
    assert 0.15 < changed[batch.frames > 12].float().mean() < 0.35
    assert not shorter[batch.frames == 12].any(), "too short to be cut"
    assert (truncated.frames[shorter] >= 15).all()
    texts = 4 * batch.phoneme_lengths
    assert torch.equal(
        truncated.total_frames[changed], torch.maximum(texts, truncated.frames)[changed]
    )
    for row in shorter.nonzero()[:, 0].tolist():
        n_frames = int(truncated.frames[row])
        assert torch.equal(truncated.codes[row, :, :n_frames], batch.codes[row, :, :n_frames])
        assert not truncated.codes[row, :, n_frames:].any()
    assert torch.equal(truncated.phonemes, batch.phonemes), "the text is all there"
    assert torch.equal(truncated.frames, truncate_responses(batch, "a", 0.25, 4.0).frames)
    assert not torch.equal(truncated.frames, truncate_responses(batch, "b", 0.25, 4.0).frames)
    assert torch.equal(truncate_responses(batch, "a", 0.0, 4.0).frames, batch.frames)


def test_drop_conditions_hides_a_share_and_repeats() -> None:
    phonemes, prompt, codes = random_items(20)[0]
    texts = [phonemes, phonemes[:-2]] * 200
    batch = collate(texts, [prompt] * 400, [codes] * 400)
    dropped = drop_conditions(batch, "a", 0.25)
    hidden = (dropped.phonemes == 0).all(1)
    assert 0.15 < hidden.float().mean() < 0.35
    assert torch.equal(dropped.phonemes[~hidden], batch.phonemes[~hidden])
    assert torch.equal(dropped.phoneme_lengths, batch.phoneme_lengths)
    assert torch.equal(dropped.prompt_frames, batch.prompt_frames)
    assert torch.equal(hidden, (dropped.prompt == 0).all(2).all(1))
    assert torch.equal(dropped.prompt[~hidden], batch.prompt[~hidden])
    assert torch.equal(hidden, (drop_conditions(batch, "a", 0.25).phonemes == 0).all(1))
    assert not torch.equal(hidden, (drop_conditions(batch, "b", 0.25).phonemes == 0).all(1))
    untouched = drop_conditions(batch, "a", 0.0)
    assert torch.equal(untouched.phonemes, batch.phonemes)
    assert torch.equal(untouched.prompt, batch.prompt)


def test_seed_step_repeats_dropout() -> None:
    config = ARConfig(width=16, n_heads=2, n_layers=2, dropout=0.5)
    torch.manual_seed(0)
    objective = Objective(AR(config)).train()
    batch, level = random_batch(10, 12), torch.ones(2, dtype=torch.long)

    def loss(key: str) -> float:
        seed_step(key)
        return objective(batch, level).loss.item()

    assert loss("0/1/0") == loss("0/1/0") != loss("0/2/0")


def test_ar_loss_counts_correct_tokens() -> None:
    model = tiny_ar()
    batch = random_batch(5, 8)
    loss = Objective(model)(batch, torch.ones(2, dtype=torch.long))
    logits = model(batch)
    n_correct = sum(
        int((logits[r, :n].argmax(-1) == batch.codes[r, 0, :n]).sum())
        + int(logits[r, n].argmax() == 1024)
        for r, n in enumerate(batch.frames.tolist())
    )
    assert loss.correct.item() == n_correct
    assert loss.terms["accuracy"].item() == pytest.approx(n_correct / 15)
    assert loss.loss_sum.item() == pytest.approx(loss.loss.item() * 15, rel=1e-4)


def overfit(model: AR | NAR, frames: tuple[int, ...], steps: int) -> list[float]:
    batch = random_batch(*frames)
    optimizer = build_optimizer(model, Optimization(weight_decay=0.0))
    objective = Objective(model).train()
    losses = []
    for step in range(steps):
        level = torch.tensor([(step + r) % 7 + 1 for r in range(len(frames))])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        loss = objective(batch, level).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_ar_repeats_what_it_overfitted() -> None:
    """The reference system's smoke mode: overfit two utterances, then synthesise them."""
    torch.manual_seed(0)
    model = AR(ARConfig.from_shared(SMALL))
    losses = overfit(model, (20, 26), 150)
    assert losses[-1] < 0.05
    model.eval()
    for phonemes, prompt, codes in random_items(20, 26):
        output = model.generate(
            phonemes, prompt, sampling=Sampling(temperature=0.0), max_frames=60,
            seed=0,
        )  # fmt: skip
        assert torch.equal(output.codes, codes[0])
        assert not output.hit_limit  # it learnt where to stop


@pytest.mark.slow
def test_nar_and_both_repeat_what_they_overfitted() -> None:
    torch.manual_seed(0)
    ar, nar = AR(ARConfig.from_shared(SMALL)), NAR(NARConfig.from_shared(SMALL))
    overfit(ar, (20, 26), 150)
    losses = overfit(nar, (20, 26), 700)
    assert sum(losses[-7:]) / 7 < 0.05
    greedy = Sampling(temperature=0.0)
    ar.eval()
    nar.eval()
    for phonemes, prompt, codes in random_items(20, 26):
        teacher_forced = nar.generate(phonemes, prompt, codes[0], sampling=greedy, seed=0)
        assert (teacher_forced == codes).float().mean() > 0.98
        first = ar.generate(phonemes, prompt, sampling=greedy, max_frames=60, seed=0).codes
        both = nar.generate(phonemes, prompt, first, sampling=greedy, seed=0)
        assert torch.equal(both, teacher_forced)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_golden_numbers(kind: str) -> None:
    """A refactor leaves these as they are (`tests/helpers/make_golden.py` writes the files)."""
    expected = load_file(GOLDEN / f"{kind}_expected.safetensors")
    result = golden_run(kind)
    torch.testing.assert_close(result["logits"], expected["logits"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result["losses"], expected["losses"], atol=1e-4, rtol=1e-3)
