"""NAR decoding: batched, with cached prompts, in chunks, with guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import perturb, random_items, tiny_nar

from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest, nar_decode
from valle.model.sampling import Sampling, guide
from valle.model.sequence import collate, unconditional

GREEDY = Sampling(temperature=0.0)
GUIDED = Sampling(temperature=0.0, guidance_scale=2.0)


def lively_nar() -> NAR:
    nar = tiny_nar()
    perturb(nar, 0.2)
    return nar


def nar_requests(*frames: int) -> list[NARRequest]:
    return [
        NARRequest(ids.tolist(), prompt.to(torch.int16).numpy(), codes[0].to(torch.int16).numpy())
        for ids, prompt, codes in random_items(*frames)
    ]


@pytest.mark.parametrize(
    ("sampling", "guided_levels"),
    [(GREEDY, 7), (Sampling(top_p=0.9), 7), (GUIDED, 7), (GUIDED, 2), (GUIDED, 0)],
)
def test_nar_decoder_batched_equals_nar_decode(sampling: Sampling, guided_levels: int) -> None:
    """Padding, neighbours and cached prompts change no code."""
    nar, items = lively_nar(), nar_requests(30, 7, 19)
    prefix = nar_decode(nar, items[0], NARDecoding(sampling=GREEDY, guided_levels=0))[:, :11]
    items.append(replace(items[0], prefix=(prefix + 1) % 1024, complete=False))
    items.append(replace(items[1], complete=False))
    decoding = NARDecoding(sampling=sampling, guided_levels=guided_levels, seed=3)
    batched = NARDecoder(nar).decode(items, decoding)
    for item, codes in zip(items, batched, strict=True):
        assert codes.shape == (8, len(item.first_codebook)) and codes.dtype == np.int16
        assert (codes == nar_decode(nar, item, decoding)).all()
    assert (batched[3][1:, :11] == items[3].prefix[1:]).all(), "the prefix stays"
    assert (batched[3][:, 11:] != batched[0][:, 11:]).any(), "and changes what follows"
    assert (batched[4] != batched[1]).any(), "an incomplete sentence is decoded differently"


def test_guidance_applies_to_the_first_levels() -> None:
    nar, item = lively_nar(), nar_requests(30)[0]
    unguided, two_levels, all_levels = (
        nar_decode(nar, item, NARDecoding(sampling=GUIDED, guided_levels=n)) for n in (0, 2, 7)
    )
    assert (two_levels[:3] == all_levels[:3]).all() and (two_levels[3:] != all_levels[3:]).any()
    assert (unguided[1] != two_levels[1]).any()
    assert (unguided == nar_decode(nar, item, NARDecoding(sampling=GREEDY, guided_levels=7))).all()


def test_guidance_compares_with_unconditional_logits() -> None:
    nar = lively_nar()
    ids, prompt, codes = random_items(14)[0]
    batch = collate([ids], [prompt], [codes])
    level = torch.tensor([1])
    with torch.inference_mode():
        conditional, unconditional_logits = nar(batch, level), nar(unconditional(batch), level)
    assert not torch.allclose(conditional, unconditional_logits), "the test needs different logits"
    expected = guide(conditional, unconditional_logits, 2.0)[0].argmax(-1)
    arguments = {"sampling": GUIDED, "seed": 0, "guided_levels": 1}
    assert torch.equal(nar.generate(ids, prompt, codes[0], **arguments)[1], expected)


def test_nar_decoder_prefills_a_cached_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nar = lively_nar()
    prefilled: list[int] = []
    plain = NAR.prefill_prompt
    monkeypatch.setattr(
        NAR,
        "prefill_prompt",
        lambda self, prompt, n: (prefilled.append(n), plain(self, prompt, n))[1],
    )
    nar_decoder = NARDecoder(nar, max_prompts=1)
    one, other = nar_requests(30)[0], nar_requests(30, 30)[1]
    decoding = NARDecoding(sampling=GUIDED, guided_levels=2)
    first = nar_decoder.decode([one], decoding)[0]
    assert prefilled == [7, 2], "the prompt, and a null prompt for the guided levels"
    assert (nar_decoder.decode([one], decoding)[0] == first).all() and len(prefilled) == 2
    nar_decoder.decode([other], decoding)  # evicts the first; the null prompt has the same length
    assert prefilled == [7, 2, 7]
    assert (nar_decoder.decode([one], decoding)[0] == first).all() and prefilled == [7, 2, 7, 7]


def test_guided_levels_out_of_range() -> None:
    nar, item = lively_nar(), nar_requests(30)[0]
    with pytest.raises(ValueError, match="guided_levels: -1 is below 0"):
        NARDecoding(sampling=GUIDED, guided_levels=-1)
    more, every = (NARDecoding(sampling=GUIDED, guided_levels=n) for n in (9, 7))
    assert (NARDecoder(nar).decode([item], more)[0] == nar_decode(nar, item, every)).all()


@pytest.mark.parametrize(
    ("frames", "complete", "lengths"),
    [
        # the last chunk is decoded as complete
        (40, True, [28, 40]), (40, False, [28, 40]),
        # due at the last frame: EOS comes with the next group
        (52, True, [28, 52, 52]), (52, False, [28, 52]),
    ],
)  # fmt: skip
def test_nar_decode_chunks_boundaries(frames: int, complete: bool, lengths: list[int]) -> None:
    requests: list[NARRequest] = []

    def decode(item: NARRequest) -> np.ndarray:
        requests.append(item)
        return np.full((8, len(item.first_codebook)), len(requests), np.int16)

    request = replace(nar_requests(frames)[0], complete=complete)
    codes = nar_decode_chunks(decode, request, Chunking(), group_size=2)
    assert [len(item.first_codebook) for item in requests] == lengths
    assert [item.complete for item in requests] == [False] * (len(lengths) - 1) + [complete]
    prefix_lengths = [0 if item.prefix is None else item.prefix.shape[1] for item in requests]
    assert prefix_lengths == [0] + [size - 12 for size in lengths[:-1]]
    assert codes.shape == (8, frames)


def test_prompt_attends_to_itself_only() -> None:
    """So that its keys and values can be cached; the paper's prompt attends to everything."""
    nar = lively_nar()
    (ids, prompt, codes), (other_ids, _, other) = random_items(14, 30)
    prompt_states = []
    for text, response in ((ids, codes), (other_ids, other)):
        states = []
        hook = nar.transformer.blocks[-1].register_forward_hook(
            lambda _, __, out, states=states: states.append(out)
        )
        nar(collate([text], [prompt], [response]), torch.tensor([2]))
        hook.remove()
        start = len(text) + 1
        prompt_states.append(states[0][0, start : start + prompt.shape[1]])
    torch.testing.assert_close(*prompt_states, atol=1e-5, rtol=1e-4)
