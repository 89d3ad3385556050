"""The NAR model at work: many at once, prompts read before, beginnings of sentences, guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import random_items, tiny_nar
from test_models import perturb

from valle.model.filling import Filler, Filling, Unfilled, fill_in
from valle.model.nar import NAR
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
    filler = Filler(nar, prompts=2)
    items = unfilled(30, 20, 10)
    how = Filling(sampling=GUIDED, guided_levels=2)
    first = filler.fill_in(items[:1], how)[0]
    assert read == [7, 2], "its own, and hidden for the guided levels"
    assert (filler.fill_in([items[0]], how)[0] == first).all() and len(read) == 2
    for item in items:  # each pushes out those before it
        filler.fill_in([item], how)
    assert len(read) == 6
    assert (filler.fill_in([items[0]], how)[0] == first).all() and len(read) == 8


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
