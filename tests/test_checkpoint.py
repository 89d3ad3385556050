"""The checkpoint format: round trips, the best of a run, damaged files."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TINY_AR, random_batch, tiny_ar, tiny_nar

from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.model.ar import AR
from valle.model.codec.encodec import Encodec
from valle.model.quantize import to_int8
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState


def make_metadata(codec: Encodec) -> checkpoint.CheckpointMetadata:
    return checkpoint.new_metadata(TINY_AR, codec.identity, "test", {"run": "x"})


def test_save_and_load_round_trip(tmp_path: Path, tiny_codec: Encodec) -> None:
    model = tiny_ar()
    checkpoint.save(tmp_path, model.state_dict(), make_metadata(tiny_codec))
    loaded, metadata = checkpoint.load(tmp_path)
    assert isinstance(loaded, AR) and metadata == make_metadata(tiny_codec)
    batch = random_batch(9, 14)
    assert torch.equal(loaded(batch), model(batch))


def test_find_best_takes_the_lowest_word_error_rate_else_the_newest(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    with pytest.raises(FileNotFoundError, match="train first"):
        checkpoint.find_best(str(tmp_path))
    metadata = checkpoint.new_metadata(TINY_AR, tiny_codec.identity, "test", {})
    for step, metrics in (
        (10, {"validation/wer": 0.5}), (20, {"validation/wer": 0.2}), (30, {"validation/loss": 1.0})
    ):  # fmt: skip
        folder = tmp_path / f"step_{step:08d}"
        checkpoint.save(folder, tiny_ar().state_dict(), metadata)
        checkpoint.save_metrics(folder, metrics)
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000020")
    assert checkpoint.find_best(str(tmp_path / "step_00000010")).endswith("step_00000010")
    for step in (10, 20):
        checkpoint.save_metrics(tmp_path / f"step_{step:08d}", {"validation/loss": 1.0})
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000030")


def test_load_optimizer_continues_to_the_last_bit(tmp_path: Path, tiny_codec: Encodec) -> None:
    batch, level = random_batch(9, 14), torch.tensor([3, 5])

    def train(model: AR, optimizer: torch.optim.AdamW, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = Objective(model)(batch, level).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = tiny_ar()
    optimizer = build_optimizer(model, Optimization())
    train(model, optimizer, 5)
    checkpoint.save(tmp_path, model.state_dict(), make_metadata(tiny_codec))
    checkpoint.save_state(tmp_path, TrainState(step=5, epoch=1, position=2))
    checkpoint.save_optimizer(tmp_path, model, optimizer)
    uninterrupted = train(model, optimizer, 5)

    resumed, _ = checkpoint.load(tmp_path)
    assert isinstance(resumed, AR)
    fresh = build_optimizer(resumed, Optimization())
    checkpoint.load_optimizer(tmp_path, resumed, fresh)
    assert train(resumed, fresh, 5) == uninterrupted
    assert checkpoint.load_state(tmp_path) == TrainState(step=5, epoch=1, position=2)


def test_load_refuses_damaged_checkpoints(tmp_path: Path, tiny_codec: Encodec) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        checkpoint.read_metadata(tmp_path)
    checkpoint.save(tmp_path, tiny_nar().state_dict(), make_metadata(tiny_codec))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        checkpoint.load(tmp_path)  # a NAR's weights under an AR's metadata
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ValueError, match="does not fit its config.json"):
        checkpoint.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(ValueError, match="surprise"):
        checkpoint.read_metadata(tmp_path)


def test_load_refuses_int8_weights_without_their_scales(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    weights = to_int8(tiny_ar().state_dict())
    del weights["head.weight.scale"]
    checkpoint.save(tmp_path, weights, make_metadata(tiny_codec))
    with pytest.raises(ValueError, match="head.weight is int8 and has no head.weight.scale"):
        checkpoint.load(tmp_path)


def test_read_metadata_refuses_another_inventory(tmp_path: Path, tiny_codec: Encodec) -> None:
    checkpoint.save(tmp_path, tiny_ar().state_dict(), make_metadata(tiny_codec))
    values = json.loads((tmp_path / "config.json").read_text())
    for inventory in (values["inventory"][:-1], values["inventory"]):  # the shorter one is older
        (tmp_path / "config.json").write_text(json.dumps({**values, "inventory": inventory}))
        assert checkpoint.read_metadata(tmp_path).inventory == inventory
    (tmp_path / "config.json").write_text(json.dumps({**values, "inventory": ["x", "y"]}))
    with pytest.raises(ValueError, match="another phoneme inventory"):
        checkpoint.read_metadata(tmp_path)
