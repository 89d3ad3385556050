"""Tiny models and batches for tests."""

import torch

from valle.model.ar import AR
from valle.model.codec.encodec import EncodecConfig
from valle.model.config import ARConfig, ModelConfig, NARConfig
from valle.model.nar import NAR
from valle.model.sequence import Batch, collate

TINY_CODEC = EncodecConfig(name="tiny", n_filters=2, dimension=8, lstm=0, n_codebooks=8)

TINY = ModelConfig(width=16, n_heads=2, n_layers=2, dropout=0.0)
TINY_AR = ARConfig.from_shared(TINY)
TINY_NAR = NARConfig.from_shared(TINY)


def tiny_ar(seed: int = 0, config: ARConfig = TINY_AR) -> AR:
    torch.manual_seed(seed)
    return AR(config).eval()


def tiny_nar(seed: int = 0, config: NARConfig = TINY_NAR) -> NAR:
    torch.manual_seed(seed)
    return NAR(config).eval()


def random_items(*frames: int, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """(phonemes [L], prompt [8, P], codes [8, T]) of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(2, high, shape, generator=generator)

    return [(draw(100, 4 + n // 4), draw(1024, 8, 5 + n // 2), draw(1024, 8, n)) for n in frames]


def random_batch(*frames: int, seed: int = 0) -> Batch:
    phonemes, prompts, codes = zip(*random_items(*frames, seed=seed), strict=True)
    return collate(phonemes, prompts, codes)


def perturb(model: AR | NAR, size: float = 0.05) -> None:
    """Adds noise to every parameter: a fresh model's modulation is zero and would hide errors."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
