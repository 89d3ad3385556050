"""`training.jsonl`, a codec's training log beside its exported weights: one JSON object a line."""

import json
from collections.abc import Mapping
from typing import Any

from valle.platform import storage

FILE = "training.jsonl"


def append_line(out: str, line: Mapping[str, Any]) -> None:
    """Adds a line to the log in folder or URI `out`.

    Lines of the same or a later `step`, left by an interrupted or an earlier run, are dropped.
    """
    path = storage.join(out, FILE)
    lines = storage.read_bytes(path).decode().split("\n") if storage.exists(path) else []
    lines = [text for text in lines if text and json.loads(text)["step"] < line["step"]]
    lines.append(json.dumps(line))
    storage.write_bytes(path, ("\n".join(lines) + "\n").encode())
