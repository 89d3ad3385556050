"""Messages of `valle serve`: how to use the endpoint when it is ready, or why it did not start."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

_ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit|Interrupt))(?::\s*(.+))?$")
_WRAPPERS = ("RayTaskError", "RayActorError", "RuntimeError", "ActorDiedError")


def ready_message(
    url: str,
    *,
    model: str,
    voices: Sequence[str],
    voices_folder: str,
    has_keys: bool,
    seconds: float,
    log: Path | None,
) -> str:
    """The lines that are printed once requests are answered."""
    body = json.dumps({"input": "Hello there.", "voice": voices[0] if voices else "NAME"})
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    listed = ", ".join(voices[:6]) + (" ..." if len(voices) > 6 else "")
    lines = [
        f"ready after {seconds:.0f} s: {url}",
        f"  model   {model}",
        f"  voices  {listed or 'none yet: add one on the page'} (in {voices_folder})",
        f"  page    {url}/   (documentation: {url}/docs)",
        f"  try     curl {url}/v1/audio/speech -H 'Content-Type: application/json'{key} \\",
        f"            -d '{body}' -o speech.mp3",
    ]
    if log is not None:
        lines.append(f"  log     {log}")
    return "\n".join([*lines, "  stop    Ctrl-C"])


def find_reason(text: str) -> str:
    """The cause in a message of Ray Serve that holds a replica's traceback.

    It is the last error in the text that is not a wrapper of Ray's; else the last line.
    """
    found = [match.groups() for line in text.splitlines() if (match := _ERROR.match(line))]
    causes = [(kind, reason) for kind, reason in found if reason and kind not in _WRAPPERS]
    if causes or found:
        kind, reason = (causes or found)[-1]
        return f"{kind}: {reason}" if reason else kind
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
