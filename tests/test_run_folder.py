"""Checkpoints are whole or unseen: damaged folders, interrupted writers, Ray's list of them."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.tiny_models import TINY_AR, tiny_ar
from helpers.training import (
    assert_equal_checkpoints,
    last_checkpoint,
    run_plain,
    tiny_train_recipe,
)
from pyarrow import fs

from valle.jobs.training import run_folder
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.model.codec.encodec import Encodec
from valle.platform import checkpoint, checkpoint_files, storage
from valle.platform.checkpoint import TrainState
from valle.platform.checkpoint_files import BrokenCheckpointError


def seal(folder: Path) -> None:
    """Writes `COMPLETE` into a finished local folder."""
    files = {}
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name != checkpoint_files.COMPLETE
    ):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size, "sha256": digest
        }  # fmt: skip
    storage.write_json(str(folder / checkpoint_files.COMPLETE), {"files": files})


# of Ray's own list
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

SCORE = checkpoint.WORD_ERROR_RATE


def write_checkpoint(folder: Path, codec: Encodec, step: int, *, marked: bool = True) -> Path:
    """A checkpoint of an untrained model, with `COMPLETE` or as earlier code wrote it."""
    path = folder / f"step_{step:08d}"
    metadata = checkpoint.new_metadata(TINY_AR, codec.identity, "test", {"workers": 2})
    checkpoint.save(path, tiny_ar(step).state_dict(), metadata)
    checkpoint.save_metrics(path, {"validation/loss": 1.0})
    checkpoint.save_state(path, TrainState(step=step, position=step))
    shutil.copyfile(path / "model.safetensors", path / "state/optimizer.safetensors")
    if marked:
        seal(path)
    else:
        state = {"step": step, "epoch": 0, "batch": step}
        (path / "state/train_state.json").write_text(json.dumps(state))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = (
    "model.safetensors", "config.json", "state/optimizer.safetensors", "state/train_state.json",
    "COMPLETE",
)  # fmt: skip
LOCAL_DAMAGES = [
    (name, damage) for name in FILES for damage in (truncate, empty, flip, Path.unlink)
]


@pytest.mark.parametrize(("name", "damage"), LOCAL_DAMAGES)
def test_repair_sets_a_damaged_checkpoint_aside(
    tmp_path: Path, tiny_codec: Encodec, caplog: pytest.LogCaptureFixture,
    name: str, damage: Callable[[Path], None],
) -> None:  # fmt: skip
    """Whatever happens to whichever file, the run goes on from the checkpoint before."""
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, tiny_codec, step)
    run_folder.repair(str(tmp_path), None)
    before = (tmp_path / run_folder.SNAPSHOT).read_bytes()
    damage(tmp_path / "step_00000030" / name)
    if name == "COMPLETE" and damage is truncate:  # of its last line end: nothing is lost
        assert checkpoint_files.find_fault(str(tmp_path / "step_00000030"), hashes=True) is None
        return
    caplog.clear()
    run_folder.repair(str(tmp_path), None)
    assert "step_00000030" in caplog.text and "moved to" in caplog.text
    assert checkpoint.list_steps(str(tmp_path)) == ["step_00000010", "step_00000020"]
    assert (tmp_path / "broken/step_00000030").is_dir()
    content = json.loads((tmp_path / run_folder.SNAPSHOT).read_bytes())
    assert content["latest_checkpoint_result"]["checkpoint_dir_name"] == "step_00000020"
    assert content != json.loads(before)
    caplog.clear()
    run_folder.repair(str(tmp_path), None)
    assert not caplog.records, "a sound run is left alone"


@pytest.mark.parametrize("damage", [empty, halve, truncate, Path.unlink])
def test_repair_writes_a_broken_list_anew(
    tmp_path: Path, tiny_codec: Encodec, damage: Callable[[Path], None]
) -> None:
    """As Ray reads it: every checkpoint, ranked by its score, and the newest as the latest."""
    for step, rate in ((10, 0.2), (20, None), (30, 0.4)):
        path = write_checkpoint(tmp_path, tiny_codec, step)
        (path / "COMPLETE").unlink()
        checkpoint.save_metrics(path, {SCORE: rate} if rate else {})
        seal(path)
    run_folder.repair(str(tmp_path), SCORE)
    first = (tmp_path / run_folder.SNAPSHOT).read_bytes()
    damage(tmp_path / run_folder.SNAPSHOT)
    run_folder.repair(str(tmp_path), SCORE)
    assert (tmp_path / run_folder.SNAPSHOT).read_bytes() == first

    names, latest = read_as_ray(tmp_path, SCORE)
    assert names == ["step_00000020", "step_00000030", "step_00000010"], "the best comes last"
    assert latest == "step_00000030"


def read_as_ray(folder: Path, score: str | None) -> tuple[list[str], str]:
    """Names of the checkpoints as Ray Train ranks them, and of the latest."""
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext

    context = StorageContext(storage_path=str(folder.parent), experiment_dir_name=folder.name)
    config = CheckpointConfig(checkpoint_score_attribute=score, checkpoint_score_order="min")
    manager = CheckpointManager(config, context)
    names = [Path(result.checkpoint.path).name for result in manager._checkpoint_results]
    assert manager.latest_checkpoint_result is not None
    return names, Path(manager.latest_checkpoint_result.checkpoint.path).name


def test_repair_lists_what_ray_has_not_heard_of(tmp_path: Path, tiny_codec: Encodec) -> None:
    """A kill between the checkpoint and Ray's list, a folder that is gone, no folder at all."""
    for step in (10, 20):
        write_checkpoint(tmp_path, tiny_codec, step)
    run_folder.repair(str(tmp_path), None)
    write_checkpoint(tmp_path, tiny_codec, 30)
    run_folder.repair(str(tmp_path), None)
    assert read_as_ray(tmp_path, None)[1] == "step_00000030"
    shutil.rmtree(tmp_path / "step_00000020")
    run_folder.repair(str(tmp_path), None)
    assert read_as_ray(tmp_path, None)[0] == ["step_00000010", "step_00000030"]
    for path in tmp_path.glob("step_*"):
        truncate(path / "model.safetensors")
    run_folder.repair(str(tmp_path), None)
    assert not (tmp_path / run_folder.SNAPSHOT).exists()
    run_folder.repair(str(tmp_path / "nowhere"), None)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", truncate), ("model.safetensors", empty),
     ("state/optimizer.safetensors", halve), ("state/optimizer.safetensors", Path.unlink),
     ("config.json", halve), ("config.json", Path.unlink), ("state/train_state.json", empty)],
)  # fmt: skip
def test_checkpoints_of_earlier_code_are_taken_if_they_look_whole(
    tmp_path: Path, tiny_codec: Encodec, caplog: pytest.LogCaptureFixture,
    name: str, damage: Callable[[Path], None],
) -> None:  # fmt: skip
    write_checkpoint(tmp_path, tiny_codec, 10, marked=False)
    newer = write_checkpoint(tmp_path, tiny_codec, 20, marked=False)
    assert checkpoint.find_best(str(tmp_path)) == str(newer)
    assert "no COMPLETE; its files look whole: used" in caplog.text
    damage(newer / name)
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000010")
    run_folder.repair(str(tmp_path), None)
    assert read_as_ray(tmp_path, None) == (["step_00000010"], "step_00000010")


def test_find_best_names_what_is_wrong(
    tmp_path: Path, tiny_codec: Encodec, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_checkpoint(tmp_path, tiny_codec, 10)
    write_checkpoint(tmp_path, tiny_codec, 5)
    (tmp_path / "step_00000020.part").mkdir()  # a writer at work
    (tmp_path / "step_00000020.part/model.safetensors").write_bytes(b"")
    flip(path / "model.safetensors")
    assert checkpoint.find_best(str(tmp_path)) == str(path), "sizes are right"
    with pytest.raises(BrokenCheckpointError, match=r"model.safetensors is not what was written"):
        checkpoint.fetch(str(path), tmp_path / "copy")
    truncate(path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_best(str(tmp_path)).endswith("step_00000005")
    assert "step_00000010: model.safetensors has" in caplog.text
    with pytest.raises(BrokenCheckpointError, match=r"step_00000010: model.safetensors has \d+"):
        checkpoint.find_best(str(path))
    (tmp_path / "step_00000005/COMPLETE").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"none is whole \(step_00000005: COMPLETE is not"):
        checkpoint.find_best(str(tmp_path))


def test_find_best_ignores_a_rate_that_is_not_a_number(tmp_path: Path, tiny_codec: Encodec) -> None:
    for step, rate in ((10, 0.5), (20, float("nan"))):
        path = write_checkpoint(tmp_path, tiny_codec, step, marked=False)
        checkpoint.save_metrics(path, {SCORE: rate})
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000010")


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from pyarrow import fs
from valle.platform import checkpoint_files

calls = 0
def killing(name):
    original = getattr(checkpoint_files, name)
    def function(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return function
for name in ("_sync", "_sizes"):
    setattr(checkpoint_files, name, killing(name))
checkpoint_files.write(Path(sys.argv[1]), fs.LocalFileSystem(), sys.argv[2])
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an earlier attempt"])
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, tiny_codec: Encodec, existing: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_codec, 20)
    (source / "COMPLETE").unlink()
    survived = []
    for moment in (1, 3, 6, 7, 99):
        run = tmp_path / str(moment)
        write_checkpoint(run, tiny_codec, 10)
        if existing:
            write_checkpoint(run, tiny_codec, 20)
        arguments = [str(source), str(run / "step_00000020"), str(moment)]
        done = subprocess.run([sys.executable, "-c", KILLED_WRITER, *arguments], check=False)
        assert done.returncode == (0 if moment == 99 else -signal.SIGKILL)
        for step in checkpoint.list_steps(str(run)):
            assert checkpoint_files.find_fault(str(run / step), hashes=True) is None
        survived.append(checkpoint.list_steps(str(run))[-1])
        run_folder.repair(str(run), None)
        assert not list(run.glob("*.part"))
        assert read_as_ray(run, None)[1] == survived[-1]
    assert survived[-1] == "step_00000020"
    assert existing or survived[0] == "step_00000010"


def test_finish_notices_a_full_disk(tmp_path: Path, tiny_codec: Encodec) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_codec, 20)
    filesystem, target = fs.LocalFileSystem(), str(tmp_path / "run/step_00000020")
    checkpoint_files.begin(filesystem, target)
    files = checkpoint_files.copy(source, filesystem, target)
    truncate(Path(f"{target}.part/state/optimizer.safetensors"))
    with pytest.raises(BrokenCheckpointError, match=r"of state/optimizer.safetensors \d+ of \d+"):
        checkpoint_files.finish(filesystem, target, files)
    assert not os.path.exists(target)


def test_resumed_from_the_checkpoint_before_equals_uninterrupted(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path, tmp_path: Path
) -> None:
    recipe = replace(tiny_train_recipe(home, tiny_codec, tiny_codec_folder), samples=0)
    make = partial(LanguageModelTrainee, recipe, "ar")
    run_plain(make(), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    flip(tmp_path / "two/step_00000024/state/optimizer.safetensors")
    (tmp_path / "two/step_00000016/COMPLETE").unlink()
    run_folder.repair(str(tmp_path / "two"), None)
    assert last_checkpoint(tmp_path / "two").name == "step_00000008"
    run_plain(make(), tmp_path / "two")
    assert_equal_checkpoints(last_checkpoint(tmp_path / "two"), last_checkpoint(tmp_path / "one"))
