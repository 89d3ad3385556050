"""Evaluates a voice model: word errors, speaker similarity, quality and faults.

The model synthesizes every item of an evaluation set. Other systems produce the same items and show
the loss of each stage: the reference recording, its codec reconstruction, and the
NAR model on the reference's first codebook. Ray actors share the items; each item has a seed of its
own, so the metrics do not depend on the number of actors. Writes `report.json`, `report.md`,
`report.html` and the audio.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from valle.jobs.evaluation import scores
from valle.jobs.evaluation.items import SET_NAMES, EvaluationItem, check_unseen, load_items
from valle.jobs.evaluation.metrics import quality, speaker_similarity, words
from valle.jobs.evaluation.metrics.speaker_similarity import Embedding
from valle.jobs.evaluation.report import (
    markdown_table,
    mlflow_metrics,
    read_report,
    write_report,
)
from valle.jobs.evaluation.results import EvaluationReport, ItemResult, MetricModels
from valle.jobs.evaluation.scores import Measurement
from valle.jobs.evaluation.systems import CHUNKED, SYSTEMS, WITHOUT_REFERENCE, Systems
from valle.jobs.recipes import parse_arguments
from valle.model.codec.interface import Wave
from valle.model.normalize import TEXT_VERSION
from valle.model.quantize import Precision, convert
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, SynthesisResult
from valle.platform import audio, registry, resources, settings, storage, tracking
from valle.platform.bundle import read_bundle
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location, resolve_paths
from valle.platform.resources import Allocation, Placement
from valle.platform.vad import SpeechDetector


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """The model to evaluate, the evaluation set, and the metric models."""

    items: str = field(metadata=location(names=SET_NAMES))
    """Name of a set in `jobs/evaluation/sets`, or path or URI of a JSONL file."""

    recordings: str = field(metadata=location())
    """Folder or URI that the items' recordings lie under."""

    out: str = field(metadata=location())
    """Folder or URI for the report."""

    model: str = field(default=registry.CHAMPION, metadata=location())
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    systems: tuple[str, ...] = SYSTEMS
    """Ways to produce the audio of an item, each a row of the report; `chunked` beside the default
    ones: as cross, with the NAR model run chunk by chunk."""

    synthesis: Synthesis = field(default_factory=Synthesis)
    """Sampling; each item's seed comes from this one and its id."""

    precision: Precision = "fp32"
    """Precision in which AR and NAR compute, as the endpoint's: fp32, bf16 or int8 (CPU only)."""

    recognizer: str = field(default="whisper", metadata=formerly("recogniser"))
    """whisper (tiny.en), moonshine, a faster-whisper path or name, or package.module:Class."""

    second_recognizer: str | None = field(
        default="moonshine", metadata=formerly("second_recogniser")
    )
    """A recognizer of another family, named likewise; None: none."""

    speaker_encoder: str = "resemblyzer"
    """resemblyzer, wespeaker, or package.module:Class."""

    speaker_id_candidates: tuple[str, ...] = field(
        default=(), metadata=formerly("identified_among")
    )
    """Speakers among whom a system's outputs are identified; those that the set does not have are
    left out. Empty: all speakers of the set."""

    training_data: str | None = field(default=None, metadata=location())
    """Token dataset of the training: the evaluation fails if a sentence or an unseen voice of the
    set is in it. None: not checked, and the report says so."""

    limit: int = 0
    """Evaluate the first items of the set only, this many; 0: all."""

    workers: int = 2
    """Number of actors at most; fewer where the cluster cannot hold as many."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU for the voice model, and the share of one that each actor takes. The metric models
    (whisper, moonshine, Resemblyzer, DistillMOS, DNSMOS) use one core beside it."""

    baseline: str | None = field(default=None, metadata=location() | formerly("champion"))
    """An earlier `report.json` that the new one is compared with, item by item."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.systems) - {*SYSTEMS, CHUNKED}):
            raise ValueError(f"systems: {unknown[0]!r} is none of {(*SYSTEMS, CHUNKED)}")
        if self.precision == "int8" and self.placement.accelerator == "gpu":
            raise ValueError("precision: int8 is for CPUs; set placement.accelerator=cpu, or bf16")


class Evaluator:
    """Ray actor: the voice model and all metric models, for one item at a time."""

    def __init__(self, recipe: EvaluateRecipe, tracking_uri: str) -> None:
        import torch

        # the actor's core is shared by the metric models, and by a voice model without a GPU
        torch.set_num_threads(1)
        # resolved here, since the actor may run on another machine than the driver
        bundle = registry.resolve(recipe.model, tracking_uri)
        synthesizer = registry.load_synthesizer(bundle, resources.device())
        convert(synthesizer.ar, recipe.precision)
        convert(synthesizer.nar, recipe.precision)
        self._systems = Systems(synthesizer, recipe.synthesis)
        self._recipe = recipe
        self._recognizer = words.load_recognizer(recipe.recognizer)
        self._second_recognizer = (
            words.load_recognizer(recipe.second_recognizer) if recipe.second_recognizer else None
        )
        self._encoder = speaker_similarity.load_speaker_encoder(recipe.speaker_encoder)
        self._distillmos, self._dnsmos = quality.DistillMos(), quality.Dnsmos()
        self._speech_fraction = SpeechDetector()

    def evaluate(self, item: EvaluationItem) -> list[Measurement]:
        """Measurements of all systems that the item allows."""
        prompt = self._read(item.prompt)
        reference = self._read(item.reference) if item.reference else None
        prompt_embedding = self._encoder.embed(prompt)
        measurements = []
        for system in self._recipe.systems:
            if reference is None and system not in WITHOUT_REFERENCE:
                continue
            started = time.perf_counter()
            output = self._systems.synthesize(system, item, prompt, reference)
            elapsed = time.perf_counter() - started
            measurements.append(self._measure(system, item, output, prompt_embedding, elapsed))
            if scores.is_long_enough(output.wave):
                path = storage.join(self._recipe.out, "audio", system, f"{item.id}.wav")
                storage.write_bytes(path, audio.wav_bytes(output.wave))
        return measurements

    def _read(self, name: str) -> Wave:
        return audio.read_file(storage.join(self._recipe.recordings, name), max_seconds=60)

    def _measure(
        self,
        system: str,
        item: EvaluationItem,
        output: SynthesisResult,
        prompt_embedding: Embedding | None,
        synthesis_seconds: float,
    ) -> Measurement:
        """Metrics and faults of one output."""
        wave = output.wave
        measurable = scores.is_long_enough(wave)
        faults = scores.find_faults(
            output.codes[0] if output.codes.size else None, output.hit_limit
        )

        # an output too short to measure counts as an empty hypothesis: all words deleted
        hypothesis = self._recognizer.transcribe(wave) if measurable else ""
        edits = words.count_edits(item.text, hypothesis)
        second_hypothesis = second_word_errors = None
        if self._second_recognizer:
            second_hypothesis = self._second_recognizer.transcribe(wave) if measurable else ""
            second_word_errors = words.count_edits(item.text, second_hypothesis).word_errors

        similarity = None
        embedding = self._encoder.embed(wave) if measurable else None
        if embedding is not None and prompt_embedding is not None:
            similarity = float(embedding @ prompt_embedding)

        result = ItemResult(
            id=item.id,
            system=system,
            group=item.group,
            language=item.language,
            speaker=item.speaker,
            prompt=item.prompt,
            text=item.text,
            seconds=round(len(wave) / SAMPLE_RATE, 3),
            synthesis_seconds=round(synthesis_seconds, 3),
            **vars(faults),
            **vars(edits),
            hypothesis=hypothesis,
            second_hypothesis=second_hypothesis,
            second_word_errors=second_word_errors,
            speaker_similarity=similarity,
            distillmos=self._distillmos.score(wave) if measurable else None,
            dnsmos=self._dnsmos.score(wave) if measurable else None,
            speech_fraction=self._speech_fraction.score(wave) if measurable else None,
        )
        return Measurement(result, embedding, prompt_embedding)


def evaluate_items(
    recipe: EvaluateRecipe, items: Sequence[EvaluationItem], allocation: Allocation
) -> list[Measurement]:
    """Measurements of all items, in the order of the set, by actors of this allocation."""
    import ray
    from ray.util import ActorPool

    evaluator = ray.remote(**allocation.options)(Evaluator)
    workers = allocation.worker_count(recipe.workers, len(items))
    tracking_uri = settings.read().tracking_uri
    pool = ActorPool([evaluator.remote(recipe, tracking_uri) for _ in range(workers)])
    bar = progress_bar(total=len(items), label="evaluate", unit="item")
    measurements: list[Measurement] = []
    for of_item in pool.map(lambda actor, item: actor.evaluate.remote(item), list(items)):
        measurements += of_item
        bar.update()
    bar.close()
    return measurements


def allocation_for(
    recipe: EvaluateRecipe, section: str = "evaluate", cluster: Cluster | None = None
) -> Allocation:
    """An actor's share of `cluster` (None: the connected one); `section` is named in messages.

    Raises RecipeError when the cluster cannot hold an actor, now or with the nodes it may add.
    """
    placement = recipe.placement
    if recipe.precision == "int8":
        placement = replace(placement, accelerator="cpu")
    return resources.resolve(placement, section, cpus=0.9, cluster=cluster)


def evaluate(recipe: EvaluateRecipe, allocation: Allocation | None = None) -> EvaluationReport:
    """Evaluates every item on the connected cluster; writes and returns the report.

    `allocation` is an actor's; None: resolved here. Raises ValueError before any work starts when
    the set, the model or the baseline cannot be used or the cluster cannot hold an actor.
    """
    recipe = resolve_paths(recipe)  # workers run in other folders, maybe of another home
    allocation = allocation or allocation_for(recipe)
    all_items = load_items(recipe.items)
    items = all_items[: recipe.limit or None]
    speaker_id_candidates = sorted(
        {item.speaker for item in items} & set(recipe.speaker_id_candidates)
    )
    if recipe.training_data:
        check_unseen(items, recipe.training_data)
    # an alias that moves meanwhile must not give the actors different models
    recipe = replace(recipe, model=registry.pin(recipe.model))
    bundle = read_bundle(registry.resolve(recipe.model))
    baseline = read_report(recipe.baseline) if recipe.baseline else None

    measurements = evaluate_items(recipe, items, allocation)
    report = EvaluationReport(
        model=registry.display_name(recipe.model),
        bundle=bundle,
        items=recipe.items,
        limit=recipe.limit if len(items) < len(all_items) else 0,
        text_version=str(TEXT_VERSION),
        training_data_checked=recipe.training_data is not None,
        metric_models=MetricModels(
            recognizer=recipe.recognizer,
            second_recognizer=recipe.second_recognizer,
            speaker_encoder=recipe.speaker_encoder,
        ),
        synthesis=asdict(recipe.synthesis),
        precision=recipe.precision,
        accelerator=allocation.accelerator,
        code_version=tracking.code_version(),
        speaker_id_candidates=tuple(speaker_id_candidates),
        systems=scores.summarize(measurements, speaker_id_candidates),
        results=tuple(measurement.result for measurement in measurements),
    )
    write_report(report, recipe.out, baseline)
    tracking.log_report(f"evaluate-{Path(recipe.items).stem}", mlflow_metrics(report), recipe.out)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate --recipe nano`."""
    recipe = parse_arguments(argv, "evaluate", EvaluateRecipe, __doc__ or "")
    with exit_on_error(), connect():
        report = evaluate(recipe)
    print(markdown_table(report.systems))
    print(f"report: {storage.join(recipe.out, 'report.html')}")


if __name__ == "__main__":
    main()
