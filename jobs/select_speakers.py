"""Selects natural and mutually dissimilar speakers from a corpus.

A few recordings of each speaker (`{speaker}/{id}.wav`) are measured: predicted mean opinion score
(DistillMOS) and speaker embedding (WeSpeaker). Speakers with a low score are left out. The others
are visited by falling score; a speaker is selected when its similarity to every selected speaker
is below a bound. The result lists scores, similarities and the nearest selected speaker.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from valle.jobs.evaluation.metrics.quality import DistillMos
from valle.jobs.evaluation.metrics.speaker_similarity import load_speaker_encoder
from valle.jobs.recipes import parse_arguments
from valle.platform import audio, storage
from valle.platform.progress import progress_bar
from valle.platform.recipe import location


@dataclass(frozen=True, kw_only=True)
class SelectionRecipe:
    """Corpus, bounds and destination of a selection."""

    corpus: str = field(metadata=location())
    """Folder or URI of the recordings, one folder per speaker."""

    out: str = field(metadata=location())
    """JSON file of the result."""

    recordings: int = 2
    """Recordings measured per speaker: the longest ones among twice as many."""

    min_distillmos: float = 3.8
    """Least predicted mean opinion score (1 to 5) of a selected speaker."""

    max_similarity: float = 0.5
    """Bound on the cosine between the embeddings of two selected speakers. Recordings of one
    speaker have about 0.7, of different speakers about 0.1."""

    keep: tuple[str, ...] = ()
    """Speakers selected first and without bounds, such as those that a corpus already has."""

    speaker_encoder: str = "wespeaker"
    """wespeaker, resemblyzer or `package.module:Class`."""

    def __post_init__(self) -> None:
        if self.recordings < 1:
            raise ValueError(f"recordings: {self.recordings} is below 1")
        if not -1 <= self.max_similarity <= 1:
            raise ValueError(f"max_similarity: {self.max_similarity} is no cosine (-1 to 1)")


@dataclass(frozen=True, kw_only=True)
class SpeakerMeasurement:
    """Predicted opinion score and embedding of one speaker."""

    speaker: str
    distillmos: float
    embedding: NDArray[np.float32]
    """Mean of the recordings' embeddings, scaled to unit length."""


@dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """Whether a speaker is selected, with the measured values that decide it."""

    speaker: str
    distillmos: float
    selected: bool
    similarity: float
    """Largest cosine to a speaker selected earlier; -1 for the first."""
    nearest: str | None
    """The speaker with that cosine; None for the first."""


def measure(recipe: SelectionRecipe) -> list[SpeakerMeasurement]:
    """Measures every speaker; those without speech in their recordings are left out."""
    encoder, quality = load_speaker_encoder(recipe.speaker_encoder), DistillMos()
    files = sorted(storage.list_files(recipe.corpus, (".wav",)))
    speakers = [(name, list(paths)) for name, paths in groupby(files, lambda f: f.split("/")[0])]
    measurements = []
    with progress_bar(total=len(speakers), label="speakers", unit="speaker") as bar:
        for speaker, paths in speakers:
            waves = [
                audio.read(storage.read_bytes(storage.join(recipe.corpus, path)), max_seconds=60)
                for path in paths[: 2 * recipe.recordings]
            ]
            # Longer recordings give more reliable scores and embeddings.
            waves = sorted(waves, key=len, reverse=True)[: recipe.recordings]
            embeddings = [e for wave in waves if (e := encoder.embed(wave)) is not None]
            if embeddings:
                mean = np.mean(embeddings, axis=0)
                score = float(np.mean([quality.score(wave) for wave in waves]))
                measurements.append(
                    SpeakerMeasurement(
                        speaker=speaker, distillmos=score, embedding=mean / np.linalg.norm(mean)
                    )
                )
            bar.update()
    return measurements


def select(
    measurements: Sequence[SpeakerMeasurement], recipe: SelectionRecipe
) -> list[SelectionResult]:
    """Returns a result per speaker: first those of `keep`, then by falling score.

    Raises ValueError for a name in `keep` without a measurement.
    """
    if absent := set(recipe.keep) - {m.speaker for m in measurements}:
        raise ValueError(f"keep: no recordings of {', '.join(sorted(absent))} in the corpus")
    order = sorted(measurements, key=lambda m: (m.speaker not in recipe.keep, -m.distillmos))
    # Greedy: a speaker is compared only with those selected before it.
    selection: list[SpeakerMeasurement] = []
    results = []
    for candidate in order:
        cosines = [float(candidate.embedding @ other.embedding) for other in selection]
        nearest = int(np.argmax(cosines)) if cosines else None
        similarity = -1.0 if nearest is None else cosines[nearest]
        selected = candidate.speaker in recipe.keep or (
            candidate.distillmos >= recipe.min_distillmos and similarity < recipe.max_similarity
        )
        results.append(
            SelectionResult(
                speaker=candidate.speaker,
                distillmos=round(candidate.distillmos, 2),
                selected=selected,
                similarity=round(similarity, 3),
                nearest=None if nearest is None else selection[nearest].speaker,
            )
        )
        if selected:
            selection.append(candidate)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.select_speakers --recipe nano2`."""
    recipe = parse_arguments(argv, "select_speakers", SelectionRecipe, __doc__ or "")
    results = select(measure(recipe), recipe)
    storage.write_json(recipe.out, [asdict(result) for result in results])
    selected = [result.speaker for result in results if result.selected]
    print(f"{len(selected)} of {len(results)} speakers selected -> {recipe.out}")
    print(", ".join(sorted(selected)))


if __name__ == "__main__":
    main()
