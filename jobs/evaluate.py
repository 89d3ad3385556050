"""Whether a voice model speaks: words, speaker similarity, quality, faults, beside the possible.

Each item of an evaluation set is spoken by the model and judged, next to the rows that show which
part of the chain loses what: the recording itself, its codec reconstruction, and the NAR model on
the recording's own first codebook. Work is shared out over Ray actors; every item has a seed of
its own, so the figures do not depend on how many there are. Writes `report.json`, `report.md`,
`report.html` and the audio.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from valle.jobs.evaluation import scores
from valle.jobs.evaluation.items import (
    SET_NAMES,
    EvaluationItem,
    check_unseen,
    item_seed,
    load_items,
)
from valle.jobs.evaluation.metrics import quality, speaker_similarity, words
from valle.jobs.evaluation.metrics.speaker_similarity import Embedding
from valle.jobs.evaluation.report import (
    Report,
    markdown_table,
    mlflow_metrics,
    write_report,
)
from valle.jobs.evaluation.scores import ItemResult
from valle.jobs.recipes import parse_arguments
from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARDecoder, NARRequest, nar_decode
from valle.model.quantize import Precision, convert
from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, SynthesisResult, Synthesizer
from valle.platform import audio, registry, resources, settings, storage, tracking
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location
from valle.platform.resources import Allocation, Placement
from valle.platform.vad import SpeechFraction

SYSTEMS = ("recording", "codec", "nar", "cross", "continuation")
CHUNKED = "chunked"
"""recording: the reference as it is. codec: through the codec and back. nar: NAR on the true first
codebook. cross: the model, prompted with another recording of the voice. continuation: the model
goes on from the reference's first seconds. All but `cross` need a reference. On demand only,
chunked: as `cross`, filled in chunk by chunk as the endpoint does that speaks before it is done."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """What to judge, on what, by whom."""

    items: str = field(metadata=location(names=SET_NAMES))
    """Name of a set in `jobs/evaluation/sets`, or path or URI of a JSONL file."""

    recordings: str = field(metadata=location())
    """Folder or URI that the items' recordings lie under."""

    out: str = field(metadata=location())
    """Folder or URI for the report."""

    model: str = field(default=registry.CHAMPION, metadata=location())
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    systems: tuple[str, ...] = SYSTEMS
    """Rows of the report."""

    synthesis: Synthesis = field(default_factory=Synthesis)
    """Sampling; the seed is mixed with each item's id."""

    precision: Precision = "fp32"
    """What the models compute in, as the endpoint's `precision`: fp32, bf16 or int8."""

    recognizer: str = field(default="whisper", metadata=formerly("recogniser"))
    """whisper (tiny.en), moonshine, a faster-whisper path or name, or package.module:Class."""

    second_recognizer: str | None = field(
        default="moonshine", metadata=formerly("second_recogniser")
    )
    """Another recognizer, for a second opinion."""

    speaker_encoder: str = "resemblyzer"
    """resemblyzer, or package.module:Class."""

    speaker_id_candidates: tuple[str, ...] = field(
        default=(), metadata=formerly("identified_among")
    )
    """Speakers among whom a voice has to be told from its prompt, as far as the set has them (the
    report names them); none: all."""

    training_data: str | None = field(default=None, metadata=location())
    """Token dataset the model was trained on: no sentence and no unseen voice may be in it. None
    leaves that unchecked, and the report says so."""

    limit: int = 0
    """Only the first so many items; 0 takes all."""

    workers: int = 2
    """Actors at work at the same time, at most: fewer where the cluster never holds so many."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU for the voice model, and how much of one each actor takes; the judges (whisper,
    moonshine, Resemblyzer, DistillMOS, DNSMOS) compute on one core beside it."""

    baseline: str | None = field(default=None, metadata=location() | formerly("champion"))
    """An earlier `report.json` to compare with."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.systems) - {*SYSTEMS, CHUNKED}):
            raise ValueError(f"systems: {unknown[0]!r} is none of {(*SYSTEMS, CHUNKED)}")
        if self.precision == "int8" and self.placement.accelerator == "gpu":
            raise ValueError("precision: int8 is for CPUs; set placement.accelerator=cpu, or bf16")


class Evaluator:
    """A Ray actor: the voice model and every judge, one item at a time."""

    def __init__(self, recipe: EvaluateRecipe, tracking_uri: str) -> None:
        import torch

        torch.set_num_threads(1)  # of the judges, and of a model without a GPU
        # resolved here: the actor may run on another machine
        bundle = registry.resolve(recipe.model, tracking_uri)
        self._synthesizer: Synthesizer = registry.load_synthesizer(bundle, resources.device())
        convert(self._synthesizer.ar, recipe.precision)
        convert(self._synthesizer.nar, recipe.precision)
        self._nar_decoder = NARDecoder(self._synthesizer.nar)
        self._recipe = recipe
        self._recognizer = words.load_recognizer(recipe.recognizer)
        self._second_recognizer = (
            words.load_recognizer(recipe.second_recognizer) if recipe.second_recognizer else None
        )
        self._encoder = speaker_similarity.load_speaker_encoder(recipe.speaker_encoder)
        self._mos, self._dnsmos = quality.DistillMos(), quality.Dnsmos()
        self._speech = SpeechFraction()

    def evaluate(self, item: EvaluationItem) -> list[ItemResult]:
        """A record for each row of the report that this item has."""
        prompt = self._read(item.prompt)
        reference = self._read(item.reference) if item.reference else None
        prompt_embedding = self._encoder.embed(prompt)
        records = []
        for system in self._recipe.systems:
            if reference is None and system not in ("cross", CHUNKED):
                continue
            started = time.perf_counter()
            result = self._synthesize(system, item, prompt, reference)
            elapsed = time.perf_counter() - started
            records.append(self._measure(system, item, result, prompt_embedding, elapsed))
        return records

    def _read(self, name: str) -> Wave:
        path = storage.join(self._recipe.recordings, name)
        return audio.read(storage.read_bytes(path), max_seconds=60)

    def _synthesize(
        self, system: str, item: EvaluationItem, prompt: Wave, reference: Wave | None
    ) -> SynthesisResult:
        synthesis = replace(
            self._recipe.synthesis, language=item.language,
            seed=item_seed(item.id, self._recipe.synthesis.seed),
        )  # fmt: skip
        if system == "cross":
            return self._synthesizer.synthesize(item.text, prompt, synthesis)
        if system == CHUNKED:
            return self._synthesize_chunked(item, prompt, synthesis)
        assert reference is not None, "evaluate() skips rows that need a reference"
        codes = self._synthesizer.codec.encode([reference])[0]
        if system == "recording":
            return SynthesisResult(reference, codes, hit_limit=False)
        if system == "codec":
            return SynthesisResult(
                self._synthesizer.codec.decode([codes])[0], codes, hit_limit=False
            )
        if system == "continuation":
            # of a short sentence, half: there must be something left to say
            prefix_seconds = min(synthesis.prompt_seconds, len(reference) / SAMPLE_RATE / 2)
            return self._synthesizer.continue_speech(
                item.text, reference, replace(synthesis, prompt_seconds=prefix_seconds)
            )
        return self._nar_decode(item, prompt, codes, synthesis)

    def _nar_decode(
        self, item: EvaluationItem, prompt: Wave, reference_codes: Codes, synthesis: Synthesis
    ) -> SynthesisResult:
        """The NAR model on the true first codebook."""
        phonemes = phoneme_ids(item.text, synthesis.language)
        prompt_codes = self._synthesizer.encode_prompt(prompt, synthesis)
        codes = nar_decode(
            self._synthesizer.nar,
            NARRequest(phonemes, prompt_codes, reference_codes[0]),
            synthesis.nar_decoding,
        )
        return SynthesisResult(self._synthesizer.codec.decode([codes])[0], codes, hit_limit=False)

    def _synthesize_chunked(
        self, item: EvaluationItem, prompt: Wave, synthesis: Synthesis
    ) -> SynthesisResult:
        """`cross` with the NAR model's codes as they are when each chunk is due."""
        result = self._synthesizer.synthesize(item.text, prompt, synthesis)
        if not result.codes.size:
            return result
        phonemes = phoneme_ids(item.text, synthesis.language)
        prompt_codes = self._synthesizer.encode_prompt(prompt, synthesis)
        codes = nar_decode_chunks(
            lambda request: self._nar_decoder.decode([request], synthesis.nar_decoding)[0],
            NARRequest(phonemes, prompt_codes, result.codes[0], complete=not result.hit_limit),
            Chunking(),
            self._synthesizer.ar.config.group,
        )  # fmt: skip
        return replace(result, wave=self._synthesizer.codec.decode([codes])[0], codes=codes)

    def _measure(
        self,
        system: str,
        item: EvaluationItem,
        result: SynthesisResult,
        prompt_embedding: Embedding | None,
        synthesis_seconds: float,
    ) -> ItemResult:
        """How one row of one item is judged; `prompt_embedding` is the prompt's voice."""
        wave = result.wave
        seconds = len(wave) / SAMPLE_RATE
        record: ItemResult = {
            "id": item.id, "system": system, "group": item.group, "language": item.language,
            "speaker": item.speaker, "prompt": item.prompt, "text": item.text,
            "seconds": round(seconds, 3), "synthesis_seconds": round(synthesis_seconds, 3),
            **scores.faults(result.codes[0] if result.codes.size else None, result.hit_limit),
        }  # fmt: skip
        audible = seconds >= scores.MIN_SECONDS
        hypothesis = self._recognizer.transcribe(wave) if audible else ""
        record |= {"heard": hypothesis, **asdict(words.count_edits(item.text, hypothesis))}
        if self._second_recognizer:
            hypothesis = self._second_recognizer.transcribe(wave) if audible else ""
            errors = words.count_edits(item.text, hypothesis)
            record |= {"second_heard": hypothesis, "second_word_errors": errors.word_errors}
        embedding = self._encoder.embed(wave) if audible else None
        record["embedding"] = None if embedding is None else embedding.tolist()
        record["prompt_embedding"] = None if prompt_embedding is None else prompt_embedding.tolist()
        if embedding is not None and prompt_embedding is not None:
            record["cosine_own"] = float(embedding @ prompt_embedding)
        if audible:
            record["distillmos"] = self._mos.score(wave)
            record["dnsmos"] = self._dnsmos.score(wave)
            record["speech_fraction"] = self._speech.score(wave)
            path = storage.join(self._recipe.out, "audio", system, f"{item.id}.wav")
            storage.write_bytes(path, audio.wav_bytes(wave))
        return record


def evaluate_items(
    recipe: EvaluateRecipe, items: Sequence[EvaluationItem], allocation: Allocation
) -> list[ItemResult]:
    """Records of all items, in the order of the set. `allocation`: an actor's."""
    import ray
    from ray.util import ActorPool

    evaluator = ray.remote(**allocation.options)(Evaluator)
    workers = allocation.worker_count(recipe.workers, len(items))
    tracking_uri = settings.read().tracking_uri
    pool = ActorPool([evaluator.remote(recipe, tracking_uri) for _ in range(workers)])
    bar = progress_bar(total=len(items), label="evaluate", unit="item")
    records: list[ItemResult] = []
    for results in pool.map(lambda actor, item: actor.evaluate.remote(item), list(items)):
        records += results
        bar.update()
    bar.close()
    return records


def allocation_for(
    recipe: EvaluateRecipe, section: str = "evaluate", cluster: Cluster | None = None
) -> Allocation:
    """An actor's share of the connected cluster, or of `cluster`; `section` is named in messages.

    Raises RecipeError when the cluster will never hold an actor.
    """
    placement = recipe.placement
    if recipe.precision == "int8":
        placement = replace(placement, accelerator="cpu")
    return resources.resolve(placement, section, cpus=0.9, cluster=cluster)


def evaluate(recipe: EvaluateRecipe, allocation: Allocation | None = None) -> Report:
    """Judges every item on the connected cluster; writes and returns the report. `allocation`: an
    actor's, where it has been resolved before.

    Raises ValueError before anything starts when the cluster will never hold the actors.
    """
    allocation = allocation or allocation_for(recipe)
    items = load_items(recipe.items)[: recipe.limit or None]
    speaker_id_candidates = sorted(
        {item.speaker for item in items} & set(recipe.speaker_id_candidates)
    )
    if recipe.training_data:
        check_unseen(items, recipe.training_data)
    bundle = registry.resolve(recipe.model)  # a missing model is better noticed before Ray works
    records = evaluate_items(recipe, items, allocation)
    report: Report = {
        "model": recipe.model,
        "bundle": asdict(registry.read_bundle(bundle)),
        "items": recipe.items,
        "training_data_checked": recipe.training_data is not None,
        "judges": [recipe.recognizer, recipe.second_recognizer, recipe.speaker_encoder],
        "synthesis": asdict(recipe.synthesis),
        "precision": recipe.precision,
        "accelerator": allocation.accelerator,
        "code_version": tracking.code_version(),
        "systems": scores.summarize(records, speaker_id_candidates),
        "identified_among": speaker_id_candidates,
        "records": [scores.without_embeddings(record) for record in records],
    }
    baseline = storage.read_json(recipe.baseline) if recipe.baseline else None
    write_report(report, recipe.out, baseline)
    tracking.log_report(f"evaluate-{Path(recipe.items).stem}", mlflow_metrics(report), recipe.out)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate --recipe nano`."""
    recipe = parse_arguments(argv, "evaluate", EvaluateRecipe, __doc__ or "")
    with exit_on_error(), connect():
        report = evaluate(recipe)
    print(markdown_table(report))
    print(f"report: {storage.join(recipe.out, 'report.html')}")


if __name__ == "__main__":
    main()
