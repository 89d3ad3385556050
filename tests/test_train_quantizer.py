"""nano 2's quantiser: batched = single, streamed = offline, training, resume, export."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.training import (
    assert_resumes_exactly,
    last_checkpoint,
    run_plain,
    run_two_ranks,
    write_tones,
)

from valle.jobs.train_quantizer import QuantizerRecipe, QuantizerTrainee, resolve_recipe
from valle.jobs.training.trainee import Worker
from valle.model.codec.quantizer import Quantizer, QuantizerConfig
from valle.model.codec.quantizer_training import reconstruction_error
from valle.model.codec.weights import load_quantizer, save_quantizer
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState

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
def test_encode_batched_equals_single(rate: int) -> None:
    quantizer = tiny(rate)
    lengths = torch.tensor([80, 37, 61])
    features = torch.randn(3, 80, 20)  # noise after the end of a recording
    together = quantizer.encode(features, lengths)
    assert together.shape == (3, 3, 80 * rate // 100)
    block = quantizer.config.features_per_block
    for row, length in enumerate(lengths.tolist()):
        padded = -(-length // block) * block
        alone = quantizer.encode(features[row : row + 1, :padded], lengths[row : row + 1])
        assert torch.equal(together[row, :, : alone.shape[2]], alone[0])


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_advance_streamed_equals_decode(rate: int, lookahead: int) -> None:
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


def test_decode_looks_ahead_by_lookahead() -> None:
    """A change of frame 20 reaches no feature before frame 20 - lookahead."""
    for lookahead in (0, 1, 2):
        quantizer = tiny(50, lookahead)
        codes = torch.randint(0, 16, (1, 3, 40))
        changed = codes.clone()
        changed[:, :, 20] = (changed[:, :, 20] + 5) % 16
        differs = (quantizer.decode(codes) != quantizer.decode(changed)).any(-1)[0]
        assert int(differs.nonzero()[0]) == 2 * (20 - lookahead)


def test_quantizer_config_names_bad_fields() -> None:
    with pytest.raises(ValueError, match="frame_rate: 60 is none of 100, 75, 50, 25"):
        QuantizerConfig(frame_rate=60)
    with pytest.raises(ValueError, match="lookahead: 5 is not in"):
        QuantizerConfig(lookahead=5)


def test_reconstruction_error_weighs_pitch_by_voicing() -> None:
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
def recipe(tmp_path_factory: pytest.TempPathFactory) -> QuantizerRecipe:
    """Sixty steps on gliding tones by four speakers, one of them held out."""
    folder = tmp_path_factory.mktemp("quantizer")
    corpus = write_tones(folder / "corpus", ("a/0", "a/1", "b/0", "c/0"))
    return QuantizerRecipe(
        corpora=(str(corpus),), out=str(folder / "out"), run="test",
        held_out_speakers=("c",), steps=60, unquantized_steps=20, batch_size=4, log_every=20,
        checkpoint_every=30, threads=1,
        quantizer=QuantizerConfig(
            n_codebooks=3, codebook_size=16, dimension=8, width=16, blocks=1
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(recipe: QuantizerRecipe) -> Path:
    """Folder of the checkpoints of a whole run."""
    folder = Path(recipe.out).parent / "runs"
    run_plain(QuantizerTrainee(recipe), folder)
    return folder


def log_lines(out: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "training.jsonl").read_text().splitlines()]


def test_trainee_learns_and_exports(recipe: QuantizerRecipe, trained: Path) -> None:
    lines = log_lines(recipe.out)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["error"] < 0.7 * lines[0]["error"]
    assert lines[-1]["held_out"]["3"] < lines[1]["held_out"]["3"]
    weights = checkpoint.load_weights(last_checkpoint(trained))
    for name, value in load_quantizer(Path(recipe.out)).encoder.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"].half().float())
    assert json.loads((Path(recipe.out) / "recipe.json").read_text())["steps"] == 60


def test_trainee_metrics_and_metadata(
    recipe: QuantizerRecipe, trained: Path, tmp_path: Path
) -> None:
    short = replace(recipe, out=str(tmp_path / "out"), steps=24, log_every=8)
    metrics = run_plain(QuantizerTrainee(short), tmp_path / "runs")
    assert set(metrics[24]) == {
        "train/error", "train/commitment", "train/codebooks", "train/gradient_norm",
        "train/learning_rate", "train/skipped_batches", "validation/error_2_codebooks",
        "validation/error_3_codebooks",
    }  # fmt: skip
    assert metrics[8]["train/codebooks"] == 0
    assert "validation/error_2_codebooks" not in metrics[8], "before the codebooks exist"
    config = json.loads((last_checkpoint(trained) / "config.json").read_text())
    assert config["kind"] == "quantizer" and config["model"]["dimension"] == 8
    assert config["recipe"]["run"] == "test"


def test_trainee_resumed_equals_uninterrupted(recipe: QuantizerRecipe, tmp_path: Path) -> None:
    """To the last bit: k-means, moving averages and revived entries included."""
    short = replace(recipe, out=str(tmp_path / "out"), log_every=1, checkpoint_every=15, steps=50)
    for interrupt_at in (18, 38):  # before and after the codebooks' initialisation at step 20
        folder = tmp_path / str(interrupt_at)
        assert_resumes_exactly(partial(QuantizerTrainee, short), folder, interrupt_at)
    assert [line["step"] for line in log_lines(tmp_path / "out")] == list(range(1, 51))


def test_batches_of_two_ranks_are_those_of_one(recipe: QuantizerRecipe) -> None:
    """Two workers with four crops each draw what one worker with eight does."""
    state = TrainState(step=31, position=31)
    one = QuantizerTrainee(replace(recipe, batch_size=8)).batches(state, Worker())
    two = [
        QuantizerTrainee(recipe).batches(state, Worker(rank=rank, world_size=2))
        for rank in range(2)
    ]
    for _ in range(6):
        expected, *shards = next(one), *(next(stream) for stream in two)
        features = torch.cat([shard.data.features for shard in shards])
        assert torch.equal(features, expected.data.features)
        assert {shard.data.n_codebooks for shard in shards} == {expected.data.n_codebooks}


def test_trainee_two_ranks_equal_one(recipe: QuantizerRecipe, tmp_path: Path) -> None:
    """The same weights before quantisation; with it, codebooks that both ranks share."""
    short = replace(
        recipe, out=str(tmp_path / "out"), steps=12, unquantized_steps=6, checkpoint_every=6
    )
    run_plain(QuantizerTrainee(replace(short, batch_size=8)), tmp_path / "one")
    run_two_ranks(partial(QuantizerTrainee, short), tmp_path / "two")
    expected = checkpoint.load_weights(tmp_path / "one/step_00000006")
    for name, value in checkpoint.load_weights(tmp_path / "two/step_00000006").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    weights = checkpoint.load_weights(last_checkpoint(tmp_path / "two"))
    assert weights["books.layers.0._codebook.inited"].item() == 1


def test_trainee_warm_start(recipe: QuantizerRecipe, trained: Path, tmp_path: Path) -> None:
    first = log_lines(recipe.out)[-1]
    further = replace(recipe, warm_start=recipe.out, out=str(tmp_path / "out"), steps=40)
    run_plain(QuantizerTrainee(further), tmp_path / "runs")
    lines = log_lines(tmp_path / "out")
    assert lines[-1]["held_out"]["3"] < first["held_out"]["3"] * 1.1
    assert all(line["codebooks"] for line in lines), "every step quantises"
    other = replace(further, quantizer=QuantizerConfig(width=24))
    with pytest.raises(ValueError, match="warm_start: .* holds .*width=16.* asks for .*width=24"):
        resolve_recipe(other)


def test_resolve_recipe_refuses_an_empty_corpus(recipe: QuantizerRecipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"corpora: no \{speaker\}/\{id\}.wav below .*empty"):
        resolve_recipe(replace(recipe, corpora=(str(tmp_path / "empty"),)))


def test_save_quantizer_round_trip(tmp_path: Path) -> None:
    quantizer = tiny(50)
    save_quantizer(quantizer, tmp_path)
    codes = torch.randint(0, 16, (1, 3, 12))
    torch.testing.assert_close(
        load_quantizer(tmp_path).decode(codes), quantizer.decode(codes), atol=0.02, rtol=0.02
    )
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_quantizer(tmp_path / "nowhere")
