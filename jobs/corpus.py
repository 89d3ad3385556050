"""Builds a speech corpus, `{speaker}/{id}.wav` with `.txt`, from installable packages.

The plan, a sentence and a voice per utterance, is a pure function of the recipe. A second run
makes only the missing files, so an interrupted run can be resumed.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from valle.jobs.recipes import parse_arguments
from valle.jobs.speakers import LICENSES, TTS_ENGINES, speed_perturbation, texts
from valle.jobs.speakers.asterisk import asterisk_recordings
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location, resolve_paths


@dataclass(frozen=True, kw_only=True)
class SpeakerSet:
    """Voices of one TTS engine, and the utterances that each of them speaks."""

    engine: str
    """TTS engine: joe or heart (one voice each, cheap), kokoro (many voices), espeak, or asterisk
    (recordings of people, from Debian packages)."""

    language: str = "en-us"
    """espeak voice name; for asterisk, the language of the recordings."""

    voices: tuple[str, ...] = ("joe",)
    """kokoro: `af_heart`, `blend-N` or `mix-N`; joe and heart: their name, or a speed factor such
    as `x1.2` (above 1 is higher); espeak: variants such as `f2`; asterisk: any one name. A range
    `mix-1..40` stands for forty voices."""

    utterances: int = 0
    """Utterances per voice; 0 (asterisk only) takes all recordings."""

    speed_factors: tuple[str, ...] = field(default=(), metadata=formerly("also"))
    """Speed perturbation: per factor (`x1.1` is higher, `x0.9` lower) one copy of each utterance,
    labelled as another speaker. A copy costs far less than a synthesis."""

    sentences: tuple[str, ...] = ()
    """Sentence lists: files in `jobs/speakers/sentences`, or `wordnet`. Default: the list of the
    language (en, fr, ...)."""

    def __post_init__(self) -> None:
        if self.engine not in TTS_ENGINES:
            raise ValueError(f"engine: {self.engine!r} is none of {sorted(TTS_ENGINES)}")
        if self.engine != "asterisk" and self.utterances < 1:
            raise ValueError(f"utterances: {self.engine} needs a number above 0")
        for factor in self.speed_factors:
            speed_perturbation.parse_factor(factor)


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """Speaker sets and destination of a corpus."""

    out: str = field(metadata=location())
    """Folder or URI of the corpus."""

    speakers: tuple[SpeakerSet, ...] = field(default=(), metadata=formerly("sources"))
    """Speaker sets, in the order of the plan."""

    seed: int = 0
    """Seed of the draw of sentences and of their order."""

    workers: int = 2
    """Number of Ray actors, with one core each."""


@dataclass(frozen=True, kw_only=True)
class CorpusUtterance:
    """One utterance of the plan: text, voice and the files it is written to."""

    engine: str
    voice: str
    language: str
    speaker: str
    id: str
    text: str
    speed_factors: tuple[str, ...] = ()

    def output_paths(self) -> dict[str, str]:
        """Paths below the corpus, without suffix, by speed factor; "" is the unchanged wave."""
        copies = {factor: f"{self.speaker}-{factor}/{self.id}" for factor in self.speed_factors}
        return {"": f"{self.speaker}/{self.id}", **copies}


def plan(recipe: CorpusRecipe) -> list[CorpusUtterance]:
    """Lists the utterances of the corpus, in the order of the recipe.

    Raises ValueError when two utterances would be written to the same file.
    """
    utterances: list[CorpusUtterance] = []
    for speaker_set in recipe.speakers:
        expand = _recorded if speaker_set.engine == "asterisk" else _synthesized
        utterances += expand(speaker_set, recipe.seed)
    files = Counter(path for u in utterances for path in u.output_paths().values())
    if duplicates := [path for path, count in files.items() if count > 1]:
        raise ValueError(
            f"speakers: {duplicates[0]} is made twice; a speaker needs an engine, a voice "
            "and a copy (speed_factors) of its own"
        )
    return utterances


def _synthesized(speaker_set: SpeakerSet, seed: int) -> Iterator[CorpusUtterance]:
    """Plans a speaker set of a TTS engine: sentences in an order drawn per speaker."""
    sentences: list[str] = []
    for name in speaker_set.sentences or (speaker_set.language.split("-")[0],):
        sentences += texts.load_sentences(name)
    for voice in (voice for name in speaker_set.voices for voice in _numbered(name)):
        speaker = (
            speaker_set.engine if voice == speaker_set.engine else f"{speaker_set.engine}-{voice}"
        )
        order = sentences.copy()
        random.Random(f"{seed}/{speaker}").shuffle(order)
        for number in range(speaker_set.utterances):
            # When the list is used up, texts join two sentences, then three.
            lap, index = divmod(number, len(order))
            parts = [order[(index + 7 * step) % len(order)] for step in range(lap + 1)]
            text = " ".join(parts)
            yield CorpusUtterance(
                engine=speaker_set.engine,
                voice=voice,
                language=speaker_set.language,
                speaker=speaker,
                id=f"{number:05d}",
                text=text,
                speed_factors=speaker_set.speed_factors,
            )


def _numbered(voice: str) -> list[str]:
    """Expands `mix-1..3` to `mix-1`, `mix-2`, `mix-3`; returns any other name unchanged."""
    match = re.fullmatch(r"(.*-)(\d+)\.\.(\d+)", voice)
    if match is None:
        return [voice]
    return [f"{match[1]}{number}" for number in range(int(match[2]), int(match[3]) + 1)]


def _recorded(speaker_set: SpeakerSet, seed: int) -> Iterator[CorpusUtterance]:
    """Plans a speaker set of recordings, drawn by the seed; the text is the transcript."""
    recordings = sorted(asterisk_recordings(speaker_set.language).items())
    if not recordings:
        print(
            f"asterisk {speaker_set.language}: skipped, Debian's recordings are not installed "
            "(apt-get install asterisk-core-sounds-XX asterisk-core-sounds-XX-g722)"
        )
    random.Random(seed).shuffle(recordings)
    speaker = f"asterisk-{speaker_set.language.split('-')[0]}"
    for name, recording in recordings[: speaker_set.utterances or None]:
        yield CorpusUtterance(
            engine="asterisk",
            voice=name,
            language=speaker_set.language,
            speaker=speaker,
            id=name,
            text=recording.text,
        )


def _perturb(wave: Wave, factor: str) -> Wave:
    return speed_perturbation.perturb_speed(
        wave, SAMPLE_RATE, speed_perturbation.parse_factor(factor)
    )


class CorpusWorker:
    """A Ray actor that synthesizes and stores utterances. A TTS engine is loaded on first use."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._engines = {}  # type: ignore[var-annotated]

    def process(self, utterance: CorpusUtterance) -> dict[str, object]:
        """Stores an utterance and its copies; `reason` in the result is the error, or None."""
        seconds = 0.0
        try:
            wave = self._wave(utterance)
            for factor, path in utterance.output_paths().items():
                copy = _perturb(wave, factor) if factor else wave
                self._store(path, utterance.text, copy)
                seconds += len(copy) / SAMPLE_RATE
        except Exception as error:  # any failure of an engine rejects one utterance, not the run
            reason = f"{type(error).__name__}: {error}"
            return {**asdict(utterance), "seconds": seconds, "reason": reason}
        return {**asdict(utterance), "seconds": seconds, "reason": None}

    def _wave(self, utterance: CorpusUtterance) -> Wave:
        """The unchanged wave: the stored one if its text is the same, else a new synthesis."""
        path = storage.join(self._out, utterance.output_paths()[""])
        if (
            storage.exists(f"{path}.wav")
            and storage.exists(f"{path}.txt")
            and storage.read_bytes(f"{path}.txt").decode().strip() == utterance.text
        ):
            return audio.read(storage.read_bytes(f"{path}.wav"), max_seconds=600)
        if utterance.engine not in self._engines:
            self._engines[utterance.engine] = TTS_ENGINES[utterance.engine]()
        return self._engines[utterance.engine].synthesize(
            utterance.text, utterance.voice, utterance.language
        )

    def _store(self, path: str, text: str, wave: Wave) -> None:
        uri = storage.join(self._out, path)
        storage.write_bytes(f"{uri}.txt", (text + "\n").encode())
        # The wave is written last: its file marks the utterance as complete.
        storage.write_bytes(f"{uri}.wav", audio.wav_bytes(wave))


def build_corpus(recipe: CorpusRecipe) -> dict[str, object]:
    """Synthesizes the missing utterances on Ray; returns the report, also in `corpus.json`."""
    import ray
    from ray.util import ActorPool

    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    out = recipe.out
    utterances = plan(recipe)
    present = set(storage.list_files(out, (".wav",)))
    missing = [
        utterance
        for utterance in utterances
        if any(f"{path}.wav" not in present for path in utterance.output_paths().values())
    ]
    # Order by id, across voices: an interrupted corpus has utterances of every voice.
    missing.sort(key=lambda utterance: utterance.id)
    seconds, rejects = 0.0, []
    if missing:
        actor = ray.remote(num_cpus=0.9)(CorpusWorker)
        pool = ActorPool([actor.remote(out) for _ in range(recipe.workers)])
        results = pool.map_unordered(
            lambda worker, utterance: worker.process.remote(utterance), missing
        )
        bar = progress_bar(total=len(missing), label="corpus", unit="utterance")
        for result in results:
            bar.update()
            seconds += result["seconds"]
            if result["reason"]:
                rejects.append(result)
        bar.close()
    report = {
        "out": out,
        "utterances": len(utterances),
        "already_done": len(utterances) - len(missing),
        "generated": len(missing) - len(rejects),
        "generated_seconds": round(seconds, 1),
        "rejected": rejects,
    }
    storage.write_json(storage.join(out, "corpus.json"), report)
    storage.write_bytes(storage.join(out, "LICENCES.md"), _licenses(utterances).encode())
    return report


def _licenses(utterances: Sequence[CorpusUtterance]) -> str:
    """Markdown table with source and licence of each speaker."""
    rows = {
        path.split("/")[0]: LICENSES.get(
            utterance.speaker, LICENSES.get(utterance.engine, "unknown")
        )
        for utterance in utterances
        for path in utterance.output_paths().values()
    }
    table = "".join(f"| {speaker} | {terms} |\n" for speaker, terms in sorted(rows.items()))
    return (
        "# Provenance and licences\n\nMade by `jobs/corpus.py` from installed packages; the "
        "sentences are the project's own (Apache-2.0) or, from the list `wordnet`, WordNet's "
        "((c) Princeton University, WordNet licence); the transcripts of recordings come with "
        f"them.\n\n| speaker | source and terms |\n|---|---|\n{table}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.corpus --recipe demo`."""
    recipe = parse_arguments(argv, "corpus", CorpusRecipe, __doc__ or "")
    with exit_on_error(), connect():
        report = build_corpus(recipe)
    print(
        f"corpus: {report['generated']} generated ({report['generated_seconds']} s of speech), "
        f"{report['already_done']} already done, {len(report['rejected'])} rejected "  # type: ignore[arg-type]
        f"-> {report['out']}"
    )


if __name__ == "__main__":
    main()
