"""The AR model: phonemes and a prompt recording to the first codebook, frame by frame.

VALL-E (Wang et al. 2023) section 4.2.1. The sequence is
`phonemes . <text end> . prompt (all codebooks summed) . <go> . response`, causal throughout; the
position of `<go>` predicts the first frame, the last frame predicts EOS.

With `group` G above 1, a position of the response is a group of G frames and predicts the next
group (the grouped codes of VALL-E 2, Chen et al. 2024). There the frames of a group are drawn
without knowing of each other; here each is told those before it (`GroupConditioning`).

Legend: B batch, L phonemes, P prompt frames, T response frames, G frames of a group, N = T // G + 1
groups to predict, Q codebooks, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from valle.model.config import ARConfig
from valle.model.layers import Cache, CodeEmbedding, KVCache, Transformer
from valle.model.sampling import Sampling, guide, sample
from valle.model.sequence import (
    Batch,
    PaddedSequence,
    Segment,
    concat_segments,
    frame_positions,
    gather_span,
    single_batch,
)
from valle.model.tokens import CODEBOOK_SIZE, EOS


@dataclass(frozen=True)
class AROutput:
    """What the AR model said."""

    codes: Int[Tensor, " T"]
    hit_limit: bool
    """True when the length limit ended it, not the model."""


class AR(nn.Module):
    """Predicts the next frame's first code from text, prompt and the frames so far."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.n_phonemes, config.width)
        self.prompt_embedding = CodeEmbedding(config.n_codebooks, config.width)
        self.code_embedding = CodeEmbedding(config.group_size, config.width)
        self.separators = nn.Parameter(torch.zeros(2, config.width))
        # text, prompt and response overlap in position: what each is has to be said
        self.segments = nn.Parameter(torch.zeros(3, config.width))
        self.transformer = Transformer(config, n_levels=1)
        self.within = GroupConditioning(config) if config.group_size > 1 else None
        self.head = nn.Linear(config.width, CODEBOOK_SIZE + 1)
        for parameter in (
            self.text_embedding.weight,
            self.separators,
            self.segments,
            self.head.weight,
        ):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Batch) -> Float[Tensor, "B T1 1025"]:
        """Logits of the T response frames and, one further, of EOS (T1 = T + 1)."""
        frames, group_size = batch.codes.shape[2], self.config.group_size
        hidden = self.hidden(batch)
        codes = _grouped(
            F.pad(batch.codes[:, 0], (0, hidden.shape[1] * group_size - frames)), group_size
        )
        logits = [self.logits(hidden, codes[:, :index]) for index in range(group_size)]
        return torch.stack(logits, dim=2).flatten(1, 2)[:, : frames + 1]

    def hidden(self, batch: Batch) -> Float[Tensor, "B N D"]:
        """What the transformer knows before each group of the response, one past its end."""
        sequence = self._embed_segments(batch)
        level = sequence.starts[0].new_zeros(len(sequence.x))
        hidden = self.transformer(sequence.x, sequence.positions, level)
        # `<go>` is one position before the response and predicts its first group
        size = batch.codes.shape[2] // self.config.group_size + 1
        return gather_span(hidden, sequence.starts[4] - 1, size)

    def logits(
        self, hidden: Float[Tensor, "B N D"], previous: Int[Tensor, "B g N"]
    ) -> Float[Tensor, "B N 1025"]:
        """Logits of a group's next frame, of which the first g are `previous`."""
        if previous.shape[1]:
            assert self.within is not None, "a group of one has no frame before its first"
            hidden = self.within(hidden, previous)
        return self.head(hidden)

    def _embed_segments(self, batch: Batch) -> PaddedSequence:
        rows = len(batch.phonemes)
        one = batch.frames.new_ones(rows)
        end, go = self.separators[:, None, None].expand(-1, rows, 1, -1)
        rate, group_size = self.config.frames_per_phoneme, self.config.group_size
        text_positions = frame_positions(batch.phoneme_lengths, batch.phonemes.shape[1]) * rate
        text_end = batch.phoneme_lengths[:, None] * rate
        text = self.text_embedding(batch.phonemes) + self.segments[0]
        prompt = self._prompt_groups(batch.prompt) + self.segments[1]
        prompt_groups = batch.prompt_frames // group_size
        prompt_positions = frame_positions(prompt_groups, prompt.shape[1], group_size, end=True)
        response = self.code_embedding(_grouped(batch.codes[:, 0], group_size)) + self.segments[2]
        code_groups = batch.frames // group_size
        code_positions = frame_positions(code_groups, response.shape[1], group_size)
        return concat_segments(
            [
                Segment(text, text_positions, batch.phoneme_lengths),
                Segment(end, text_end, one),
                Segment(prompt, prompt_positions, prompt_groups),
                Segment(go, -torch.ones_like(text_end), one),
                Segment(response, code_positions, code_groups),
            ]
        )

    def _prompt_groups(self, prompt: Int[Tensor, "B Q P"]) -> Float[Tensor, "B groups D"]:
        """A prompt's frames, averaged over groups; what is left over at its end is not heard."""
        group_size = self.config.group_size
        groups = prompt.shape[2] // group_size
        embedded = self.prompt_embedding(prompt[:, :, : groups * group_size])
        return embedded.unflatten(1, (groups, group_size)).mean(2)

    @torch.inference_mode()
    def generate(
        self,
        phonemes: Int[Tensor, " L"],
        prompt: Int[Tensor, "Q P"],
        *,
        sampling: Sampling,
        max_frames: int,
        seed: int,
        prefix: Int[Tensor, " T"] | None = None,
        use_cache: bool = True,
    ) -> AROutput:
        """Speaks one text in the voice of the prompt, a frame at least; stops at EOS or after
        `max_frames`.

        With a `prefix` (the first codes of speech whose words the text begins with, whole groups)
        it goes on from there, VALL-E's continuation; the result begins with the prefix.
        `use_cache=False` runs the whole sequence again for every group: the slow twin.
        """
        codes = phonemes.new_empty(0) if prefix is None else prefix
        group_size = self.config.group_size
        if len(codes) % group_size:
            raise ValueError(
                f"prefix: {len(codes)} frames are no multiple of the group's {group_size}"
            )
        guided = sampling.guided
        rows = 2 if guided else 1  # the second goes without text and prompt
        capacity = self.capacity(len(phonemes), prompt.shape[1], max_frames)
        cache = KVCache.empty(self.config, rows, capacity, like=self.head.weight)
        hidden = self.prefill(single_batch(phonemes, prompt, codes, guided=guided), cache)
        while True:
            for index in range(group_size):
                if len(codes) >= max_frames:
                    return AROutput(codes, hit_limit=True)
                previous = codes[len(codes) - index :].expand(rows, -1)
                logits = self.logits(hidden[:, None], previous[:, :, None])[:, 0]
                if guided:
                    logits = guide(logits[:1], logits[1:], sampling.guidance_scale)
                empty = torch.tensor([not len(codes)], device=codes.device)
                logits = suppress_eos(logits, empty)
                position = torch.full((1,), len(codes), device=codes.device)
                token = sample(logits, sampling, seed=seed, positions=position, history=codes[None])
                if int(token) == EOS:
                    return AROutput(codes, hit_limit=False)
                codes = torch.cat([codes, token])
            if use_cache:
                position = torch.full((rows,), len(codes) - group_size, device=codes.device)
                hidden = self.step(codes[-group_size:].expand(rows, -1), position, cache)
            else:
                hidden = self.hidden(single_batch(phonemes, prompt, codes, guided=guided))[:, -1]

    def capacity(self, n_phonemes: int, prompt_frames: int, max_frames: int) -> int:
        """Positions that a cache needs for a text, a prompt and the speech that follows."""
        group_size = self.config.group_size
        return (
            n_phonemes
            + prompt_frames // group_size
            + max_frames // group_size
            + len(self.separators)
        )

    def prefill(self, batch: Batch, cache: Cache) -> Float[Tensor, "B D"]:
        """Fills an empty cache with texts, prompts and codes, rows of one length; returns the
        hidden state of the group after them."""
        return self.prefill_chunk(*self.embed(batch), cache)[:, -1]

    def embed(self, batch: Batch) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S"]]:
        """Embeddings and positions of texts, prompts and codes, rows of one length."""
        sequence = self._embed_segments(batch)
        return sequence.x, sequence.positions

    def prefill_chunk(
        self, x: Float[Tensor, "B S D"], positions: Float[Tensor, "B S"], cache: Cache
    ) -> Float[Tensor, "B S D"]:
        """Hidden states of some of a prefix, whose beginning is in the cache."""
        level = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.transformer(x, positions, level, cache=cache)

    def step(
        self, group: Int[Tensor, "B G"], position: Int[Tensor, " B"], cache: Cache
    ) -> Float[Tensor, "B D"]:
        """Hidden state after a group whose first frame is at `position` of its row's response."""
        x = self.code_embedding(group[:, :, None]) + self.segments[2]
        level = group.new_zeros(len(group))
        return self.transformer(x, position[:, None].float(), level, cache=cache)[:, -1]


def suppress_eos(
    logits: Float[Tensor, "R 1025"], empty: Bool[Tensor, " R"]
) -> Float[Tensor, "R 1025"]:
    """The logits, without EOS in rows that are still `empty`: no text is answered by nothing."""
    at_end = torch.arange(logits.shape[-1], device=logits.device) == EOS
    return logits.masked_fill(empty[:, None] & at_end, -torch.inf)


class GroupConditioning(nn.Module):
    """Tells a group's later frames which codes come before them in the group."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.codes = CodeEmbedding(config.group_size - 1, config.width)
        self.mix = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 2 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(2 * config.width, config.width),
        )

    def forward(
        self, hidden: Float[Tensor, "B N D"], previous: Int[Tensor, "B g N"]
    ) -> Float[Tensor, "B N D"]:
        """`hidden` of each group, given its first g codes."""
        return hidden + self.mix(hidden + self.codes(previous))


def _grouped(codes: Int[Tensor, "B T"], group_size: int) -> Int[Tensor, "B G groups"]:
    """Whole groups of frames; what is left over at the end has no position of its own."""
    groups = codes.shape[1] // group_size
    return codes[:, : groups * group_size].unflatten(1, (groups, group_size)).transpose(1, 2)
