"""Synthetic inputs, the same on every machine: models, batches, recordings, requests.

Everything is drawn on the CPU and then moved, because generators of devices draw other numbers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import valle
from valle.jobs.bench.gpu.record import TINY
from valle.model.ar import AR
from valle.model.config import ARConfig, Kind, ModelConfig, NARConfig
from valle.model.nar import NAR
from valle.model.sampling import Sampling
from valle.model.sequence import Batch, collate
from valle.model.tokens import CODEBOOK_SIZE, EOS, N_CODEBOOKS, SAMPLE_RATE
from valle.serve.engine.request import Request

GOLDEN = Path(valle.__file__).resolve().parent.parent / "tests" / "golden"
SAMPLING = Sampling(top_p=0.9, repetition_threshold=0.1)
GUIDED_SAMPLING = replace(SAMPLING, guidance_scale=1.5)
"""The default sampling, `model.valle.Synthesis().ar`; that module needs packages for text, which a
bare machine lacks."""

SAMPLINGS = (
    Sampling(top_p=0.9, repetition_threshold=0.1, guidance_scale=1.5),
    Sampling(temperature=0.0, guidance_scale=3.0),
    Sampling(temperature=0.7, top_k=20, guidance_scale=2.0),
    Sampling(repetition_threshold=0.2, repetition_window=4, guidance_scale=1.5),
)
"""Four different samplings, all with guidance: greedy, top-p, top-k, repetition."""


def build(kind: Kind, config: ModelConfig) -> AR | NAR:
    """An untrained model, on torch's default device; an AR model in groups of one frame."""
    if kind == "ar":
        return AR(ARConfig.from_shared(config))
    return NAR(NARConfig.from_shared(config))


def build_model(kind: Kind, config: ModelConfig, device: torch.device, seed: int = 0) -> AR | NAR:
    """An untrained model, initialised on the device: a large one takes seconds on a CPU."""
    torch.manual_seed(seed)
    with device:
        return build(kind, config)


def perturb(model: AR | NAR, size: float) -> None:
    """Adds noise to every parameter, since the modulation of an untrained model is zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += size * noise.to(parameter)


def golden_model(kind: Kind) -> AR | NAR:
    """The model with the committed weights of the golden tests."""
    model = build(kind, TINY)
    weights = load_file(GOLDEN / f"{kind}.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def short_ar(group: int, config: ModelConfig = TINY) -> AR:
    """An AR model of random weights that draws EOS after one to a few dozen frames."""
    torch.manual_seed(0)
    model = AR(ARConfig.from_shared(config, group_size=group))
    perturb(model, 0.5)
    with torch.no_grad():
        model.head.bias[EOS] += 6.5
    return model.eval()


def random_items(*frames: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(phonemes `[L]`, prompt `[8, P]`, codes `[8, T]`) with T of `frames`; seed 5 gives those of
    the golden tests."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(2, high, shape, generator=generator)

    return [
        (draw(100, 4 + n // 4), draw(1024, N_CODEBOOKS, 5 + n // 2), draw(1024, N_CODEBOOKS, n))
        for n in frames
    ]


def random_batch(*frames: int, seed: int = 0) -> Batch:
    """`random_items` as a batch, on the CPU."""
    phonemes, prompts, codes = zip(*random_items(*frames, seed=seed), strict=True)
    return collate(phonemes, prompts, codes)


def random_requests(count: int, max_frames: int = 40) -> list[Request]:
    """Guided requests of unequal lengths, each with its own seed and sampling."""
    requests = []
    for number in range(count):
        phonemes, prompt, _ = random_items(12 + 3 * number, seed=number)[0]
        requests.append(
            Request(
                id=f"r{number}",
                phonemes=phonemes.tolist(),
                prompt=prompt.numpy().astype(np.int16),
                max_frames=max_frames,
                seed=number,
                sampling=SAMPLINGS[number % len(SAMPLINGS)],
            )
        )
    return requests


def random_codes(generator: np.random.Generator, *shape: int) -> NDArray[np.int16]:
    """Uniformly random codes."""
    return generator.integers(0, CODEBOOK_SIZE, shape).astype(np.int16)


def recording(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Samples `[seconds * 24000]` of a tone that glides, with overtones and noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(5 * time + seed)) / SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    loudness = 0.1 * (1 + np.sin(9 * time))
    return (loudness * tone + 0.01 * generator.normal(size=len(time))).astype(np.float32)
