"""Evaluation sets: texts with a prompt, a speaker and, where there is one, a reference recording.

A set is a JSONL file, an item a line; those in `jobs/evaluation/sets` are versioned with the code:

    {"id": ..., "text": ..., "prompt": ..., "speaker": ...}

`prompt_text`, `reference`, `language` and `group` are optional. `prompt` and `reference` are paths
below the set's recordings; the reference is the speaker saying the text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dacite

from valle.jobs.evaluation.metrics.words import normalize_transcript
from valle.jobs.ingest.lines import parse_object, read_lines
from valle.platform import dataset, storage

SETS = Path(__file__).parent / "sets"
RENAMED_SETS = {"nano": "standard"}
"""Former name of a set: its present name."""

SET_NAMES = frozenset({path.stem for path in SETS.glob("*.jsonl")} | RENAMED_SETS.keys())
"""Names of the shipped sets; anything else is a path."""


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """One text to synthesize, in the voice of a prompt."""

    id: str
    text: str
    prompt: str
    """Recording of the speaker that the model is prompted with."""
    speaker: str
    prompt_text: str | None = None
    """Transcript of the prompt."""
    reference: str | None = None
    """Recording of the speaker saying `text`. None: systems that need one skip the item."""
    language: str = "en-us"
    group: str = "all"
    """Part of the report the item counts in; the speakers of groups that begin with `unseen` must
    not be in the training data."""


def load_items(name_or_uri: str) -> list[EvaluationItem]:
    """The items of a set in `jobs/evaluation/sets`, or of a JSONL file by path or URI.

    Raises ValueError naming the set, or the line that is wrong.
    """
    path = SETS / f"{name_or_uri}.jsonl"
    uri = str(path) if path.is_file() else name_or_uri
    if not storage.exists(uri):
        if name_or_uri in RENAMED_SETS:
            raise ValueError(f"items: {name_or_uri!r} is called {RENAMED_SETS[name_or_uri]!r}")
        names = ", ".join(sorted(path.stem for path in SETS.glob("*.jsonl")))
        raise ValueError(f"items: no {name_or_uri}; give a path to JSONL, or one of: {names}")
    items: list[EvaluationItem] = []
    for number, line in read_lines(storage.read_bytes(uri)):
        try:
            if isinstance(line, UnicodeDecodeError):
                raise ValueError(f"not UTF-8 ({line})")
            items.append(
                dacite.from_dict(EvaluationItem, parse_object(line), dacite.Config(strict=True))
            )
        except (ValueError, dacite.DaciteError) as error:
            raise ValueError(f"{uri}:{number}: {error}") from error
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{uri}: two items have the same id")
    if not items:
        raise ValueError(f"{uri}: no items")
    return items


def item_seed(item_id: str, seed: int) -> int:
    """Seed of one item, 48 bits: it depends on nothing but the item's id and `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item_id}".encode()).digest()[:6], "big")


def check_unseen(items: Sequence[EvaluationItem], training_data: str) -> None:
    """Raises ValueError when the token dataset `training_data` holds an item's text, or the speaker
    of an item in an `unseen` group."""
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
