"""Repairs the folder of a run before Ray Train reads it: its checkpoints and Ray's list of them.

Ray keeps the list in `checkpoint_manager_snapshot.json`, which it writes in place. A run that is
killed during the write leaves half a file, and Ray then refuses to start. Checkpoints are stored
whole or not at all, but a disk may damage them later. `repair` makes the folder and the list agree.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from pyarrow import fs

from valle.platform import checkpoint, checkpoint_files, storage

SNAPSHOT = "checkpoint_manager_snapshot.json"

BROKEN = "broken"
"""Folder of a run to which its broken checkpoints are moved, where they can be."""

WORST_SCORE = 1e9
"""Score of a checkpoint that has none, worse than any. Ray compares all checkpoints by this number
and keeps it as JSON, which has no NaN."""


def repair(uri: str, score: str | None) -> None:
    """Sets broken checkpoints of the run at `uri` aside, with a warning, and corrects Ray's list.

    The newest checkpoint is read and compared with its hashes; if it is broken, the next older one,
    and so on. Only the sizes of the others are compared. A run without faults is not changed.
    """
    steps = checkpoint.list_steps(uri)
    listed = _read_snapshot(uri)
    whole: list[str] = []
    for step in reversed(steps):
        path = storage.join(uri, step)
        fault = checkpoint_files.find_fault(path, hashes=not whole)
        if fault is None:
            whole.insert(0, step)
        else:
            _set_aside(uri, step, fault)
    _remove_parts(uri)
    if listed == whole or (listed is None and not whole and not _has_snapshot(uri)):
        return
    if _has_snapshot(uri):
        logging.getLogger(__name__).warning(
            "%s: %s lists %s, but the whole checkpoints are %s: written anew",
            uri, SNAPSHOT, "nothing readable" if listed is None else listed or "none",
            whole or "none",
        )  # fmt: skip
    if whole:
        _write_snapshot(uri, whole, score)
    else:
        storage.delete(storage.join(uri, SNAPSHOT))


def _has_snapshot(uri: str) -> bool:
    return storage.exists(storage.join(uri, SNAPSHOT))


def _read_snapshot(uri: str) -> list[str] | None:
    """Names of the checkpoints in Ray's list, oldest first; None for a missing or broken list."""
    if not _has_snapshot(uri):
        return None
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
    )

    try:
        state = _CheckpointManagerState.model_validate(
            storage.read_json(storage.join(uri, SNAPSHOT))
        )
    except (ValueError, TypeError):  # half a file, or one of another version of Ray
        return None
    names = sorted(str(result.checkpoint_dir_name) for result in state.checkpoint_results)
    latest = state.latest_checkpoint_result
    return (
        names if latest is not None and names and latest.checkpoint_dir_name == names[-1] else None
    )


def _write_snapshot(uri: str, steps: list[str], score: str | None) -> None:
    """Ray's list of some checkpoints, as it would have written it itself."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    def result(step: str) -> Any:
        path = storage.join(uri, step, checkpoint.METRICS)
        metrics = storage.read_json(path) if storage.exists(path) else {}
        worst = {score: WORST_SCORE} if score else {}
        number = int(step.removeprefix("step_"))
        return _TrainingResultState(
            checkpoint_dir_name=step, metrics={"step": number, **worst, **metrics}
        )

    results = {step: result(step) for step in steps}
    # Ray keeps the end of the list: the best, or without a score the newest
    order = steps
    if score:
        order = sorted(steps, key=lambda step: -results[step].metrics[score])
    state = _CheckpointManagerState(
        checkpoint_results=[results[step] for step in order],
        checkpoint_report_indices=[steps.index(step) for step in order],
        latest_checkpoint_result=results[steps[-1]],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(steps),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    storage.write_bytes(storage.join(uri, SNAPSHOT), state.model_dump_json().encode())


def _set_aside(uri: str, step: str, fault: str) -> None:
    """Moves a broken checkpoint out of the way. On S3, where nothing moves, it stays until the run
    writes this step again."""
    filesystem, path = storage.filesystem(uri)
    source = Path(path, step)
    if not isinstance(filesystem, fs.LocalFileSystem):
        checkpoint_files.warn(storage.join(uri, step), fault, "not used")
        return
    target = Path(path, BROKEN, step)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    checkpoint_files.warn(str(source), fault, f"moved to {target}")


def _remove_parts(uri: str) -> None:
    """Removes the unfinished folders of interrupted writers."""
    filesystem, path = storage.filesystem(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        for part in Path(path).glob("step_*.part"):
            shutil.rmtree(part)
