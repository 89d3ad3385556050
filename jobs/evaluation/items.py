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

from valle.jobs.evaluation.metrics.words import normalize_transcript
from valle.platform import dataset, storage

SETS = Path(__file__).parent / "sets"
RENAMED_SETS = {"nano": "standard"}
"""Former name of a set: its name now."""

SET_NAMES = frozenset({path.stem for path in SETS.glob("*.jsonl")} | RENAMED_SETS.keys())
"""What names a set; anything else is a path."""


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


def load_items(name_or_uri: str) -> list[EvaluationItem]:
    """The items of a set in `jobs/evaluation/sets`, or of a JSONL file given by path or URI.

    Raises ValueError naming the line that is wrong.
    """
    path = SETS / f"{name_or_uri}.jsonl"
    uri = str(path) if path.is_file() else name_or_uri
    if not storage.exists(uri):
        if name_or_uri in RENAMED_SETS:
            raise ValueError(f"items: {name_or_uri!r} is called {RENAMED_SETS[name_or_uri]!r}")
        names = ", ".join(sorted(path.stem for path in SETS.glob("*.jsonl")))
        raise ValueError(f"items: no {name_or_uri}; give a path to JSONL, or one of: {names}")
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


def item_seed(item_id: str, seed: int) -> int:
    """A seed for one item, the same wherever and in whatever order it is spoken."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item_id}".encode()).digest()[:6], "big")


def check_unseen(items: Sequence[EvaluationItem], training_data: str) -> None:
    """Raises ValueError when a sentence, or a voice of an `unseen` group, was trained on."""
    manifest = dataset.read_manifest(training_data)
    texts: set[str] = set()
    speakers: set[str] = set()
    for shard in manifest.shards:
        rows = dataset.read_columns(training_data, shard.name, ("text", "speaker"))
        texts |= {normalize_transcript(text) for text in rows.column("text").to_pylist()}
        speakers |= set(rows.column("speaker").to_pylist())
    for item in items:
        if normalize_transcript(item.text) in texts:
            raise ValueError(f"items: {item.id}: its text is in {training_data}: {item.text!r}")
        if item.group.startswith("unseen") and item.speaker in speakers:
            raise ValueError(
                f"items: {item.id}: group {item.group!r}, but {training_data} holds {item.speaker}"
            )
