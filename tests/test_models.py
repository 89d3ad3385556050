"""AR and NAR: cached = full, batched = single, known defects of other VALL-E implementations."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from helpers.golden import GOLDEN, golden_tokens
from helpers.tiny_models import (
    TINY,
    TINY_AR,
    perturb,
    random_batch,
    random_items,
    tiny_ar,
    tiny_nar,
)
from safetensors.torch import load_file

from valle.jobs.training.objective import ar_loss, nar_loss
from valle.model.ar import AR
from valle.model.config import ModelConfig
from valle.model.layers import KVCache, apply_rotary, rotary_cos_sin
from valle.model.sampling import Sampling, guide
from valle.model.sequence import collate, single_batch
from valle.model.tokens import EOS

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_step_with_cache_equals_forward(group: int) -> None:
    model = tiny_ar(config=replace(TINY_AR, group_size=group))
    perturb(model)
    phonemes, prompt, codes = random_items(30)[0]
    first = codes[0]
    with torch.inference_mode():
        full = model(single_batch(phonemes, prompt, first))[0]
        cache = KVCache.empty(
            TINY, 1, model.capacity(len(phonemes), prompt.shape[1], 30), first.float()
        )
        hidden = model.prefill(single_batch(phonemes, prompt, first[:0]), cache)
        steps = []
        for position in range(len(first) + 1):
            index = position % group
            if position and not index:
                start = torch.tensor([position - group])
                hidden = model.step(first[None, position - group : position], start, cache)
            previous = first[None, position - index : position, None]
            steps.append(model.logits(hidden[:, None], previous)[0, 0])
    torch.testing.assert_close(torch.stack(steps), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(top_p=0.9, repetition_threshold=0.1),
        Sampling(top_p=0.9, guidance_scale=2.0),
    ],
)
def test_generate_with_cache_equals_without(sampling: Sampling, group: int) -> None:
    model = tiny_ar(config=replace(TINY_AR, group_size=group))
    perturb(model)
    phonemes, prompt, _ = random_items(20)[0]
    with_cache, without_cache = (
        model.generate(
            phonemes,
            prompt,
            sampling=sampling,
            max_frames=25,
            use_cache=use_cache,
            seed=3,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache.codes, without_cache.codes)
    assert with_cache.hit_limit == without_cache.hit_limit


def test_generate_guidance_compares_with_unconditional_logits() -> None:
    model = tiny_ar()
    perturb(model)
    phonemes, prompt, _ = random_items(20)[0]
    none = phonemes[:0]
    with torch.inference_mode():
        conditional, unconditional_logits = (
            model.forward(single_batch(text, voice, none))[:, 0, :EOS]
            for text, voice in (
                (phonemes, prompt),
                (torch.zeros_like(phonemes), torch.zeros_like(prompt)),
            )
        )
    expected = [guide(conditional, unconditional_logits, scale).argmax() for scale in (1.0, 10.0)]
    assert expected[0] != expected[1], "the test needs different codes"
    for scale, code in zip((1.0, 10.0), expected, strict=True):
        output = model.generate(
            phonemes,
            prompt,
            sampling=Sampling(temperature=0.0, guidance_scale=scale),
            max_frames=1,
            seed=0,
        )
        assert output.codes.tolist() == [int(code)]


def test_generate_gives_the_golden_tokens() -> None:
    """Sampler and both models: a change that moves every voice (`tests/helpers/make_golden.py`)."""
    expected = load_file(GOLDEN / "tokens.safetensors")
    tokens = golden_tokens()
    assert tokens.keys() == expected.keys()
    for name, codes in tokens.items():
        assert torch.equal(codes, expected[name]), name


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_with_prefix_continues_it(use_cache: bool, group: int) -> None:
    model = tiny_ar(config=replace(TINY_AR, group_size=group))
    perturb(model, 0.5)
    phonemes, prompt, _ = random_items(20)[0]
    model.head.bias.data[EOS] = -100.0
    arguments = {"sampling": GREEDY, "max_frames": 12, "seed": 0}
    codes = model.generate(phonemes, prompt, **arguments).codes
    assert len(codes.unique()) > 2
    for length in (group, 6, 12):
        continued = model.generate(
            phonemes, prompt, prefix=codes[:length], use_cache=use_cache, **arguments
        )
        assert torch.equal(continued.codes, codes) and continued.hit_limit
    if group > 1:
        with pytest.raises(ValueError, match="prefix: 4 frames are no multiple of group_size 3"):
            model.generate(phonemes, prompt, prefix=codes[:4], **arguments)


def test_group_conditioning_is_causal_within_a_group() -> None:
    model = tiny_ar(config=replace(TINY_AR, group_size=3))
    perturb(model, 0.5)
    phonemes, prompt, codes = random_items(20)[0]
    base = model(single_batch(phonemes, prompt, codes[0]))[0]
    for frame in (9, 10, 11):  # the fourth group
        changed = codes[0].clone()
        changed[frame] = (changed[frame] + 1) % 1024
        logits = model(single_batch(phonemes, prompt, changed))[0]
        assert torch.equal(base[: frame + 1], logits[: frame + 1])
        assert not torch.allclose(base[frame + 1], logits[frame + 1])


def test_generate_stops_at_eos_and_reports_the_limit() -> None:
    model = tiny_ar()
    phonemes, prompt, _ = random_items(20)[0]
    arguments = {"sampling": GREEDY, "max_frames": 5, "seed": 0}
    model.head.bias.data[EOS] = -100.0
    assert model.generate(phonemes, prompt, **arguments).hit_limit
    model.head.bias.data[EOS] = 100.0
    stopped = model.generate(phonemes, prompt, **arguments)
    assert (
        len(stopped.codes) == 1 and not stopped.hit_limit
    )  # EOS is suppressed before the first frame


@pytest.mark.parametrize(("kind", "group"), [("ar", 1), ("ar", 3), ("nar", 1)])
def test_forward_batched_equals_single(kind: str, group: int) -> None:
    model = tiny_ar(config=replace(TINY_AR, group_size=group)) if kind == "ar" else tiny_nar()
    perturb(model)
    items = random_items(40, 12, 27)
    level = torch.tensor([1, 4, 7])

    def run(rows: list, levels: torch.Tensor) -> torch.Tensor:
        batch = collate(*zip(*rows, strict=True))
        return model(batch) if kind == "ar" else model(batch, levels)

    batched = run(items, level)
    for row, item in enumerate(items):
        alone = run([item], level[row : row + 1])[0]
        torch.testing.assert_close(batched[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_ar_is_causal_and_attends_to_text_and_prompt() -> None:
    model = tiny_ar()
    perturb(model)
    phonemes, prompt, codes = random_items(20)[0]
    base = model(single_batch(phonemes, prompt, codes[0]))[0]
    later = codes[0].clone()
    later[12] = (later[12] + 1) % 1024
    changed = model(single_batch(phonemes, prompt, later))[0]
    assert torch.equal(base[:13], changed[:13])
    assert not torch.allclose(base[13:], changed[13:])
    other_text = model(single_batch(phonemes.roll(1), prompt, codes[0]))[0]
    assert not torch.allclose(base[0], other_text[0])
    for book in range(8):  # every codebook of the prompt matters
        changed_prompt = prompt.clone()
        changed_prompt[book] = (changed_prompt[book] + 1) % 1024
        assert not torch.allclose(
            base[0], model(single_batch(phonemes, changed_prompt, codes[0]))[0][0]
        )


def test_ar_loss_trains_the_first_response_token() -> None:
    """Defect 1 of the family: the target at the separator was ignored, its gradient exactly 0."""
    model = tiny_ar()
    batch = random_batch(6, 9)
    logits = model(batch)
    logits.retain_grad()
    loss = ar_loss(logits, batch)
    loss.loss.backward()
    assert (logits.grad[:, 0].abs().sum(-1) > 0).all()
    # 6 + 9 frames and an EOS each; nothing beyond a row's own EOS
    assert loss.tokens.tolist() == [17]
    assert (logits.grad[0, 7:] == 0).all()
    assert logits.grad[0, 6, EOS] < 0  # EOS is pulled up right after the last frame


def test_nar_is_bidirectional_and_level_conditioned() -> None:
    """Defects 2 and 3 of the family: a causal NAR without level conditioning."""
    model = tiny_nar()
    perturb(model)
    phonemes, prompt, codes = random_items(20)[0]
    level = torch.tensor([3])
    base = model(collate([phonemes], [prompt], [codes]), level)[0]
    last = codes.clone()
    last[0, -1] = (last[0, -1] + 1) % 1024
    assert not torch.allclose(base[0], model(collate([phonemes], [prompt], [last]), level)[0][0])
    hidden = codes.clone()
    hidden[3:] = 0  # codebooks from the level on are what it predicts: it must not see them
    assert torch.equal(base, model(collate([phonemes], [prompt], [hidden]), level)[0])
    same_input = model(collate([phonemes], [prompt], [codes]), torch.tensor([4]))[0]
    assert not torch.allclose(base, same_input)


def test_nar_loss_covers_the_response_at_its_level() -> None:
    model = tiny_nar()
    batch = random_batch(6, 9)
    level = torch.tensor([2, 7])
    loss = nar_loss(model(batch, level), batch, level)
    assert loss.tokens.tolist() == [0, 6, 0, 0, 0, 0, 9]
    loss.loss.backward()
    used = model.heads.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, True, False, False, False, False, True]
    # stacked parameters: every one has a gradient in every step, which ZeRO needs
    assert all(p.grad is not None for p in model.parameters())


def test_nar_generate_is_consistent_with_its_logits() -> None:
    model = tiny_nar()
    phonemes, prompt, codes = random_items(15)[0]
    generated = model.generate(phonemes, prompt, codes[0], sampling=GREEDY, seed=0)
    assert generated.shape == (8, 15)
    assert torch.equal(generated[0], codes[0])
    # teacher-forced with its own output, each level predicts itself
    for level in range(1, 8):
        logits = model(collate([phonemes], [prompt], [generated]), torch.tensor([level]))[0]
        assert torch.equal(logits.argmax(-1), generated[level])


def test_rotary_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).unbind(0)

    def score(at: float, to: float) -> torch.Tensor:
        cos_sin = [rotary_cos_sin(torch.tensor([[p]]), 8) for p in (at, to)]
        return (apply_rotary(query, cos_sin[0]) * apply_rotary(key, cos_sin[1])).sum()

    torch.testing.assert_close(score(3.0, 7.0), score(10.0, 14.0))
    assert not torch.allclose(score(3.0, 7.0), score(3.0, 8.0))


def test_kv_cache_refuses_more_than_its_capacity() -> None:
    cache = KVCache.empty(TINY, 1, 2, like=torch.zeros(1))
    part = torch.zeros(1, TINY.n_heads, 3, 8)
    with pytest.raises(AssertionError, match="KV cache is full"):
        cache.append(0, part, part)
    cache.advance(2)
    cache.reset()
    assert cache.length == 0


def test_config_error_names_the_field() -> None:
    with pytest.raises(ValueError, match="width: 30 is no even multiple of n_heads 4"):
        ModelConfig(width=30, n_heads=4)
    with pytest.raises(ValueError, match=r"dropout: 1.0 is not in \[0, 1\)"):
        ModelConfig(width=16, n_heads=2, dropout=1.0)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_training_attention_equals_the_fused_kernel(kind: str) -> None:
    """On a CPU training uses plain operations, inference the fused kernel."""
    model = tiny_ar() if kind == "ar" else tiny_nar()
    perturb(model)
    batch = random_batch(30, 17)
    arguments = (batch,) if kind == "ar" else (batch, torch.tensor([1, 2]))
    training_logits = model(*arguments)
    with torch.inference_mode():
        inference_logits = model(*arguments)
    assert training_logits.requires_grad
    torch.testing.assert_close(training_logits.detach(), inference_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.ray  # not a Ray test, but as slow: a minute of C++ compiler
@pytest.mark.filterwarnings("ignore")  # the compiler uses what torch deprecates
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_compiled_training_equals_eager(kind: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the compiler cannot trace shape checks
    try:
        compare_compiled_with_eager(kind)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def compare_compiled_with_eager(kind: str) -> None:
    """Losses and gradients of batches of changing shapes."""
    model = tiny_ar() if kind == "ar" else tiny_nar()
    perturb(model)
    level = torch.tensor([1, 2])
    results: list[list[torch.Tensor]] = []
    for compiled in (False, True):
        if compiled:
            model.transformer.compile(dynamic=True)
        for frames in ((30, 17), (12, 40)):
            batch = random_batch(*frames)
            model.zero_grad()
            if isinstance(model, AR):
                loss = ar_loss(model(batch), batch)
            else:
                loss = nar_loss(model(batch, level), batch, level)
            loss.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([loss.loss.detach(), *gradients])
    eager, compiled_results = results[:2], results[2:]
    for one, other in zip(eager, compiled_results, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
