"""The NAR model at work: many at once, prompts read before, beginnings of sentences, guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import perturb, random_items, tiny_nar

from valle.model.chunks import Chunking, fill_in_chunks
from valle.model.nar import NAR
from valle.model.nar_decoding import Filler, Filling, Unfilled, fill_in
from valle.model.sampling import Sampling, guide
from valle.model.sequence import collate, unconditional

GREEDY = Sampling(temperature=0.0)
GUIDED = Sampling(temperature=0.0, guidance_scale=2.0)


def model() -> NAR:
    nar = tiny_nar()
    perturb(nar, 0.2)
    return nar


def unfilled(*frames: int) -> list[Unfilled]:
    return [
        Unfilled(ids.tolist(), prompt.to(torch.int16).numpy(), codes[0].to(torch.int16).numpy())
        for ids, prompt, codes in random_items(*frames)
    ]


@pytest.mark.parametrize(
    ("sampling", "guided_levels"),
    [(GREEDY, 7), (Sampling(top_p=0.9), 7), (GUIDED, 7), (GUIDED, 2), (GUIDED, 0)],
)
def test_many_at_once_equal_one_the_plain_way(sampling: Sampling, guided_levels: int) -> None:
    """Padding, neighbours, and prompts that are read apart: nothing of it is heard."""
    nar, items = model(), unfilled(30, 7, 19)
    beginning = fill_in(nar, items[0], Filling(sampling=GREEDY, guided_levels=0))[:, :11]
    items.append(replace(items[0], spoken=(beginning + 1) % 1024, ended=False))
    items.append(replace(items[1], ended=False))
    how = Filling(sampling=sampling, guided_levels=guided_levels, seed=3)
    together = Filler(nar).fill_in(items, how)
    for item, codes in zip(items, together, strict=True):
        assert codes.shape == (8, len(item.first)) and codes.dtype == np.int16
        assert (codes == fill_in(nar, item, how)).all()
    assert (together[3][1:, :11] == items[3].spoken[1:]).all(), "what is spoken is settled"
    assert (together[3][:, 11:] != together[0][:, 11:]).any(), "and what follows goes by it"
    assert (together[4] != together[1]).any(), "a beginning is another thing than a whole"


def test_guidance_is_for_the_first_levels() -> None:
    nar, item = model(), unfilled(30)[0]
    plain, two, all_levels = (
        fill_in(nar, item, Filling(sampling=GUIDED, guided_levels=n)) for n in (0, 2, 7)
    )
    assert (two[:3] == all_levels[:3]).all() and (two[3:] != all_levels[3:]).any()
    assert (plain[1] != two[1]).any()
    assert (plain == fill_in(nar, item, Filling(sampling=GREEDY, guided_levels=7))).all()


def test_guidance_is_by_the_same_model_without_conditions() -> None:
    nar = model()
    ids, prompt, codes = random_items(14)[0]
    batch = collate([ids], [prompt], [codes])
    level = torch.tensor([1])
    with torch.inference_mode():
        given, without = nar(batch, level), nar(unconditional(batch), level)
    assert not torch.allclose(given, without), "a dull test"
    expected = guide(given, without, 2.0)[0].argmax(-1)
    how = {"sampling": GUIDED, "generator": torch.Generator(), "guided_levels": 1}
    assert torch.equal(nar.generate(ids, prompt, codes[0], **how)[1], expected)


def test_a_prompt_is_read_once_while_it_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    nar = model()
    read: list[int] = []
    plain = NAR.read_prompt
    monkeypatch.setattr(
        NAR, "read_prompt", lambda self, prompt, n: (read.append(n), plain(self, prompt, n))[1]
    )
    filler = Filler(nar, prompts=1)
    here, there = unfilled(30)[0], unfilled(30, 30)[1]
    how = Filling(sampling=GUIDED, guided_levels=2)
    first = filler.fill_in([here], how)[0]
    assert read == [7, 2], "its own, and a hidden one for the guided levels"
    assert (filler.fill_in([here], how)[0] == first).all() and len(read) == 2
    filler.fill_in([there], how)  # pushes it out; the hidden one is as long
    assert read == [7, 2, 7]
    assert (filler.fill_in([here], how)[0] == first).all() and read == [7, 2, 7, 7]


def test_levels_to_guide_are_checked() -> None:
    nar, item = model(), unfilled(30)[0]
    with pytest.raises(ValueError, match="guided_levels: -1 is below 0"):
        Filling(sampling=GUIDED, guided_levels=-1)
    more, every = (Filling(sampling=GUIDED, guided_levels=n) for n in (9, 7))
    assert (Filler(nar).fill_in([item], more)[0] == fill_in(nar, item, every)).all()


@pytest.mark.parametrize(
    ("frames", "ended", "known"),
    [
        # the last chunk is the one that is told that nothing follows
        (40, True, [28, 40]), (40, False, [28, 40]),
        # due at the very end: the AR model has not said yet that it is the end
        (52, True, [28, 52, 52]), (52, False, [28, 52]),
    ],
)  # fmt: skip
def test_chunks_are_due_as_the_endpoint_hears_them(
    frames: int, ended: bool, known: list[int]
) -> None:
    asked: list[Unfilled] = []

    def fill(item: Unfilled) -> np.ndarray:
        asked.append(item)
        return np.full((8, len(item.first)), len(asked), np.int16)

    whole = replace(unfilled(frames)[0], ended=ended)
    codes = fill_in_chunks(fill, whole, Chunking(), group=2)
    assert [len(item.first) for item in asked] == known
    assert [item.ended for item in asked] == [False] * (len(known) - 1) + [ended]
    settled = [0 if item.spoken is None else item.spoken.shape[1] for item in asked]
    assert settled == [0] + [size - 12 for size in known[:-1]]
    assert codes.shape == (8, frames)


def test_a_prompt_sees_only_itself() -> None:
    """What makes it worth remembering; the paper's sees everything."""
    nar = model()
    (ids, prompt, codes), (other_ids, _, other) = random_items(14, 30)
    seen = []
    for text, response in ((ids, codes), (other_ids, other)):
        states = []
        hook = nar.transformer.blocks[-1].register_forward_hook(
            lambda _, __, out, states=states: states.append(out)
        )
        nar(collate([text], [prompt], [response]), torch.tensor([2]))
        hook.remove()
        start = len(text) + 1
        seen.append(states[0][0, start : start + prompt.shape[1]])
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)
