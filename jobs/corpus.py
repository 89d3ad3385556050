"""Makes a corpus folder from what installable packages carry: `{speaker}/{id}.wav + .txt`.

The plan (who says which sentence) is a pure function of the recipe; a second run makes only the
files that are missing, so an interrupted one goes on where it stopped.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from valle.jobs.speakers import ENGINES, LICENCES, pitch, texts
from valle.jobs.speakers.asterisk import asterisk_prompts
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, recipe, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some utterances by one engine."""

    engine: str
    """joe and heart (one voice each, cheap), kokoro (many), asterisk (human recordings, where
    Debian's packages are) or espeak."""

    language: str = "en-us"
    """espeak voice name; for asterisk, which language's prompts to take."""

    voices: tuple[str, ...] = ("joe",)
    """kokoro: `af_heart` ..., `blend-0` ..., `mix-0` ...; joe and heart: their name, or `x1.2` for
    a voice that much higher; espeak: variants such as `f2`; asterisk: one name. `mix-1..40` stands
    for forty."""

    utterances: int = 0
    """How many each voice says; 0 takes all there are (asterisk)."""

    also: tuple[str, ...] = ()
    """Each utterance once more, that much higher (`x1.1`) or lower, as a speaker of its own: for
    an engine that is not cheap, almost free."""

    sentences: tuple[str, ...] = ()
    """Lists in `jobs/speakers/sentences` to draw from, or `wordnet`; default: those of the language
    (en, fr, ...)."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine: {self.engine!r} is none of {sorted(ENGINES)}")
        if self.engine != "asterisk" and self.utterances < 1:
            raise ValueError(f"utterances: {self.engine} needs a number above 0")
        for by in self.also:
            pitch.factor(by)


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """What to speak, by whom, and where to put it."""

    out: str
    """Folder or URI of the corpus."""

    sources: tuple[Source, ...] = field(default_factory=tuple)
    """The engines with their voices."""

    seed: int = 0
    """Which sentences each voice gets, and their order."""

    workers: int = 2
    """Engines at work at the same time, one core each."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One utterance of the plan."""

    engine: str
    voice: str
    language: str
    speaker: str
    id: str
    text: str
    also: tuple[str, ...] = ()

    def targets(self) -> dict[str, str]:
        """Path below the corpus, without suffix, by what the voice is raised by ("": not)."""
        raised = {by: f"{self.speaker}-{by}/{self.id}" for by in self.also}
        return {"": f"{self.speaker}/{self.id}", **raised}


def plan(chosen: CorpusRecipe) -> list[Line]:
    """Every utterance of the corpus, in the order of the recipe.

    Raises ValueError when two of them would be the same file.
    """
    lines: list[Line] = []
    for source in chosen.sources:
        maker = _recorded if source.engine == "asterisk" else _synthesised
        lines += maker(source, chosen.seed)
    files = Counter(target for line in lines for target in line.targets().values())
    if twice := [target for target, count in files.items() if count > 1]:
        raise ValueError(
            f"sources: {twice[0]} is made twice; a speaker needs a source, a voice and a copy "
            "(also) of its own"
        )
    return lines


def _synthesised(source: Source, seed: int) -> Iterator[Line]:
    sentences: list[str] = []
    for name in source.sentences or (source.language.split("-")[0],):
        sentences += texts.sentences(name)
    for voice in (voice for name in source.voices for voice in _numbered(name)):
        speaker = source.engine if voice == source.engine else f"{source.engine}-{voice}"
        order = sentences.copy()
        random.Random(f"{seed}/{speaker}").shuffle(order)
        for number in range(source.utterances):
            # past the end of the list, lines of two and more sentences
            lap, index = divmod(number, len(order))
            parts = [order[(index + 7 * step) % len(order)] for step in range(lap + 1)]
            text = " ".join(parts)
            yield Line(
                engine=source.engine, voice=voice, language=source.language,
                speaker=speaker, id=f"{number:05d}", text=text, also=source.also,
            )  # fmt: skip


def _numbered(voice: str) -> list[str]:
    """`mix-1..3` as `mix-1`, `mix-2`, `mix-3`; any other name as it is."""
    found = re.fullmatch(r"(.*-)(\d+)\.\.(\d+)", voice)
    if found is None:
        return [voice]
    return [f"{found[1]}{number}" for number in range(int(found[2]), int(found[3]) + 1)]


def _recorded(source: Source, seed: int) -> Iterator[Line]:
    prompts = sorted(asterisk_prompts(source.language).items())
    if not prompts:
        print(
            f"asterisk {source.language}: Debian's recordings are not installed, skipped "
            "(apt-get install asterisk-core-sounds-XX asterisk-core-sounds-XX-g722)"
        )
    random.Random(seed).shuffle(prompts)
    speaker = f"asterisk-{source.language.split('-')[0]}"
    for name, recording in prompts[: source.utterances or None]:
        yield Line(
            engine="asterisk", voice=name, language=source.language,
            speaker=speaker, id=name, text=recording.text,
        )  # fmt: skip


class Speaker:
    """A Ray actor that speaks lines and stores them. Engines load on first use."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._engines = {}  # type: ignore[var-annotated]

    def speak(self, line: Line) -> dict[str, object]:
        """Makes one utterance, and its copies; what went wrong comes back as the `reason`."""
        seconds = 0.0
        try:
            wave = self._wave(line)
            for by, target in line.targets().items():
                raised = pitch.raise_by(wave, SAMPLE_RATE, pitch.factor(by)) if by else wave
                self._store(target, line.text, raised)
                seconds += len(raised) / SAMPLE_RATE
        except Exception as error:  # one bad line must not stop a corpus; it is reported
            reason = f"{type(error).__name__}: {error}"
            return {**asdict(line), "seconds": seconds, "reason": reason}
        return {**asdict(line), "seconds": seconds, "reason": None}

    def _wave(self, line: Line) -> Wave:
        """The utterance itself; of one whose copies alone are missing, as it was stored, unless
        an older plan had another text for it."""
        path = storage.join(self._out, line.targets()[""])
        if (
            storage.exists(f"{path}.wav")
            and storage.exists(f"{path}.txt")
            and storage.read_bytes(f"{path}.txt").decode().strip() == line.text
        ):
            return audio.read(storage.read_bytes(f"{path}.wav"), max_seconds=600)
        if line.engine not in self._engines:
            self._engines[line.engine] = ENGINES[line.engine]()
        return self._engines[line.engine].speak(line.text, line.voice, line.language)

    def _store(self, target: str, text: str, wave: Wave) -> None:
        path = storage.join(self._out, target)
        storage.write_bytes(f"{path}.txt", (text + "\n").encode())
        storage.write_bytes(f"{path}.wav", audio.wav_bytes(wave))  # last: marks it as done


def make(chosen: CorpusRecipe) -> dict[str, object]:
    """Speaks the missing lines on Ray; returns the report, also written as `corpus.json`."""
    import ray
    from ray.util import ActorPool

    out = storage.absolute(chosen.out)
    lines = plan(chosen)
    present = set(storage.list_files(out, (".wav",)))
    missing = [
        line for line in lines if any(f"{t}.wav" not in present for t in line.targets().values())
    ]
    # all voices in turn: an interrupted corpus has something of each
    missing.sort(key=lambda line: line.id)
    seconds, rejects = 0.0, []
    if missing:
        actor = ray.remote(num_cpus=0.9)(Speaker)
        pool = ActorPool([actor.remote(out) for _ in range(chosen.workers)])
        results = pool.map_unordered(lambda a, line: a.speak.remote(line), missing)
        bar = progress(total=len(missing), label="corpus", unit="line")
        for result in results:
            bar.update()
            seconds += result["seconds"]
            if result["reason"]:
                rejects.append(result)
        bar.close()
    report = {
        "out": out,
        "lines": len(lines),
        "already_there": len(lines) - len(missing),
        "made": len(missing) - len(rejects),
        "made_seconds": round(seconds, 1),
        "rejected": rejects,
    }
    storage.write_json(storage.join(out, "corpus.json"), report)
    storage.write_bytes(storage.join(out, "LICENCES.md"), _licences(lines).encode())
    return report


def _licences(lines: Sequence[Line]) -> str:
    """Where each speaker's audio comes from and under which terms."""
    rows = {
        target.split("/")[0]: LICENCES.get(line.speaker, LICENCES.get(line.engine, "unknown"))
        for line in lines
        for target in line.targets().values()
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
    chosen = recipe.parse_arguments(argv, "corpus", CorpusRecipe, __doc__ or "")
    with recipe.reported(), connect():
        report = make(chosen)
    print(
        f"corpus: {report['made']} made ({report['made_seconds']} s of speech), "
        f"{report['already_there']} already there, {len(report['rejected'])} rejected "  # type: ignore[arg-type]
        f"-> {report['out']}"
    )


if __name__ == "__main__":
    main()
