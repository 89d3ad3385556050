"""Selection of natural, dissimilar speakers, and the speaker encoder it measures with."""

from pathlib import Path

import numpy as np
import pytest

from valle.jobs.evaluation.metrics import wespeaker
from valle.jobs.evaluation.metrics.speaker_similarity import load_speaker_encoder
from valle.jobs.evaluation.metrics.wespeaker import WeSpeaker, filterbank
from valle.jobs.select_speakers import SelectionRecipe, SpeakerMeasurement, measure, select
from valle.jobs.speakers import Heart, Joe
from valle.platform import audio

RECIPE = SelectionRecipe(corpus="unused", out="unused", min_distillmos=3.0, max_similarity=0.5)


def speaker(name: str, distillmos: float, *direction: float) -> SpeakerMeasurement:
    embedding = np.array(direction, np.float32)
    return SpeakerMeasurement(
        speaker=name, distillmos=distillmos, embedding=embedding / np.linalg.norm(embedding)
    )


def test_select_similar_speakers_keeps_the_better() -> None:
    measurements = [
        speaker("a", 3.5, 1, 0, 0),
        speaker("like-a", 4.0, 1, 0.2, 0),
        speaker("other", 3.2, 0, 0, 1),
        speaker("noisy", 2.9, 0, 1, 0),
    ]
    results = {result.speaker: result for result in select(measurements, RECIPE)}
    assert {name for name, result in results.items() if result.selected} == {"like-a", "other"}
    assert results["a"].nearest == "like-a"
    assert results["a"].similarity == pytest.approx(1 / np.hypot(1, 0.2), abs=1e-3)
    assert results["noisy"].similarity < 0.5  # left out for its score alone


def test_select_kept_speakers_come_first() -> None:
    measurements = [speaker("a", 2.0, 1, 0), speaker("like-a", 4.0, 1, 0.1)]
    recipe = SelectionRecipe(corpus="x", out="x", keep=("a",))
    assert [(r.speaker, r.selected) for r in select(measurements, recipe)] == [
        ("a", True),
        ("like-a", False),
    ]
    with pytest.raises(ValueError, match="keep: no recordings of b in the corpus"):
        select(measurements, SelectionRecipe(corpus="x", out="x", keep=("b",)))


def test_selection_recipe_bad_bounds_raise() -> None:
    with pytest.raises(ValueError, match="max_similarity: 1.5 is no cosine"):
        SelectionRecipe(corpus="x", out="x", max_similarity=1.5)
    with pytest.raises(ValueError, match="recordings: 0 is below 1"):
        SelectionRecipe(corpus="x", out="x", recordings=0)


@pytest.mark.slow
def test_measure_two_voices_are_distinguished(tmp_path: Path) -> None:
    """Of joe twice and heart, one joe and heart are selected; silence is not measured."""
    text = "The boats came home before the storm had reached the harbour."
    for folder, engine, voice in (
        ("joe", Joe(), "joe"),
        ("joe-again", Joe(), "joe"),
        ("heart", Heart(), "heart"),
    ):
        (tmp_path / folder).mkdir()
        wave = engine.synthesize(text, voice, "en-us")
        (tmp_path / folder / "0.wav").write_bytes(audio.wav_bytes(wave))
    (tmp_path / "nobody").mkdir()
    silence = np.zeros(24_000, np.float32)
    (tmp_path / "nobody" / "0.wav").write_bytes(audio.wav_bytes(silence))
    recipe = SelectionRecipe(corpus=str(tmp_path), out="x", min_distillmos=2.0)
    measurements = measure(recipe)
    assert {m.speaker for m in measurements} == {"heart", "joe", "joe-again"}
    results = {result.speaker: result for result in select(measurements, recipe)}
    assert results["heart"].selected
    assert results["joe"].selected != results["joe-again"].selected
    assert max(results["joe"].similarity, results["joe-again"].similarity) > 0.8


def test_filterbank_tone_peaks_in_its_band() -> None:
    """The largest feature of a tone is the band of its frequency on Kaldi's mel scale."""
    hertz = 1000.0
    samples = (0.1 * np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)).astype(np.float32)
    features = filterbank(samples)
    assert features.shape == (98, 80)  # windows of 25 ms every 10 ms, no padding
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    centres = np.linspace(mel(20), mel(8000), 82)[1:-1]
    assert features.mean(0).argmax() == np.abs(centres - mel(hertz)).argmin()


def test_wespeaker_library_without_model_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libmoonshine.so"
    library.write_bytes(b"\0\0\0\0ORTM but no model")
    monkeypatch.setattr(wespeaker, "_library", lambda: library)
    with pytest.raises(ImportError, match="holds no WeSpeaker model.*speaker_encoder=resemblyzer"):
        WeSpeaker()
    with pytest.raises(ImportError, match="no WeSpeaker model"):
        load_speaker_encoder("wespeaker")
