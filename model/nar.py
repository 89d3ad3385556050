"""The NAR model: fills in codebooks 2 to 8, one parallel pass each.

VALL-E (Wang et al. 2023) section 4.2.2. The sequence is
`phonemes . <text end> . prompt (all codebooks) . <go> . response (codebooks below the level)`;
every position sees every other. The prompt is apart from the target, and no loss falls on it
(VALL-E 2 measures what that is worth: similarity 0.639 against 0.530).

Text and prompt are computed anew in each pass, and have to be: they see the response, which is not
the same twice, and every layer's norm depends on the codebook to be filled in. What could be kept
are their embeddings, which cost nothing beside the layers.

Legend: B batch, L phonemes, P prompt frames, T response frames, Q codebooks, D width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.ar import CodeEmbedding
from valle.model.config import ModelConfig
from valle.model.layers import Transformer
from valle.model.sampling import Sampling, guide, sample
from valle.model.sequence import (
    Batch,
    Segment,
    collate,
    frame_positions,
    join,
    take,
    with_unconditional,
)
from valle.model.tokens import CODEBOOK_SIZE


class NAR(nn.Module):
    """Predicts codebook `level` of every frame from the codebooks below it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.n_levels = config.n_codebooks - 1
        self.text_embedding = nn.Embedding(config.n_phonemes, config.width)
        self.prompt_embedding = CodeEmbedding(config.n_codebooks, config.width)
        self.code_embedding = CodeEmbedding(self.n_levels, config.width)
        self.separators = nn.Parameter(torch.zeros(2, config.width))
        # text, prompt and response overlap in position: what each is has to be said
        self.segments = nn.Parameter(torch.zeros(3, config.width))
        self.transformer = Transformer(config, self.n_levels)
        # one stacked head: see AdaptiveNorm
        self.heads = nn.Parameter(torch.empty(self.n_levels, CODEBOOK_SIZE, config.width))
        for parameter in (self.text_embedding.weight, self.separators, self.segments, self.heads):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Batch, level: Int[Tensor, " B"]) -> Float[Tensor, "B T 1024"]:
        """Logits of codebook `level` (1 .. Q-1, per row) of the response."""
        rows = len(batch.phonemes)
        one = batch.frames.new_ones(rows)
        end, go = self.separators[:, None, None].expand(-1, rows, 1, -1)
        # text positions are stretched over the response: a phoneme starts out beside the frames
        # that say it
        stretch = (batch.expected / batch.phoneme_lengths)[:, None]
        text_positions = frame_positions(batch.phoneme_lengths, batch.phonemes.shape[1]) * stretch
        prompt_positions = frame_positions(batch.prompt_frames, batch.prompt.shape[2], end=True)
        code_positions = frame_positions(batch.frames, batch.codes.shape[2])
        known = self.code_embedding(batch.codes[:, : self.n_levels], below=level)
        text = self.text_embedding(batch.phonemes) + self.segments[0]
        prompt = self.prompt_embedding(batch.prompt) + self.segments[1]
        response = known + self.segments[2]
        joined = join(
            [
                Segment(text, text_positions, batch.phoneme_lengths),
                Segment(end, batch.expected[:, None].float(), one),
                Segment(prompt, prompt_positions, batch.prompt_frames),
                Segment(go, -torch.ones(rows, 1, device=known.device), one),
                Segment(response, code_positions, batch.frames),
            ]
        )
        in_prompt = joined.within(2)
        visible = joined.valid[:, None] & (in_prompt[:, None] | ~in_prompt[:, :, None])
        hidden = self.transformer(joined.x, joined.positions, level - 1, visible)
        response = take(hidden, joined.starts[4], batch.codes.shape[2])
        return response @ self.heads[level - 1].transpose(1, 2)

    @torch.inference_mode()
    def generate(
        self,
        phonemes: Int[Tensor, " L"],
        prompt: Int[Tensor, "Q P"],
        first: Int[Tensor, " T"],
        *,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Int[Tensor, "Q T"]:
        """All codebooks of a response whose first codebook is `first`."""
        codes = first.new_zeros(self.config.n_codebooks, len(first))
        codes[0] = first
        for level in range(1, self.config.n_codebooks):
            batch = collate([phonemes], [prompt], [codes])
            logits = self._guided(batch, level, sampling.guidance_scale)[0]
            codes[level] = sample(logits, sampling, generator=generator)
        return codes

    @torch.inference_mode()
    def generate_batch(
        self,
        items: Sequence[tuple[Int[Tensor, " _"], Int[Tensor, "_ _"], Int[Tensor, " _"]]],
        *,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[Int[Tensor, "_ _"]]:
        """`generate` for several (phonemes, prompt, first codebook) at once, a generator each.

        Text and prompt go through all layers again at every level: attention looks both ways, so
        what is known of them changes with the response.
        """
        phonemes, prompts, firsts = zip(*items, strict=True)
        codes = [first.new_zeros(self.config.n_codebooks, len(first)) for first in firsts]
        for row, first in zip(codes, firsts, strict=True):
            row[0] = first
        for level in range(1, self.config.n_codebooks):
            batch = collate(phonemes, prompts, codes)
            logits = self._guided(batch, level, sampling.guidance_scale)
            for row, scores, generator in zip(codes, logits, generators, strict=True):
                row[level] = sample(scores[: row.shape[1]], sampling, generator=generator)
        return codes

    def _guided(self, batch: Batch, level: int, scale: float) -> Float[Tensor, "B T 1024"]:
        """Logits of a codebook of the response, guided where `scale` is above 1."""
        batch = batch.to(self.heads.device)
        levels = torch.full((len(batch.frames),), level, device=self.heads.device)
        if scale == 1:
            return self(batch, levels)
        given, without = self(with_unconditional(batch), levels.repeat(2)).chunk(2)
        return guide(given, without, scale)
