"""Selects the speakers of a corpus that sound natural and unlike each other.

Judges a few recordings of each speaker (`{speaker}/{id}.wav`): predicted opinion score
(DistillMOS) and speaker embedding (WeSpeaker). Speakers below the score are left out; of the rest,
best score first, one is taken when it is unlike every speaker taken before. What the measures
were, and whom each refused speaker resembles, is written beside the selection.
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
    """Which corpus, and where the bounds are."""

    corpus: str = field(metadata=location())
    """Folder or URI of the recordings, a folder a speaker."""

    out: str = field(metadata=location())
    """JSON file of the result."""

    recordings: int = 2
    """How many of each speaker are judged, the longest first."""

    min_distillmos: float = 3.8
    """Mean opinion score (1 to 5) below which a speaker is left out."""

    max_similarity: float = 0.5
    """Largest cosine of two selected speakers' embeddings; recordings of one speaker have about
    0.7, of different speakers about 0.1."""

    keep: tuple[str, ...] = ()
    """Speakers selected before all others, whatever their score: those a corpus has already."""

    speaker_encoder: str = "wespeaker"
    """wespeaker, resemblyzer or `package.module:Class`."""

    def __post_init__(self) -> None:
        if self.recordings < 1:
            raise ValueError(f"recordings: {self.recordings} is below 1")
        if not -1 <= self.max_similarity <= 1:
            raise ValueError(f"max_similarity: {self.max_similarity} is no cosine (-1 to 1)")


@dataclass(frozen=True, kw_only=True)
class SpeakerMeasurement:
    """What the judges say of one speaker."""

    speaker: str
    distillmos: float
    embedding: NDArray[np.float32]
    """Mean of the recordings' embeddings, of length one."""


@dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """Whether a speaker is selected, and why not."""

    speaker: str
    distillmos: float
    selected: bool
    similarity: float
    """Largest cosine to a speaker selected before it; -1 for the first."""
    nearest: str | None
    """The speaker it is most like."""


def measure(recipe: SelectionRecipe) -> list[SpeakerMeasurement]:
    """The judges' measures of every speaker whose recordings hold a voice."""
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
    """A result a speaker: those to keep first, then by falling score.

    Raises ValueError for a name in `keep` that was not measured.
    """
    if absent := set(recipe.keep) - {m.speaker for m in measurements}:
        raise ValueError(f"keep: no recordings of {', '.join(sorted(absent))} in the corpus")
    order = sorted(measurements, key=lambda m: (m.speaker not in recipe.keep, -m.distillmos))
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
                speaker=candidate.speaker, distillmos=round(candidate.distillmos, 2),
                selected=selected, similarity=round(similarity, 3),
                nearest=None if nearest is None else selection[nearest].speaker,
            )
        )  # fmt: skip
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
