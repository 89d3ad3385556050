"""The NAR model: predicts each codebook after the first in one parallel pass.

VALL-E (Wang et al. 2023) section 4.2.2. The sequence is
`phonemes . <text end> . prompt (all codebooks) . <go> . response (codebooks below the level)`.
Attention is bidirectional, with one exception: prompt positions attend to the prompt only (in the
paper, to everything). A prompt's keys and values therefore depend on the prompt and the level alone
and are computed once per voice and level (`prompt.py`). Text and response are recomputed in each
pass. The prompt is separate from the target and carries no loss (VALL-E 2 measures the effect on
speaker similarity: 0.639 against 0.530).

Legend: B batch, L phonemes, P prompt frames, T response frames, Q codebooks, D width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.config import NARConfig
from valle.model.layers import CodeEmbedding, Transformer
from valle.model.prompt import BatchedPromptKV, KVRecorder, PromptKV
from valle.model.sampling import Sampling, guide, sample
from valle.model.sequence import (
    Batch,
    Segment,
    collate,
    concat_segments,
    frame_positions,
    gather_span,
    unconditional,
)
from valle.model.tokens import CODEBOOK_SIZE

PROMPT_SEGMENT = 2
"""Index of the prompt among the segments of the sequence."""


class NAR(nn.Module):
    """Predicts codebook `level` of every frame from the codebooks below it."""

    def __init__(self, config: NARConfig) -> None:
        super().__init__()
        self.config = config
        self.n_levels = config.n_codebooks - 1
        self.text_embedding = nn.Embedding(config.n_phonemes, config.width)
        self.prompt_embedding = CodeEmbedding(config.n_codebooks, config.width)
        self.code_embedding = CodeEmbedding(self.n_levels, config.width)
        self.separators = nn.Parameter(torch.zeros(2, config.width))
        # text, prompt and response share rotary positions: a learnt vector tells them apart
        self.segments = nn.Parameter(torch.zeros(3, config.width))
        self.transformer = Transformer(config, self.n_levels)
        # one stacked parameter, not a head per level: see AdaptiveNorm
        self.heads = nn.Parameter(torch.empty(self.n_levels, CODEBOOK_SIZE, config.width))
        for parameter in (self.text_embedding.weight, self.separators, self.segments, self.heads):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Batch, level: Int[Tensor, " B"]) -> Float[Tensor, "B T 1024"]:
        """Logits of codebook `level` (1 .. Q-1, per row) of the response."""
        segments = self._around_prompt(batch, level)
        segments.insert(PROMPT_SEGMENT, self._prompt_segment(batch.prompt, batch.prompt_frames))
        sequence = concat_segments(segments)
        in_prompt = sequence.segment_mask(PROMPT_SEGMENT)
        mask = sequence.valid[:, None] & (in_prompt[:, None] | ~in_prompt[:, :, None])
        hidden = self.transformer(sequence.x, sequence.positions, level - 1, mask)
        return self._logits(gather_span(hidden, sequence.starts[-1], batch.codes.shape[2]), level)

    def _around_prompt(self, batch: Batch, level: Int[Tensor, " B"]) -> list[Segment]:
        """All segments but the prompt: text, its end, go, response."""
        one = torch.ones_like(batch.frames)
        end, go = self.separators[:, None, None].expand(-1, len(one), 1, -1)
        # text positions are stretched over the response: a phoneme lies near its frames
        stretch = (batch.total_frames / batch.phoneme_lengths)[:, None]
        text_positions = frame_positions(batch.phoneme_lengths, batch.phonemes.shape[1]) * stretch
        code_positions = frame_positions(batch.frames, batch.codes.shape[2])
        response = self.code_embedding(batch.codes[:, : self.n_levels], below=level)
        text = self.text_embedding(batch.phonemes) + self.segments[0]
        return [
            Segment(text, text_positions, batch.phoneme_lengths),
            Segment(end, batch.total_frames[:, None].float(), one),
            Segment(go, -torch.ones(len(one), 1, device=response.device), one),
            Segment(response + self.segments[2], code_positions, batch.frames),
        ]

    def _prompt_segment(self, prompt: Int[Tensor, "B Q P"], frames: Int[Tensor, " B"]) -> Segment:
        positions = frame_positions(frames, prompt.shape[2], end=True)
        return Segment(self.prompt_embedding(prompt) + self.segments[1], positions, frames)

    def _logits(
        self, response: Float[Tensor, "B T D"], level: Int[Tensor, " B"]
    ) -> Float[Tensor, "B T 1024"]:
        return response @ self.heads[level - 1].transpose(1, 2)

    @torch.inference_mode()
    def prefill_prompt(self, prompt: Int[Tensor, "Q P"], n_levels: int) -> PromptKV:
        """Keys and values of a prompt at levels 1 .. `n_levels`, computed as one batch."""
        rows = prompt.expand(n_levels, -1, -1).to(self.heads.device)
        level = torch.arange(n_levels, device=rows.device)
        segment = self._prompt_segment(rows, torch.full_like(level, prompt.shape[1]))
        recorder = KVRecorder()
        self.transformer(segment.x, segment.positions, level, cache=recorder)
        return PromptKV(torch.stack(recorder.keys, dim=1), torch.stack(recorder.values, dim=1))

    @torch.inference_mode()
    def forward_cached(
        self, prompts: Sequence[PromptKV], batch: Batch, level: int
    ) -> Float[Tensor, "B T 1024"]:
        """`forward` at one level, with `prompts` in place of the batch's own prompts."""
        levels = torch.full_like(batch.frames, level)
        sequence = concat_segments(self._around_prompt(batch, levels))
        prompt_kv = BatchedPromptKV.stack(level, prompts, sequence.valid)
        hidden = self.transformer(sequence.x, sequence.positions, levels - 1, cache=prompt_kv)
        return self._logits(gather_span(hidden, sequence.starts[-1], batch.codes.shape[2]), levels)

    @torch.inference_mode()
    def generate(
        self,
        phonemes: Int[Tensor, " L"],
        prompt: Int[Tensor, "Q P"],
        first_codebook: Int[Tensor, " T"],
        *,
        sampling: Sampling,
        seed: int,
        guided_levels: int | None = None,
        prefix: Int[Tensor, "Q S"] | None = None,
        total_frames: int | None = None,
    ) -> Int[Tensor, "Q T"]:
        """All codebooks of a response with the given `first_codebook`: the slow reference.

        Guidance applies to the first `guided_levels` (None: all). While a response is still being
        generated, `prefix` holds the frames that must stay as they are, and `total_frames` is the
        estimated length of the whole. Tokens are a function of `seed`, codebook and frame.
        """
        codes = first_codebook.new_zeros(self.config.n_codebooks, len(first_codebook))
        codes[0] = first_codebook
        positions = torch.arange(len(first_codebook), device=first_codebook.device)
        # one pass per codebook; each reads the codes of the passes before it
        for level in range(1, self.config.n_codebooks):
            totals = None if total_frames is None else [total_frames]
            batch = collate([phonemes], [prompt], [codes], totals).to(self.heads.device)
            levels = first_codebook.new_tensor([level])
            logits = self(batch, levels)
            if sampling.guided and (guided_levels is None or level <= guided_levels):
                logits = guide(logits, self(unconditional(batch), levels), sampling.guidance_scale)
            codes[level] = sample(
                logits[0], sampling, seed=seed, positions=positions, codebook=level
            )
            if prefix is not None:
                codes[level, : prefix.shape[1]] = prefix[level]
        return codes
