"""Publishes an AR and a NAR checkpoint with their codec as one version in the model registry.

A new version gets the alias `candidate`. It gets the alias `champion`, the version that is served,
when it passes the gate: the version is evaluated (`publish.evaluation`) and its report is added to
its files; every bound of `publish.gate` must hold, and no metric may be significantly worse than
the champion's. `force="reason"` promotes a refused version and records the reason.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from valle.jobs import evaluate
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.evaluation.gate import Bound, decide
from valle.jobs.evaluation.report import read_report
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.recipes import parse_arguments
from valle.model.codec.loading import CODEC_NAMES
from valle.model.valle import Synthesis
from valle.platform import audio, checkpoint, registry, storage
from valle.platform.cluster import connect
from valle.platform.recipe import exit_on_error, location, resolve_paths
from valle.platform.resources import Allocation
from valle.platform.spectrogram import spectrogram_png


@dataclass(frozen=True, kw_only=True)
class PublishRecipe:
    """Checkpoints, codec, sample and gate of a version."""

    ar: str = field(metadata=location())
    """Checkpoint, or a run's folder, whose best checkpoint is taken (lowest WER, else the last)."""

    nar: str = field(metadata=location())
    """Checkpoint, or a run's folder, whose best checkpoint is taken (lowest WER, else the last)."""

    sample_prompt: str = field(metadata=location())
    """Recording that is the prompt of the sample."""

    codec: str = field(default="nano", metadata=location(names=CODEC_NAMES))
    """Codec that both models were trained with."""

    sample_text: str = "The voice you are hearing was made by a small model."
    """Text of the sample."""

    sample_seconds: float = 8.0
    """Length limit of the sample."""

    evaluation: EvaluateRecipe | None = None
    """Evaluation of the version; the job sets `model` and appends the version to `out`. None: the
    version becomes champion without an evaluation."""

    gate: tuple[Bound, ...] = field(default_factory=tuple)
    """Bounds on the evaluation's metrics; all must hold."""

    force: str | None = None
    """Reason to promote a version that the gate refuses; None: it is not promoted."""

    def __post_init__(self) -> None:
        if self.gate and self.evaluation is None:
            raise ValueError("gate: needs `evaluation`, whose metrics it bounds")


class GateError(RuntimeError):
    """The gate refused a version; the message lists the violations."""


def register(recipe: PublishRecipe) -> int:
    """Packs a bundle, adds a sample, registers it as the candidate; returns the version."""
    ar, nar = (checkpoint.find_best(uri) for uri in (recipe.ar, recipe.nar))
    prompt = audio.read_file(recipe.sample_prompt, max_seconds=60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bundle"
        registry.pack(ar, nar, recipe.codec, folder)
        synthesis = replace(Synthesis(), max_seconds=recipe.sample_seconds)
        result = registry.load_synthesizer(folder).synthesize(recipe.sample_text, prompt, synthesis)
        (folder / "sample.wav").write_bytes(audio.wav_bytes(result.wave))
        (folder / "sample.png").write_bytes(spectrogram_png(result.wave, recipe.sample_text))
        return registry.publish(folder, {"ar": ar, "nar": nar})


def evaluate_version(
    version: int, recipe: EvaluateRecipe, allocation: Allocation
) -> EvaluationReport:
    """Evaluates a version with actors of this allocation, and adds the report to its files."""
    name = f"models:/{registry.MODEL_NAME}/{version}"
    report = evaluate.evaluate(
        replace(recipe, model=name, out=storage.join(recipe.out, f"version-{version}")), allocation
    )
    with tempfile.TemporaryDirectory() as folder:
        for file in ("report.json", "report.md"):
            source = storage.join(recipe.out, f"version-{version}", file)
            (Path(folder) / file).write_bytes(storage.read_bytes(source))
        registry.attach(version, Path(folder))
    return report


def champion_report() -> EvaluationReport | None:
    """The champion's report, of any format; None without a champion or a report."""
    if registry.champion_version() is None:
        return None
    path = registry.resolve(registry.CHAMPION) / "report.json"
    return read_report(str(path)) if path.exists() else None


def publish(recipe: PublishRecipe) -> int:
    """Registers and evaluates a version, and promotes it if it passes the gate; returns its number.

    Raises GateError when the gate refuses the version, which then stays the candidate. Raises
    RecipeError, before a version is registered, when the cluster cannot hold the evaluation's
    actors.
    """
    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    if recipe.evaluation is None:
        version = register(recipe)
        registry.promote(version, "the recipe has no evaluation")
        return version
    # Before registering: a version that cannot be evaluated would stay a candidate.
    allocation = evaluate.allocation_for(recipe.evaluation, "publish.evaluation")
    version = register(recipe)
    report = evaluate_version(version, recipe.evaluation, allocation)
    verdict = decide(report, recipe.gate, champion_report())
    if not verdict.passed and recipe.force is None:
        raise GateError(f"version {version} stays a candidate: {verdict}")
    registry.promote(
        version,
        str(verdict) if verdict.passed else f"forced: {recipe.force} (refused for: {verdict})",
    )
    return version


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.publish --recipe demo`."""
    recipe = parse_arguments(argv, "publish", PublishRecipe, __doc__ or "")
    with exit_on_error(), connect() if recipe.evaluation else nullcontext():
        try:
            version = publish(recipe)
        except GateError as error:
            print(f"refused: {error}", file=sys.stderr)
            sys.exit(1)
    print(f"published {registry.MODEL_NAME} version {version}, alias champion")


if __name__ == "__main__":
    main()
