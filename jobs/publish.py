"""Publishes an AR and a NAR checkpoint with their codec as one version in the model registry.

A new version gets the alias `candidate`. It gets the alias `champion`, the version that is served,
when it passes the gate: the version is evaluated (`publish.evaluation`) and its report is added to
its files; every bound of `publish.gate` must hold, and no metric may be significantly worse than
the champion's. A version that is not evaluated stays a candidate. `force="reason"` promotes a
version that is refused or not evaluated, and records the reason. `alias=NAME` moves another alias
than `champion`, without a gate.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from valle.jobs import evaluate
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.evaluation.gate import Bound, decide
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.recipes import parse_arguments
from valle.model.codec.loading import CODEC_NAMES
from valle.model.valle import Synthesis
from valle.platform import audio, checkpoint, model_versions, packing, registry, storage
from valle.platform.bundle import read_bundle, write_bundle
from valle.platform.cluster import connect
from valle.platform.model_versions import LostRaceError
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
    version is not evaluated, and stays a candidate."""

    gate: tuple[Bound, ...] = field(default_factory=tuple)
    """Bounds on the evaluation's metrics; all must hold."""

    force: str | None = None
    """Reason to promote a version that the gate refuses or that is not evaluated; None: it is not
    promoted."""

    alias: str = model_versions.CHAMPION
    """Alias that the version gets. `champion` is served, and needs an evaluation that passes the
    gate; another alias moves at once."""

    def __post_init__(self) -> None:
        if self.gate and self.evaluation is None:
            raise ValueError("gate: needs `evaluation`, whose metrics it bounds")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.alias) or self.alias == "latest":
            raise ValueError(
                f"alias: {self.alias!r} is no name of an alias; use lower-case letters, digits, - "
                "and _, such as `demo`"
            )
        if self.alias != model_versions.CHAMPION and (self.gate or self.force is not None):
            raise ValueError(
                f"alias: {self.alias} moves without a gate; leave out `gate` and `force`, or the "
                "alias"
            )
        if self.gate and self.evaluation and self.evaluation.limit and self.force is None:
            raise ValueError(
                "evaluation.limit: the gate is for the whole set; leave the limit out, or the gate"
            )


class GateError(RuntimeError):
    """The gate refused a version; the message lists the violations."""


@dataclass(frozen=True)
class Published:
    """A registered version, and the alias that it got in addition to `candidate`, if any."""

    version: int
    alias: str | None
    """None: the version is the candidate only."""

    def __str__(self) -> str:
        name = f"{registry.MODEL_NAME} version {self.version}"
        if self.alias is not None:
            return f"published {name}, alias {self.alias}"
        return (
            f"registered {name} as the candidate: it is not evaluated, so it does not take the "
            f"champion's place.\n"
            f"  hear it:    valle speak TEXT voice.wav out.wav --model models:/valle@candidate\n"
            f"  evaluate:   set publish.evaluation in the recipe, and publish again\n"
            f"  promote it: valle model-versions promote {self.version} --reason ..."
        )


def register(recipe: PublishRecipe) -> int:
    """Packs a bundle, adds a sample, registers it as the candidate; returns the version."""
    ar, nar = (checkpoint.find_best(uri) for uri in (recipe.ar, recipe.nar))
    prompt = audio.read_file(recipe.sample_prompt, max_seconds=60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bundle"
        packing.pack(ar, nar, recipe.codec, folder)
        synthesis = replace(Synthesis(), max_seconds=recipe.sample_seconds)
        result = registry.load_synthesizer(folder).synthesize(recipe.sample_text, prompt, synthesis)
        (folder / "sample.wav").write_bytes(audio.wav_bytes(result.wave))
        (folder / "sample.png").write_bytes(spectrogram_png(result.wave, recipe.sample_text))
        write_bundle(folder, read_bundle(folder))  # lists the sample too
        return model_versions.publish(folder, {"ar": ar, "nar": nar})


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
        model_versions.attach_report(version, Path(folder))
    return report


def champion_report(version: int) -> EvaluationReport:
    """The report of the champion, as the registry holds it.

    Raises GateError, with the remedy, for a champion without a report that can be read.
    """
    remedy = (
        f"evaluate it on the set of publish.evaluation (`valle evaluate --recipe ... "
        f"model=models:/{registry.MODEL_NAME}/{version} out=OUT`) and attach the report (`valle "
        f"model-versions attach-report {version} OUT/report.json`), or promote with "
        f'`force="reason"`'
    )
    try:
        content = model_versions.read_report(version)
        if content is not None:
            return EvaluationReport.from_json(json.loads(content))
    except ValueError as error:
        raise GateError(f"the report of the champion, version {version}: {error}; {remedy}") from (
            error
        )
    raise GateError(f"the champion, version {version}, has no report to compare with: {remedy}")


def publish(recipe: PublishRecipe) -> Published:
    """Registers a version, evaluates it, and promotes it if it passes the gate.

    Raises GateError when the gate refuses the version, which then stays the candidate. Raises
    RecipeError, before a version is registered, when the cluster cannot hold the evaluation's
    actors; LostRaceError when another version became champion meanwhile.
    """
    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    champion = model_versions.champion_version()
    # Before registering: a version that cannot be evaluated would stay a candidate.
    allocation = (
        evaluate.allocation_for(recipe.evaluation, "publish.evaluation")
        if recipe.evaluation
        else None
    )
    version = register(recipe)
    reason = "not evaluated"
    if recipe.evaluation is not None:
        assert allocation is not None, "resolved above"
        report = evaluate_version(version, recipe.evaluation, allocation)
        if recipe.alias == model_versions.CHAMPION:
            reason = _judge(version, report, recipe, champion)
    elif recipe.force is not None:
        reason = f"forced: {recipe.force} (not evaluated)"
    elif recipe.alias == model_versions.CHAMPION:
        return Published(version, None)
    if recipe.alias == model_versions.CHAMPION:
        model_versions.promote(version, reason, replacing=champion)
    else:
        model_versions.promote(version, reason, alias=recipe.alias)
    return Published(version, recipe.alias)


def _judge(
    version: int, report: EvaluationReport, recipe: PublishRecipe, champion: int | None
) -> str:
    """The reason for a promotion, as the history holds it. Raises GateError if the gate refuses."""
    try:
        baseline = None if champion is None else champion_report(champion)
        verdict = decide(report, recipe.gate, baseline)
        if verdict.passed:
            return str(verdict)
        refusal = str(verdict)
    except GateError as error:
        refusal = str(error)
    if recipe.force is None:
        raise GateError(f"version {version} stays a candidate: {refusal}")
    return f"forced: {recipe.force} (refused for: {refusal})"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.publish --recipe demo`."""
    recipe = parse_arguments(argv, "publish", PublishRecipe, __doc__ or "")
    with exit_on_error(), connect() if recipe.evaluation else nullcontext():
        try:
            published = publish(recipe)
        except (GateError, LostRaceError) as error:
            print(f"refused: {error}", file=sys.stderr)
            sys.exit(1)
    print(published)


if __name__ == "__main__":
    main()
