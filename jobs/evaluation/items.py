"""Evaluation sets: which sentence, in which voice, and what is known about the truth.

One JSON object a line (`jobs/evaluation/sets/*.jsonl` are versioned with the code):

    {"id", "text", "prompt", "speaker"}   and, where known: "prompt_text", "reference",
                                          "language" (en-us), "group" (all)

`prompt` and `reference` are recordings below the set's root; `reference` is the same voice saying
`text`. Only items with a reference have the rows that need one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dacite

from valle.jobs.evaluation.metrics.recogniser import normalise
from valle.platform import dataset, storage

FOLDER = Path(__file__).parent / "sets"


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """One sentence to speak."""

    id: str
    text: str
    prompt: str
    speaker: str
    prompt_text: str | None = None
    reference: str | None = None
    language: str = "en-us"
    group: str = "all"
    """What the item stands for: `seen voices`, `unseen voices`, `human` ..."""


def load_items(source: str) -> list[EvaluationItem]:
    """The items of a set in `jobs/evaluation/sets`, or of a JSONL file given by path or URI.

    Raises ValueError naming the line that is wrong.
    """
    named = FOLDER / f"{source}.jsonl"
    uri = str(named) if named.is_file() else source
    if not storage.exists(uri):
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.jsonl")))
        raise ValueError(f"items: no {source}; give a path to JSONL, or one of: {known}")
    items: list[EvaluationItem] = []
    for number, line in enumerate(storage.read_bytes(uri).decode().splitlines(), start=1):
        try:
            items.append(
                dacite.from_dict(EvaluationItem, json.loads(line), dacite.Config(strict=True))
            )
        except (json.JSONDecodeError, dacite.DaciteError) as error:
            raise ValueError(f"{uri}:{number}: {error}") from error
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{uri}: two items have the same id")
    if not items:
        raise ValueError(f"{uri}: no items")
    return items


def item_seed(name: str, seed: int) -> int:
    """A seed for one item, the same wherever and in whatever order it is spoken."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def check_unseen(items: Sequence[EvaluationItem], training_data: str) -> None:
    """Raises ValueError when a sentence, or a voice of an `unseen` group, was trained on."""
    manifest = dataset.read_manifest(training_data)
    texts: set[str] = set()
    speakers: set[str] = set()
    for shard in manifest.shards:
        rows = dataset.columns(training_data, shard.name, ("text", "speaker"))
        texts |= {normalise(text) for text in rows.column("text").to_pylist()}
        speakers |= set(rows.column("speaker").to_pylist())
    for item in items:
        if normalise(item.text) in texts:
            raise ValueError(f"items: {item.id}: its text is in {training_data}: {item.text!r}")
        if item.group.startswith("unseen") and item.speaker in speakers:
            raise ValueError(
                f"items: {item.id}: group {item.group!r}, but {training_data} holds {item.speaker}"
            )
