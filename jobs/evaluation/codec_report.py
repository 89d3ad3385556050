"""What an evaluation of a codec measured: `evaluation.json` beside the codec's weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import dacite

FORMAT = 2
"""Format of `evaluation.json` that is written."""

_RENAMED = {
    "versions": "systems",
    "similarity": "speaker_similarity",
    "codebook_use": "codebook_usage",
    "recogniser": "recognizer",
}
"""Key of format 1, which has no `format`: its name in format 2."""


@dataclass(frozen=True, kw_only=True)
class CodecMetrics:
    """Means over one system's copies of the recordings. None: not measured."""

    distillmos: float
    speaker_similarity: float | None = None
    """Cosine of the speaker embeddings of copy and recording."""
    wer: float | None = None


@dataclass(frozen=True, kw_only=True)
class CodecReport:
    """Metrics of every system over the same recordings."""

    format: int = FORMAT
    codec: str
    """Name in the codec's identity."""
    sha256: str
    """Hash of the codec's weights."""
    frame_rate: int | None = None
    """Frames a second."""
    date: str
    hardware: str
    recognizer: str | None = None
    speaker_encoder: str | None = None
    recordings: int
    """Number of recordings."""
    seconds: float
    """Their duration in all."""
    systems: dict[str, CodecMetrics]
    codebook_usage: tuple[float, ...]
    """Share of each codebook's entries that the recordings' codes use."""

    def to_json(self) -> dict[str, object]:
        """The report as values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CodecReport":
        """The report in `content`, of format 1 or 2.

        Raises ValueError naming the field that is missing, unknown or of another type.
        """
        content = _upgrade(content) if "format" not in content else content
        if content["format"] != FORMAT:
            raise ValueError(
                f"format: {content['format']}, but this version of valle reads 1 and {FORMAT}"
            )
        try:
            return dacite.from_dict(cls, content, dacite.Config(strict=True, cast=[tuple, float]))
        except dacite.DaciteError as error:
            raise ValueError(f"no codec report of format {FORMAT}: {error}") from error


def _upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 with the keys of format 2."""
    report = {_RENAMED.get(key, key): value for key, value in content.items()}
    if "wer_original" in report:  # the first ones: one reconstruction, keys without a system
        n_codebooks = len(report["codebook_usage"])
        report["systems"] = {
            name: {metric: report.pop(f"{metric}_{suffix}") for metric in ("wer", "distillmos")}
            for name, suffix in (
                ("recording", "original"),
                (f"{n_codebooks} codebooks", "reconstruction"),
            )
        }
    report["systems"] = {
        system: {_RENAMED.get(key, key): value for key, value in metrics.items()}
        for system, metrics in report.get("systems", {}).items()
    }
    return report | {"format": FORMAT}
