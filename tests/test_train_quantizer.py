"""nano 2's quantiser: batched = single, streamed = whole, trained, saved and read back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from valle.jobs.train_quantizer import QuantizerRecipe, reconstruction_error, train
from valle.model.codec.quantizer import Quantizer, QuantizerConfig
from valle.model.codec.weights import load_quantizer, save_quantizer
from valle.platform import audio
from valle.platform.recipe import RecipeError

RATES = (100, 75, 50, 25)


def tiny(frame_rate: int, lookahead: int = 1) -> Quantizer:
    torch.manual_seed(0)
    quantizer = Quantizer(
        QuantizerConfig(
            frame_rate=frame_rate, n_codebooks=3, codebook_size=16, dimension=8, width=12,
            lookahead=lookahead,
        )
    )  # fmt: skip
    for name, buffer in quantizer.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()
        if name.endswith("inited"):
            buffer.fill_(1)
    quantizer.deviation.uniform_(0.5, 2)
    return quantizer.eval().requires_grad_(False)


@pytest.mark.parametrize("rate", RATES)
def test_batched_is_single(rate: int) -> None:
    quantizer = tiny(rate)
    lengths = torch.tensor([80, 37, 61])
    features = torch.randn(3, 80, 20)  # what stands behind a recording's end is noise
    together = quantizer.encode(features, lengths)
    assert together.shape == (3, 3, 80 * rate // 100)
    block = quantizer.config.features_per_block
    for row, length in enumerate(lengths.tolist()):
        padded = -(-length // block) * block
        alone = quantizer.encode(features[row : row + 1, :padded], lengths[row : row + 1])
        assert torch.equal(together[row, :, : alone.shape[2]], alone[0])


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_streamed_is_whole(rate: int, lookahead: int) -> None:
    quantizer = tiny(rate, lookahead)
    codes = torch.randint(0, 16, (2, 3, 17))
    expected = quantizer.decode(codes)
    assert expected.shape[1] == {100: 17, 75: 24, 50: 34, 25: 68}[rate]  # 75: six blocks of four
    for chunks in ([1] * 17, [2, 7, 1, 7]):
        state, parts = quantizer.decoder.start(), []
        for chunk in codes.split(chunks, dim=2):
            features, state = quantizer.advance(chunk, state)
            parts.append(features)
        parts.append(quantizer.flush(state))
        streamed = torch.cat(parts, 1)[:, : expected.shape[1]]
        torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)


def test_lookahead_is_as_said() -> None:
    """A change of frame 20 reaches no feature before frame 20 - lookahead."""
    for lookahead in (0, 1, 2):
        quantizer = tiny(50, lookahead)
        codes = torch.randint(0, 16, (1, 3, 40))
        changed = codes.clone()
        changed[:, :, 20] = (changed[:, :, 20] + 5) % 16
        differs = (quantizer.decode(codes) != quantizer.decode(changed)).any(-1)[0]
        assert int(differs.nonzero()[0]) == 2 * (20 - lookahead)


def test_unknown_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="frame_rate: 60 is none of 100, 75, 50, 25"):
        QuantizerConfig(frame_rate=60)
    with pytest.raises(ValueError, match="lookahead: 5 is not in"):
        QuantizerConfig(lookahead=5)


def test_pitch_counts_where_there_is_a_voice() -> None:
    features, off = torch.zeros(1, 2, 20), torch.zeros(1, 2, 20)
    features[0, :, 19] = off[0, :, 19] = torch.tensor([0.4, -0.4])
    errors = []
    for frame in (0, 1):
        restored = off.clone()
        restored[0, frame, 18] = 1.0
        error = reconstruction_error(restored, features, torch.ones(20, 1), torch.ones(20))
        errors.append(error.item())
    assert errors[0] > 5 * errors[1] > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> QuantizerRecipe:
    """A short training on tones that glide, by four speakers of which one is held out."""
    folder = tmp_path_factory.mktemp("quantizer")
    generator = np.random.default_rng(0)
    seconds = np.arange(3 * 24_000) / 24_000
    for name in ("a/0", "a/1", "b/0", "c/0"):
        low, high = generator.uniform(100, 300, 2)
        phase = 2 * np.pi * np.cumsum(low + (high - low) * seconds / 3) / 24_000
        wave = sum(np.sin(k * phase) / k for k in range(1, 9)) * 0.2
        path = folder / "corpus" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio.wav_bytes(wave.astype(np.float32)))
    recipe = QuantizerRecipe(
        corpora=(str(folder / "corpus"),), out=str(folder / "out"),
        held_out_speakers=("c",), steps=60, unquantized_steps=20, batch_size=4, log_every=20,
        save_every=30, threads=1,
        quantizer=QuantizerConfig(
            n_codebooks=3, codebook_size=16, dimension=8, width=16, blocks=1
        ),
    )  # fmt: skip
    train(recipe)
    return recipe


def test_training_learns_and_is_repeatable(trained: QuantizerRecipe) -> None:
    log = (Path(trained.out) / "training.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["error"] < 0.7 * lines[0]["error"]
    assert lines[-1]["held_out"]["3"] < lines[1]["held_out"]["3"]
    first = load_quantizer(Path(trained.out)).state_dict()
    train(trained)
    again = load_quantizer(Path(trained.out)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_goes_on_from_weights(trained: QuantizerRecipe, tmp_path: Path) -> None:
    first = json.loads((Path(trained.out) / "training.jsonl").read_text().splitlines()[-1])
    further = replace(trained, warm_start=trained.out, out=str(tmp_path), steps=40)
    last = train(further)
    assert last["held_out"][3] < first["held_out"]["3"] * 1.1
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    assert all(json.loads(line)["codebooks"] for line in lines)  # none without quantisation
    other = replace(further, quantizer=QuantizerConfig(width=24))
    with pytest.raises(ValueError, match="warm_start: .* holds .*width=16.* asks for .*width=24"):
        train(other)


def test_a_gpu_that_is_not_here_is_refused(
    trained: QuantizerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RecipeError, match="train_quantizer.device: cuda, but torch has no GPU here"
    ):
        train(replace(trained, device="cuda"))


def test_saved_is_read_back(tmp_path: Path) -> None:
    quantizer = tiny(50)
    save_quantizer(quantizer, tmp_path)
    codes = torch.randint(0, 16, (1, 3, 12))
    torch.testing.assert_close(
        load_quantizer(tmp_path).decode(codes), quantizer.decode(codes), atol=0.02, rtol=0.02
    )
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_quantizer(tmp_path / "nowhere")
