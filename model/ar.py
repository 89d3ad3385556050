"""The AR model: generates the first codebook from phonemes and a prompt, frame by frame.

VALL-E (Wang et al. 2023) section 4.2.1. The sequence is
`phonemes . <text end> . prompt (all codebooks summed) . <go> . response`, causal throughout; the
position of `<go>` predicts the first frame, the last frame predicts EOS.

With a `group_size` G above 1, each position of the response is a group of G frames and predicts the
next group (grouped codes, VALL-E 2, Chen et al. 2024). VALL-E 2 draws the frames of a group
independently; here each frame is conditioned on those before it in the group (`GroupConditioning`).

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
    """Result of `AR.generate`."""

    codes: Int[Tensor, " T"]
    hit_limit: bool
    """True if `max_frames` ended it, False if the model predicted EOS."""


class AR(nn.Module):
    """Predicts the first codebook of the next frame from text, prompt and the frames so far."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.n_phonemes, config.width)
        self.prompt_embedding = CodeEmbedding(config.n_codebooks, config.width)
        self.code_embedding = CodeEmbedding(config.group_size, config.width)
        self.separators = nn.Parameter(torch.zeros(2, config.width))
        # text, prompt and response share rotary positions: a learnt vector tells them apart
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
        """Hidden states that predict each group of the response and the one after the last."""
        sequence = self._embed_segments(batch)
        level = sequence.starts[0].new_zeros(len(sequence.x))
        hidden = self.transformer(sequence.x, sequence.positions, level)
        # `<go>` is one position before the response and predicts its first group
        size = batch.codes.shape[2] // self.config.group_size + 1
        return gather_span(hidden, sequence.starts[4] - 1, size)

    def logits(
        self, hidden: Float[Tensor, "B N D"], previous: Int[Tensor, "B g N"]
    ) -> Float[Tensor, "B N 1025"]:
        """Logits of frame g of each group, given the `previous` g frames of the group."""
        if previous.shape[1]:
            assert self.within is not None, "a group of one has no frame before its first"
            hidden = self.within(hidden, previous)
        return self.head(hidden)

    def _embed_segments(self, batch: Batch) -> PaddedSequence:
        """The input sequence of the module's docstring, embedded."""
        rows = len(batch.phonemes)
        one = batch.frames.new_ones(rows)
        end, go = self.separators[:, None, None].expand(-1, rows, 1, -1)
        rate, group_size = self.config.frames_per_phoneme, self.config.group_size
        # text: one phoneme is `rate` frames long, so that it lies near its frames
        text_positions = frame_positions(batch.phoneme_lengths, batch.phonemes.shape[1]) * rate
        text_end = batch.phoneme_lengths[:, None] * rate
        text = self.text_embedding(batch.phonemes) + self.segments[0]
        # prompt: positions count up to the -1 of `<go>`, as if the response continued it
        prompt = self._prompt_groups(batch.prompt) + self.segments[1]
        prompt_groups = batch.prompt_frames // group_size
        prompt_positions = frame_positions(prompt_groups, prompt.shape[1], group_size, end=True)
        # response: a group lies at the position of its first frame
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
        """Embedded frames, averaged over each group; an incomplete last group is left out."""
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
        """Generates the first codebook of one text in the prompt's voice, at least one frame.

        Stops at EOS or after `max_frames`. A `prefix` holds the codes of the text's first words, in
        whole groups; the result begins with it (VALL-E's continuation). Tokens are a function of
        `seed` and their positions. `use_cache=False` recomputes the whole sequence for every group:
        the slow reference. Raises ValueError for a prefix that ends inside a group.
        """
        codes = phonemes.new_empty(0) if prefix is None else prefix
        group_size = self.config.group_size
        if len(codes) % group_size:
            raise ValueError(
                f"prefix: {len(codes)} frames are no multiple of group_size {group_size}; cut it"
            )
        guided = sampling.guided
        rows = 2 if guided else 1  # the second row is unconditional
        capacity = self.capacity(len(phonemes), prompt.shape[1], max_frames)
        cache = KVCache.empty(self.config, rows, capacity, like=self.head.weight)
        hidden = self.prefill(single_batch(phonemes, prompt, codes, guided=guided), cache)
        while True:
            # draw the frames of a group one by one
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
            # feed the complete group to the transformer
            if use_cache:
                position = torch.full((rows,), len(codes) - group_size, device=codes.device)
                hidden = self.step(codes[-group_size:].expand(rows, -1), position, cache)
            else:
                hidden = self.hidden(single_batch(phonemes, prompt, codes, guided=guided))[:, -1]

    def capacity(self, n_phonemes: int, prompt_frames: int, max_frames: int) -> int:
        """Cache positions that a text, a prompt and a response of `max_frames` take."""
        group_size = self.config.group_size
        return (
            n_phonemes
            + prompt_frames // group_size
            + max_frames // group_size
            + len(self.separators)
        )

    def prefill(self, batch: Batch, cache: Cache) -> Float[Tensor, "B D"]:
        """Fills an empty cache with texts, prompts and codes; returns the last hidden state, which
        predicts the next group. The rows must be equally long."""
        return self.prefill_chunk(*self.embed(batch), cache)[:, -1]

    def embed(self, batch: Batch) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S"]]:
        """Embeddings and positions of texts, prompts and codes. The rows must be equally long."""
        sequence = self._embed_segments(batch)
        return sequence.x, sequence.positions

    def prefill_chunk(
        self, x: Float[Tensor, "B S D"], positions: Float[Tensor, "B S"], cache: Cache
    ) -> Float[Tensor, "B S D"]:
        """Hidden states of the next S positions, after those in the cache (chunked prefill)."""
        level = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.transformer(x, positions, level, cache=cache)

    def step(
        self, group: Int[Tensor, "B G"], position: Int[Tensor, " B"], cache: Cache
    ) -> Float[Tensor, "B D"]:
        """Decodes one group per row: the hidden state after it, which predicts the next one.

        `position` is the group's first frame in the response.
        """
        x = self.code_embedding(group[:, :, None]) + self.segments[2]
        level = group.new_zeros(len(group))
        return self.transformer(x, position[:, None].float(), level, cache=cache)[:, -1]


def suppress_eos(
    logits: Float[Tensor, "R 1025"], empty: Bool[Tensor, " R"]
) -> Float[Tensor, "R 1025"]:
    """The logits with EOS excluded in `empty` rows: every response has at least one frame."""
    at_end = torch.arange(logits.shape[-1], device=logits.device) == EOS
    return logits.masked_fill(empty[:, None] & at_end, -torch.inf)


class GroupConditioning(nn.Module):
    """Conditions the later frames of a group on the codes before them in the group."""

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
        """`hidden` of each group, conditioned on the group's first g codes."""
        return hidden + self.mix(hidden + self.codes(previous))


def _grouped(codes: Int[Tensor, "B T"], group_size: int) -> Int[Tensor, "B G groups"]:
    """Frames by group; an incomplete last group is left out."""
    groups = codes.shape[1] // group_size
    return codes[:, : groups * group_size].unflatten(1, (groups, group_size)).transpose(1, 2)
