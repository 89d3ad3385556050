"""The AR model: phonemes and a prompt recording to the first codebook, frame by frame.

VALL-E (Wang et al. 2023) section 4.2.1. The sequence is
`phonemes . <text end> . prompt (all codebooks summed) . <go> . response`, causal throughout; the
position of `<go>` predicts the first frame, the last frame predicts EOS.

Legend: B batch, L phonemes, P prompt frames, T response frames, Q codebooks, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.config import ModelConfig
from valle.model.layers import KVCache, Transformer
from valle.model.sampling import Sampling, sample
from valle.model.sequence import Batch, Joined, Segment, frame_positions, join, take
from valle.model.tokens import CODEBOOK_SIZE, EOS


@dataclass(frozen=True)
class Generated:
    """What the AR model said."""

    codes: Int[Tensor, " T"]
    hit_limit: bool
    """True when the length limit ended it, not the model."""


class AR(nn.Module):
    """Predicts the next frame's first code from text, prompt and the frames so far."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.n_phonemes, config.width)
        self.prompt_embedding = CodeEmbedding(config.n_codebooks, config.width)
        self.code_embedding = CodeEmbedding(1, config.width)
        self.separators = nn.Parameter(torch.zeros(2, config.width))
        # text, prompt and response overlap in position: what each is has to be said
        self.segments = nn.Parameter(torch.zeros(3, config.width))
        self.transformer = Transformer(config, n_levels=1)
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
        joined = self._join(batch)
        level = joined.starts[0].new_zeros(len(joined.x))
        hidden = self.transformer(joined.x, joined.positions, level)
        # `<go>` is one position before the response and predicts its first frame
        return self.head(take(hidden, joined.starts[4] - 1, batch.codes.shape[2] + 1))

    def _join(self, batch: Batch) -> Joined:
        rows = len(batch.phonemes)
        one = batch.frames.new_ones(rows)
        end, go = self.separators[:, None, None].expand(-1, rows, 1, -1)
        rate = self.config.frames_per_phoneme
        text_positions = frame_positions(batch.phoneme_lengths, batch.phonemes.shape[1]) * rate
        text_end = batch.phoneme_lengths[:, None] * rate
        prompt_positions = frame_positions(batch.prompt_frames, batch.prompt.shape[2], end=True)
        code_positions = frame_positions(batch.frames, batch.codes.shape[2])
        text = self.text_embedding(batch.phonemes) + self.segments[0]
        prompt = self.prompt_embedding(batch.prompt) + self.segments[1]
        response = self.code_embedding(batch.codes[:, :1]) + self.segments[2]
        return join(
            [
                Segment(text, text_positions, batch.phoneme_lengths),
                Segment(end, text_end, one),
                Segment(prompt, prompt_positions, batch.prompt_frames),
                Segment(go, -torch.ones_like(text_end), one),
                Segment(response, code_positions, batch.frames),
            ]
        )

    @torch.inference_mode()
    def generate(
        self,
        phonemes: Int[Tensor, " L"],
        prompt: Int[Tensor, "Q P"],
        *,
        sampling: Sampling,
        max_frames: int,
        generator: torch.Generator,
        prefix: Int[Tensor, " T"] | None = None,
        use_cache: bool = True,
    ) -> Generated:
        """Speaks one text in the voice of the prompt; stops at EOS or after `max_frames`.

        With a `prefix` (the first codes of speech whose words the text begins with) it goes on
        from there, VALL-E's continuation; the result begins with the prefix.
        `use_cache=False` runs the whole sequence again for every frame: the slow twin.
        """
        codes = phonemes.new_empty(0) if prefix is None else prefix
        logits, cache = self.prefill(phonemes, prompt, codes, max_frames)
        while len(codes) < max_frames:
            token = sample(logits, sampling, history=codes[None], generator=generator)
            if int(token) == EOS:
                return Generated(codes, hit_limit=False)
            codes = torch.cat([codes, token])
            if use_cache:
                logits = self.step(token, len(codes) - 1, cache)
            else:
                logits = self(_single(phonemes, prompt, codes))[:, -1]
        return Generated(codes, hit_limit=True)

    def prefill(
        self,
        phonemes: Int[Tensor, " L"],
        prompt: Int[Tensor, "Q P"],
        codes: Int[Tensor, " T"],
        max_frames: int,
    ) -> tuple[Float[Tensor, "1 1025"], KVCache]:
        """Logits of the frame after `codes`, and a cache holding text, prompt and `codes`, with
        room for `max_frames` in all."""
        joined = self._join(_single(phonemes, prompt, codes))
        capacity = joined.x.shape[1] + max_frames - len(codes)
        cache = KVCache.empty(self.config, 1, capacity, like=joined.x)
        level = phonemes.new_zeros(1)
        hidden = self.transformer(joined.x, joined.positions, level, cache=cache)
        return self.head(hidden[:, -1]), cache

    def step(
        self, token: Int[Tensor, " B"], position: int, cache: KVCache
    ) -> Float[Tensor, "B 1025"]:
        """Logits of the frame after `token`, which is frame number `position` of the response."""
        x = self.code_embedding(token[:, None, None]) + self.segments[2]
        positions = torch.full((len(token), 1), float(position), device=token.device)
        hidden = self.transformer(x, positions, torch.zeros_like(token), cache=cache)
        return self.head(hidden[:, -1])


class CodeEmbedding(nn.Module):
    """Sums the embeddings of a frame's codes over codebooks; one stacked table."""

    def __init__(self, n_codebooks: int, width: int) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.empty(n_codebooks, CODEBOOK_SIZE, width))
        nn.init.normal_(self.tables, std=0.02)

    def forward(
        self, codes: Int[Tensor, "B Q T"], below: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Embeds `codes`; with `below`, only the first `below[b]` codebooks of row b."""
        n_codebooks = codes.shape[1]
        offsets = torch.arange(n_codebooks, device=codes.device)[None, :, None] * CODEBOOK_SIZE
        table = self.tables.flatten(0, 1)
        embedded = F.embedding(codes + offsets, table)
        if below is not None:
            known = torch.arange(n_codebooks, device=codes.device) < below[:, None]
            embedded = embedded * known[:, :, None, None]
        return embedded.sum(1)


def _single(phonemes: Tensor, prompt: Tensor, codes: Tensor) -> Batch:
    """A batch of one, from unpadded parts; `codes` `[T]` is the first codebook."""

    def length(x: Tensor) -> Tensor:
        return torch.tensor([x.shape[-1]], device=phonemes.device)

    return Batch(
        phonemes[None], length(phonemes), prompt[None], length(prompt),
        codes[None, None], length(codes),
    )  # fmt: skip
