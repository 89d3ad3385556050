"""Training a narrow EnCodec: initialisation from data, teacher, quantiser, falling losses."""

import itertools

import pytest
import torch
from helpers.tiny_models import TINY_CODEC

from valle.model.codec import encodec
from valle.model.codec.encodec_training import (
    EncodecLossConfig,
    EncodecObjective,
    Teacher,
    init_codebooks,
    init_convolutions,
    residual_quantize,
)
from valle.model.tokens import HOP


def test_init_convolutions_gives_unit_deviation() -> None:
    torch.manual_seed(0)
    model = encodec.build(TINY_CODEC)
    audio = torch.randn(4, 9_600) * 0.1
    before = model.encoder(audio[:, None]).detach().std()
    init_convolutions(model, audio)
    after = model.encoder(audio[:, None]).detach().std()
    assert before < 0.5
    assert after == pytest.approx(1.0, rel=1e-3)


def test_teacher_is_causal() -> None:
    teacher = Teacher(TINY_CODEC.dimension)
    time = torch.arange(8 * HOP) / 24_000
    audio = torch.cat([torch.zeros(8 * HOP), 0.3 * torch.sin(2 * torch.pi * 440 * time)])[None]
    features = teacher(audio)
    assert features.shape == (1, TINY_CODEC.dimension, 16)
    torch.testing.assert_close(features[..., :8], features[..., :1].expand(-1, -1, 8))
    assert features[0, :, 8].max() > features[0, :, 7].max() + 1
    loud, quiet = (teacher(audio * gain)[0, :, 12].mean() for gain in (1.0, 0.1))
    assert loud > quiet


def test_teacher_fit_normalises() -> None:
    torch.manual_seed(0)
    teacher = Teacher(TINY_CODEC.dimension)
    audio = torch.randn(4, 30 * HOP) * torch.tensor([0.01, 0.1, 0.3, 0.5])[:, None]
    teacher.fit(audio)
    features = teacher(audio)
    assert features.mean((0, 2)).abs().max() < 1e-5
    assert features.square().mean() == pytest.approx(1.0, rel=1e-4)


# whether an entry or two stays empty depends on the number of threads
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_init_codebooks_follow_the_vectors() -> None:
    """Each codebook lowers the residual of those before it, and nearly every entry is used."""
    torch.manual_seed(0)
    model = encodec.build(TINY_CODEC)
    vectors = torch.randn(4_000, TINY_CODEC.dimension)
    init_codebooks(model, vectors, per_step=600)
    energies = [vectors.square().mean()]
    residual = vectors
    for layer in model.quantizer.vq.layers:
        index = layer._codebook.quantize(residual)
        assert len(index.unique()) > 900
        assert layer._codebook.cluster_size.sum() == pytest.approx(600, rel=1e-3)
        residual = residual - layer._codebook.embed[index]
        energies.append(residual.square().mean())
    assert all(after < 0.9 * before for before, after in itertools.pairwise(energies))


def test_residual_quantize_revives_dead_entries() -> None:
    """The package's own rule leaves one entry in use here; ours, hundreds."""
    torch.manual_seed(0)
    model = encodec.build(TINY_CODEC)
    loss = EncodecLossConfig()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, TINY_CODEC.dimension, 75)
    for _ in range(20):
        quantized, codes, _ = residual_quantize(model, z, loss, generator)
    assert len(codes[0].unique()) > 300
    assert torch.nn.functional.mse_loss(quantized, z) < 0.05


@pytest.mark.parametrize("teacher_steps", [0, 100], ids=["joined", "taught"])
def test_objective_is_lowered_by_training(teacher_steps: int) -> None:
    torch.manual_seed(0)
    objective = EncodecObjective(
        encodec.build(TINY_CODEC), EncodecLossConfig(teacher_steps=teacher_steps)
    )
    time = torch.arange(38 * HOP) / 24_000
    pitch = torch.linspace(110, 440, 128)[:, None]
    audio = 0.3 * torch.sin(2 * torch.pi * pitch * time) + 0.01 * torch.randn(128, len(time))
    objective.initialize(audio, per_step=16 * 38, seed=0)
    optimizer = torch.optim.AdamW(objective.model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    history: dict[str, list[float]] = {"mel": [], "teacher": []}
    for step in range(30):
        output = objective(audio[::8], step, generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for name, values in history.items():
            values.append(output.terms[name].item())
    assert history["mel"][-1] < 0.8 * history["mel"][0]
    if teacher_steps:
        assert history["teacher"][-1] < 0.8 * history["teacher"][0]
