"""Whether a voice model speaks: words, likeness, quality, faults, beside what is possible.

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
from typing import Any

from valle.jobs.evaluation import report, scores
from valle.jobs.evaluation.items import EvaluationItem, check_unseen, item_seed, load_items
from valle.jobs.evaluation.metrics import likeness, quality, recogniser
from valle.jobs.evaluation.metrics.likeness import Embedding
from valle.model.chunks import Chunking, fill_in_chunks
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import Filler, Unfilled, fill_in
from valle.model.precision import Precision, convert
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Spoken, Synthesis, Voice, text_ids
from valle.platform import audio, recipe, registry, resources, settings, storage, tracking
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.progress import progress
from valle.platform.resources import Placement, Share
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

    items: str
    """Name of a set in `jobs/evaluation/sets`, or path or URI of a JSONL file."""

    recordings: str
    """Folder or URI that the items' recordings lie under."""

    out: str
    """Folder or URI for the report."""

    model: str = registry.CHAMPION
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    systems: tuple[str, ...] = SYSTEMS
    """Rows of the report."""

    synthesis: Synthesis = field(default_factory=Synthesis)
    """Sampling; the seed is mixed with each item's id."""

    precision: Precision = "fp32"
    """What the models compute in, as the endpoint's `precision`: fp32, bf16 or int8."""

    recogniser: str = "whisper"
    """whisper (tiny.en), moonshine, a faster-whisper path or name, or package.module:Class."""

    second_recogniser: str | None = "moonshine"
    """Another reader, for a second opinion."""

    speaker_encoder: str = "resemblyzer"
    """resemblyzer, or package.module:Class."""

    identified_among: tuple[str, ...] = ()
    """Speakers among whom a voice has to be told from its prompt, as far as the set has them (the
    report names them); none: all."""

    training_data: str | None = None
    """Token dataset the model was trained on: no sentence and no unseen voice may be in it. None
    leaves that unchecked, and the report says so."""

    limit: int = 0
    """Only the first so many items; 0 takes all."""

    workers: int = 2
    """Actors at work at the same time, at most: fewer where the cluster never holds so many."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU for the voice model, and how much of one each actor takes; the judges (whisper,
    moonshine, Resemblyzer, DistillMOS, DNSMOS) compute on one core beside it."""

    champion: str | None = None
    """An earlier `report.json` to compare with."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.systems) - {*SYSTEMS, CHUNKED}):
            raise ValueError(f"systems: {unknown[0]!r} is none of {(*SYSTEMS, CHUNKED)}")
        if self.precision == "int8" and self.placement.accelerator == "gpu":
            raise ValueError("precision: int8 is for CPUs; set placement.accelerator=cpu, or bf16")


class Judge:
    """A Ray actor: the voice model and every judge, one item at a time."""

    def __init__(self, chosen: EvaluateRecipe, tracking_uri: str) -> None:
        import torch

        torch.set_num_threads(1)  # of the judges, and of a model without a GPU
        # resolved here: the actor may run on another machine
        bundle = registry.resolve(chosen.model, tracking_uri)
        self._voice: Voice = registry.load_voice(bundle, resources.device())
        convert(self._voice.ar, chosen.precision)
        convert(self._voice.nar, chosen.precision)
        self._filler = Filler(self._voice.nar)
        self._chosen = chosen
        self._reader = recogniser.load_recogniser(chosen.recogniser)
        second = chosen.second_recogniser
        self._second = recogniser.load_recogniser(second) if second else None
        self._encoder = likeness.load_encoder(chosen.speaker_encoder)
        self._mos, self._dnsmos = quality.DistillMos(), quality.Dnsmos()
        self._speech = SpeechFraction()

    def judge(self, item: EvaluationItem) -> list[dict[str, Any]]:
        """A record for each row of the report that this item has."""
        prompt = self._read(item.prompt)
        truth = self._read(item.reference) if item.reference else None
        wanted = self._encoder.embed(prompt)
        records = []
        for system in self._chosen.systems:
            if truth is None and system not in ("cross", CHUNKED):
                continue
            started = time.perf_counter()
            spoken = self._speak(system, item, prompt, truth)
            taken = time.perf_counter() - started
            records.append(self._record(system, item, spoken, wanted, taken))
        return records

    def _read(self, name: str) -> Wave:
        path = storage.join(self._chosen.recordings, name)
        return audio.read(storage.read_bytes(path), max_seconds=60)

    def _speak(self, system: str, item: EvaluationItem, prompt: Wave, truth: Wave | None) -> Spoken:
        how = replace(
            self._chosen.synthesis, language=item.language,
            seed=item_seed(item.id, self._chosen.synthesis.seed),
        )  # fmt: skip
        if system == "cross":
            return self._voice.speak(item.text, prompt, how)
        if system == CHUNKED:
            return self._in_chunks(item, prompt, how)
        assert truth is not None, "judge() skips rows that need a reference"
        codes = self._voice.codec.encode([truth])[0]
        if system == "recording":
            return Spoken(truth, codes, hit_limit=False)
        if system == "codec":
            return Spoken(self._voice.codec.decode([codes])[0], codes, hit_limit=False)
        if system == "continuation":
            # of a short sentence, half: there must be something left to say
            beginning = min(how.prompt_seconds, len(truth) / SAMPLE_RATE / 2)
            return self._voice.go_on(item.text, truth, replace(how, prompt_seconds=beginning))
        return self._fill_in(item, prompt, codes, how)

    def _fill_in(self, item: EvaluationItem, prompt: Wave, codes: Codes, how: Synthesis) -> Spoken:
        """The NAR model on the true first codebook."""
        ids = text_ids(item.text, how.language)
        heard = self._voice.encode_prompt(prompt, how)
        filled = fill_in(self._voice.nar, Unfilled(ids, heard, codes[0]), how.filling)
        return Spoken(self._voice.codec.decode([filled])[0], filled, hit_limit=False)

    def _in_chunks(self, item: EvaluationItem, prompt: Wave, how: Synthesis) -> Spoken:
        """`cross` with the NAR model's codes as they are when each chunk is due."""
        whole = self._voice.speak(item.text, prompt, how)
        if not whole.codes.size:
            return whole
        ids = text_ids(item.text, how.language)
        heard = self._voice.encode_prompt(prompt, how)
        codes = fill_in_chunks(
            lambda unfilled: self._filler.fill_in([unfilled], how.filling)[0],
            Unfilled(ids, heard, whole.codes[0], ended=not whole.hit_limit), Chunking(),
            self._voice.ar.config.group,
        )  # fmt: skip
        return replace(whole, wave=self._voice.codec.decode([codes])[0], codes=codes)

    def _record(
        self,
        system: str,
        item: EvaluationItem,
        spoken: Spoken,
        wanted: Embedding | None,
        taken: float,
    ) -> dict[str, Any]:
        """How one row of one item is judged; `wanted` is the prompt's voice."""
        wave = spoken.wave
        seconds = len(wave) / SAMPLE_RATE
        record: dict[str, Any] = {
            "id": item.id, "system": system, "group": item.group, "language": item.language,
            "speaker": item.speaker, "prompt": item.prompt, "text": item.text,
            "seconds": round(seconds, 3), "synthesis_seconds": round(taken, 3),
            **scores.faults(spoken.codes[0] if spoken.codes.size else None, spoken.hit_limit),
        }  # fmt: skip
        audible = seconds >= scores.SHORTEST
        heard = self._reader.transcribe(wave) if audible else ""
        record |= {"heard": heard, **asdict(recogniser.compare(item.text, heard))}
        if self._second:
            heard = self._second.transcribe(wave) if audible else ""
            errors = recogniser.compare(item.text, heard)
            record |= {"second_heard": heard, "second_word_errors": errors.word_errors}
        voice = self._encoder.embed(wave) if audible else None
        record["voice"] = None if voice is None else voice.tolist()
        record["prompt_voice"] = None if wanted is None else wanted.tolist()
        if voice is not None and wanted is not None:
            record["cosine_own"] = float(voice @ wanted)
        if audible:
            record["distillmos"] = self._mos.score(wave)
            record["dnsmos"] = self._dnsmos.score(wave)
            record["speech_fraction"] = self._speech.score(wave)
            target = storage.join(self._chosen.out, "audio", system, f"{item.id}.wav")
            storage.write_bytes(target, audio.wav_bytes(wave))
        return record


def judge_all(
    chosen: EvaluateRecipe, items: Sequence[EvaluationItem], share: Share
) -> list[dict[str, Any]]:
    """Records of all items, in the order of the set. `share`: an actor's."""
    import ray
    from ray.util import ActorPool

    actor = ray.remote(**share.options)(Judge)
    workers = share.count(chosen.workers, len(items))
    tracking_uri = settings.read().tracking_uri
    pool = ActorPool([actor.remote(chosen, tracking_uri) for _ in range(workers)])
    bar = progress(total=len(items), label="evaluate", unit="item")
    records: list[dict[str, Any]] = []
    for found in pool.map(lambda judge, item: judge.judge.remote(item), list(items)):
        records += found
        bar.update()
    bar.close()
    return records


def share_of(
    chosen: EvaluateRecipe, section: str = "evaluate", cluster: Cluster | None = None
) -> Share:
    """An actor's share of the connected cluster, or of `cluster`; `section` is named in messages.

    Raises RecipeError when the cluster will never hold an actor.
    """
    placement = chosen.placement
    if chosen.precision == "int8":
        placement = replace(placement, accelerator="cpu")
    return resources.resolve(placement, section, cpus=0.9, cluster=cluster)


def evaluate(chosen: EvaluateRecipe, share: Share | None = None) -> dict[str, Any]:
    """Judges every item on the connected cluster; writes and returns the report. `share`: an
    actor's, where it has been resolved before.

    Raises ValueError before anything starts when the cluster will never hold the actors.
    """
    share = share or share_of(chosen)
    chosen = replace(
        chosen, model=registry.absolute(chosen.model), out=storage.absolute(chosen.out),
        recordings=storage.absolute(chosen.recordings),
    )  # fmt: skip
    items = load_items(chosen.items)[: chosen.limit or None]
    among = sorted({item.speaker for item in items} & set(chosen.identified_among))
    if chosen.training_data:
        check_unseen(items, storage.absolute(chosen.training_data))
    bundle = registry.resolve(chosen.model)  # a missing model is better noticed before Ray works
    records = judge_all(chosen, items, share)
    content = {
        "model": chosen.model,
        "bundle": asdict(registry.describe(bundle)),
        "items": chosen.items,
        "training_data_checked": chosen.training_data is not None,
        "judges": [chosen.recogniser, chosen.second_recogniser, chosen.speaker_encoder],
        "synthesis": asdict(chosen.synthesis),
        "precision": chosen.precision,
        "accelerator": share.accelerator,
        "code_version": tracking.code_version(),
        "systems": scores.summarise(records, among),
        "identified_among": among,
        "records": [scores.without_vectors(record) for record in records],
    }
    earlier = storage.read_json(chosen.champion) if chosen.champion else None
    report.write(content, chosen.out, earlier)
    tracking.log_report(f"evaluate-{Path(chosen.items).stem}", report.metrics(content), chosen.out)
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.evaluate --recipe nano`."""
    chosen = recipe.parse_arguments(argv, "evaluate", EvaluateRecipe, __doc__ or "")
    with recipe.reported(), connect():
        content = evaluate(chosen)
    print(report.markdown_table(content))
    print(f"report: {storage.join(chosen.out, 'report.html')}")


if __name__ == "__main__":
    main()
