"""What an evaluation measured: item results, metrics of systems, and the report that holds both.

`report.json` is an `EvaluationReport` as JSON; `from_json` also reads format 1 (see `format1.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import dacite

from valle.jobs.evaluation import format1
from valle.jobs.evaluation.intervals import Interval
from valle.model.quantize import Precision
from valle.platform.bundle import Bundle

FORMAT = 2
"""Format of `report.json` that is written."""

Part = Literal["group", "language", "speaker"]
"""A property of items by which a system's items are split."""


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What was measured of one system on one item. None: not measured, or too short to measure."""

    id: str
    """The item's."""
    system: str
    group: str
    language: str
    speaker: str
    prompt: str
    """Path of the prompt below the set's recordings."""
    text: str

    seconds: float
    """Duration of the audio."""
    synthesis_seconds: float
    """Time that the system took to make it."""

    hit_limit: bool
    """The model did not stop before `max_seconds`."""
    empty: bool
    """Shorter than `scores.MIN_SECONDS`."""
    looped: bool
    """A stretch of `scores.LOOP_SECONDS` repeats what precedes it."""

    words: int
    """Words of the normalized text."""
    word_errors: int
    """Word edits between text and hypothesis."""
    characters: int
    character_errors: int
    hypothesis: str
    """The recognizer's transcript."""
    second_hypothesis: str | None = None
    second_word_errors: int | None = None

    speaker_similarity: float | None = None
    """Cosine of the speaker embeddings of output and prompt."""
    distillmos: float | None = None
    dnsmos: float | None = None
    speech_fraction: float | None = None

    @property
    def faulty(self) -> bool:
        """Whether the output has a fault of any kind."""
        return self.hit_limit or self.empty or self.looped


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of one system over some items. None: not measured. Shares lie in 0 to 1."""

    items: int
    wer: Interval
    cer: Interval
    second_wer: Interval | None = None
    """WER by the second recognizer."""

    n_speakers: int | None = None
    """Speakers among whom an output's speaker is identified."""
    speaker_similarity: Interval | None = None
    """Mean cosine of an output and its own prompt."""
    impostor_similarity: Interval | None = None
    """Mean cosine of an output and the prompts of all other speakers."""
    speaker_id_accuracy: Interval | None = None
    """Share of outputs whose nearest prompt is their own."""
    equal_error_rate: float | None = None

    distillmos: Interval | None = None
    dnsmos: Interval | None = None
    speech_fraction: Interval | None = None

    hit_limit: float
    empty: float
    looped: float
    faults: float
    """Share of items with a fault of any kind."""
    real_time_factor: float | None = None
    """Seconds of synthesis for a second of speech."""

    def get(self, name: str) -> Interval | float | None:
        """The metric of this name."""
        value: Interval | float | None = getattr(self, name)
        return value


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Metrics of the parts of a system's items."""

    group: dict[str, Metrics]
    language: dict[str, Metrics]
    speaker: dict[str, Metrics]

    def get(self, part: Part) -> dict[str, Metrics]:
        """Metrics by group, by language or by speaker."""
        parts: dict[str, Metrics] = getattr(self, part)
        return parts


@dataclass(frozen=True, kw_only=True)
class SystemMetrics(Metrics):
    """Metrics of one system over all its items, and over parts of them."""

    by: Breakdown


@dataclass(frozen=True, kw_only=True)
class MetricModels:
    """Names of the models that measured the audio."""

    recognizer: str
    second_recognizer: str | None
    speaker_encoder: str

    def __str__(self) -> str:
        names = (self.recognizer, self.second_recognizer, self.speaker_encoder)
        return ", ".join(name for name in names if name)


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """All metrics and item results of one evaluation: `report.json`."""

    format: int = FORMAT
    model: str
    """URI of the model in the registry, or a bundle's folder."""
    bundle: Bundle
    items: str
    """Name or URI of the evaluation set."""
    limit: int = 0
    """Number of items evaluated, where it is not the whole set; else 0."""
    text_version: str | None = None
    """Version of the text normalization; None in older reports."""
    training_data_checked: bool
    """Whether the set was compared with the training data."""
    metric_models: MetricModels
    synthesis: dict[str, object]
    """Sampling settings, as the code of `code_version` names them."""
    precision: Precision
    accelerator: str | None = None
    """cpu or gpu; None in older reports."""
    code_version: str
    speaker_id_candidates: tuple[str, ...]
    """Speakers among whom a system's outputs are identified; empty: all of the set."""
    systems: dict[str, SystemMetrics]
    results: tuple[ItemResult, ...]

    def to_json(self) -> dict[str, object]:
        """The report as values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "EvaluationReport":
        """The report in `content`, of format 1 or 2.

        Raises ValueError naming the field that is missing, unknown or of another type.
        """
        content = format1.upgrade(content) if "format" not in content else content
        if content["format"] != FORMAT:
            raise ValueError(
                f"format: {content['format']}, but this version of valle reads 1 and {FORMAT}"
            )
        try:
            return dacite.from_dict(cls, content, dacite.Config(strict=True, cast=[tuple, float]))
        except dacite.DaciteError as error:
            raise ValueError(f"no evaluation report of format {FORMAT}: {error}") from error
