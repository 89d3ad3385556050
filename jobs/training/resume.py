"""Which settings and data must be the same when a run resumes, and which may change.

A run resumes by its name. The `config.json` of its checkpoint holds the settings and data that it
was trained with; `check` compares them with the present ones. A dataset is compared by its hash,
not by its path, so a dataset that was moved is the same one.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from valle.jobs.training.trainee import Worker
from valle.model.text import inventory_matches
from valle.platform import checkpoint
from valle.platform.checkpoint import CheckpointMetadata, CodecCheckpointMetadata

Metadata = CheckpointMetadata | CodecCheckpointMetadata

FREE: Final = frozenset(
    {
        # paths: their contents are compared by hash or identity
        "data", "corpora", "codec", "out", "run", "storage_path",
        # logging, samples and checkpoints
        "log_every", "checkpoint_every", "keep_checkpoints", "samples", "quick_check",
        # limits after which the run ends
        "max_failures", "max_skipped_in_row", "resume_anyway",
        # hardware: for another number of workers the position is converted
        "workers", "threads", "placement", "compile",
        # length of the run: `check` warns of a change
        "steps", "models",
    }
)  # fmt: skip
"""Fields of the training recipes that may change between two attempts."""

FIXED: Final = frozenset({"model", "quantizer", "backend", "zero_stage"})
"""Fields whose change makes weights or optimizer state unreadable. Sizes are compared as resolved,
`model` of the metadata."""

OTHER_RUN: Final = "give the run another name (and warm_start, to begin with these weights)"


class ResumeError(ValueError):
    """A checkpoint that a run cannot or should not resume from; the message names the field."""


def check(folder: Path, present: Metadata, worker: Worker) -> tuple[str, ...]:
    """Compares the checkpoint in `folder` with the metadata that this run would write.

    Returns the changes that the recipe's `resume_anyway` has permitted, each with the reason.
    Raises ResumeError for a change that is not permitted.
    """
    path = folder / checkpoint.CONFIG
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} is not readable: {error}") from error
    now = json.loads(json.dumps(asdict(present)))
    _check_fixed(saved, now)
    if now.get("text_version"):
        saved["text_version"] = saved.get("text_version") or 1  # no earlier code had another
    kind = now["kind"]
    before, after = dict(_flatten(saved["recipe"], kind)), dict(_flatten(now["recipe"], kind))
    step = checkpoint.load_state(folder).step
    _warn_of_missing_values(saved, now, before, after)
    _warn_of_changes(before, after, worker, step)
    differences = [
        f"{name}: {saved[name]!r} -> {now[name]!r}"
        for name in ("dataset", "text_version")
        if name in now and None not in (saved.get(name), now[name]) and saved[name] != now[name]
    ]
    for name in sorted(before.keys() & after.keys()):
        if name.split(".")[0] not in FREE and before[name] != after[name]:
            differences.append(f"{name}: {before[name]!r} -> {after[name]!r}")
    if not differences:
        return ()
    reason = now["recipe"].get("resume_anyway")
    if not reason:
        raise ResumeError(
            f"this run was trained with other settings (before -> now): {'; '.join(differences)}. "
            'Set them back, or set resume_anyway="the reason", which the checkpoints record, or '
            "give the run another name"
        )
    _log().warning("resumed although %s: %s", "; ".join(differences), reason)
    return tuple(f"step {step}: {difference} ({reason})" for difference in differences)


def _check_fixed(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ResumeError where the weights would be unreadable, or would mean something else."""
    if saved.get("kind") != now["kind"]:
        raise ResumeError(
            f"run: its checkpoints hold a model of kind {saved.get('kind')!r}, not "
            f"{now['kind']!r}; {OTHER_RUN}"
        )
    kind, format = now["kind"], saved.get("format", 1)
    if format > now["format"]:
        raise ResumeError(
            f"format: the checkpoint has format {format}, of newer code; this code reads up to "
            f"{now['format']}"
        )
    if kind == "nar" and format < checkpoint.FIRST_NAR_FORMAT:
        raise ResumeError(
            f"format: the checkpoint has format {format}, whose prompt attends to more than "
            f"itself; {OTHER_RUN}"
        )
    model = dict(saved.get("model", {}))
    if format < checkpoint.FORMAT and kind in ("ar", "nar") and "group" in model:
        group_size = model.pop("group")
        if kind == "ar":
            model["group_size"] = group_size
    for name in sorted(model.keys() & now["model"].keys()):
        if model[name] != now["model"][name] and name != "dropout":
            raise ResumeError(
                f"model.{name}: the checkpoint has {model[name]!r}, this run "
                f"{now['model'][name]!r}; set it back, or {OTHER_RUN}"
            )
    if "codec" in now and (codec := saved.get("codec")) is not None and codec != now["codec"]:
        field = next(name for name in now["codec"] if codec.get(name) != now["codec"][name])
        raise ResumeError(
            f"data: the checkpoint was trained on tokens of another codec ({field}: "
            f"{codec.get(field)!r}, the dataset has {now['codec'][field]!r}), and would take them "
            f"for noise; {OTHER_RUN}"
        )
    if "inventory" in now and not inventory_matches(saved["inventory"]):
        raise ResumeError(
            "inventory: the checkpoint was trained with other phonemes than this code has; "
            f"{OTHER_RUN}"
        )
    for name in ("backend", "zero_stage", "workers"):
        before, after = saved["recipe"].get(name), now["recipe"].get(name)
        matters = name == "backend" or now["recipe"].get("backend") == "deepspeed"
        if before is not None and before != after and matters:
            raise ResumeError(
                f"{name}: the checkpoint was written with {before!r}, this run has {after!r}, "
                f"which cannot read its optimizer state; set it back, or {OTHER_RUN}"
            )


def _warn_of_missing_values(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> None:
    """Logs one warning if the checkpoint lacks some of the values that are compared."""
    missing = ["dataset"] if now.get("dataset") and not saved.get("dataset") else []
    missing += [
        name for name in after if name not in before and name.split(".")[0] not in FREE | FIXED
    ]
    if missing:
        _log().warning(
            "the checkpoint is of earlier code and does not say its %s: not compared",
            ", ".join(missing),
        )


def _warn_of_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], worker: Worker, step: int
) -> None:
    """Logs a warning for each permitted change that has an effect on the training."""
    steps, earlier_steps = after.get("steps"), before.get("steps")
    if earlier_steps is not None and earlier_steps != steps:
        _log().warning(
            "steps: %s -> %s; the learning rate from step %d on is that of a run of %s steps",
            earlier_steps, steps, step, steps,
        )  # fmt: skip
    workers = before.get("workers")
    if workers is not None and workers != worker.world_size:
        _log().warning(
            "workers: %s -> %d; the run goes on with the next batch, and a step has batches of %d "
            "workers from now on",
            workers, worker.world_size, worker.world_size,
        )  # fmt: skip


def _flatten(recipe: Mapping[str, Any], kind: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of a recipe's fields, of fields by model only those of `kind`."""
    for name, value in recipe.items():
        if name in ("steps", "warm_start") and isinstance(value, Mapping):
            yield name, value.get(kind)
        elif prefix == "" and name in FIXED:
            continue
        elif isinstance(value, Mapping) and name not in FREE:
            yield from _flatten(value, kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
