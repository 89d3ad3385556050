"""Whole checkpoints on S3, where nothing is renamed and `COMPLETE` is the last object."""

from pathlib import Path

import pytest
from helpers.s3 import running_bucket
from helpers.tiny_models import TINY_AR, tiny_ar

from valle.jobs.training import run_folder
from valle.model.codec.encodec import Encodec
from valle.platform import checkpoint, checkpoint_files, storage
from valle.platform.checkpoint import TrainState

pytestmark = pytest.mark.ray


def test_checkpoints_on_s3_are_whole_or_not_used(tmp_path: Path, tiny_codec: Encodec) -> None:
    metadata = checkpoint.new_metadata(TINY_AR, tiny_codec.identity, "test", {})
    source = tmp_path / "source"
    checkpoint.save(source, tiny_ar().state_dict(), metadata)
    checkpoint.save_state(source, TrainState(step=1, position=1))
    with running_bucket(tmp_path) as bucket:
        run = storage.join(bucket, "runs/x")
        for step in (10, 20):
            filesystem, path = storage.filesystem(f"{run}/step_{step:08d}")
            checkpoint_files.write(source, filesystem, path)
        newest = f"{run}/step_00000020"
        assert checkpoint_files.find_fault(newest, hashes=True) is None
        run_folder.repair(run, None)
        assert checkpoint.find_best(run) == newest

        # a flipped byte: the sizes are right, the hashes are not
        weights = bytearray(storage.read_bytes(f"{newest}/model.safetensors"))
        weights[-1] ^= 1
        storage.write_bytes(f"{newest}/model.safetensors", bytes(weights))
        assert "SHA-256" in (checkpoint_files.find_fault(newest, hashes=True) or "")
        run_folder.repair(run, None)
        latest = storage.read_json(f"{run}/{run_folder.SNAPSHOT}")["latest_checkpoint_result"]
        assert latest["checkpoint_dir_name"] == "step_00000010"

        # written again over it, then again and killed before the last object
        filesystem, path = storage.filesystem(newest)
        checkpoint_files.write(source, filesystem, path)
        assert checkpoint_files.find_fault(newest, hashes=True) is None
        checkpoint_files.begin(filesystem, path)
        checkpoint_files.copy(source, filesystem, path)
        assert "COMPLETE is missing" in (checkpoint_files.find_fault(newest) or "")
        assert checkpoint.find_best(run).endswith("step_00000010")
        checkpoint.fetch(checkpoint.find_best(run), tmp_path / "copy")
        assert isinstance(checkpoint.load(tmp_path / "copy")[1], checkpoint.CheckpointMetadata)
