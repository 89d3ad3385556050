"""The corpus: a plan, engines that speak, and a job that goes on where it stopped."""

from collections.abc import Iterator
from pathlib import Path

import av
import clusters
import numpy as np
import pytest
import soundfile

from valle.jobs import voices
from valle.jobs.corpus import SENTENCES, CorpusRecipe, Source, make, plan
from valle.jobs.judges.quality import DistillMos
from valle.jobs.judges.recogniser import Whisper, word_error_rate
from valle.jobs.voices import Asterisk, Espeak, Joe, Kokoro, asterisk_prompts, trim
from valle.platform import recipe
from valle.platform.audio import AudioError

ESPEAK = Source(engine="espeak", voices=("f2", "m3"), utterances=4)


def test_plan_is_a_function_of_the_recipe() -> None:
    chosen = CorpusRecipe(out="x", sources=(ESPEAK,), seed=3)
    lines = plan(chosen)
    assert lines == plan(chosen)
    assert [(line.speaker, line.id) for line in lines[:2]] == [
        ("espeak-f2", "00000"), ("espeak-f2", "00001"),
    ]  # fmt: skip
    assert len({line.text for line in lines}) == 8
    assert plan(CorpusRecipe(out="x", sources=(ESPEAK,), seed=4)) != lines
    known = set((SENTENCES / "en.txt").read_text().splitlines())
    assert {line.text for line in lines} <= known


def test_more_utterances_than_sentences_make_longer_lines() -> None:
    count = len((SENTENCES / "fr.txt").read_text().splitlines())
    source = Source(engine="espeak", language="fr", voices=("f2",), utterances=count + 5)
    texts = [line.text for line in plan(CorpusRecipe(out="x", sources=(source,)))]
    assert len(set(texts)) == count + 5


def test_bad_sources_name_the_field() -> None:
    with pytest.raises(ValueError, match="engine: 'siri' is none of"):
        Source(engine="siri")
    with pytest.raises(ValueError, match="utterances: joe needs a number above 0"):
        Source(engine="joe")
    with pytest.raises(recipe.RecipeError, match="sentences: no list 'ja'; known: de, en"):
        plan(CorpusRecipe(out="x", sources=(Source(engine="joe", language="ja", utterances=1),)))


@pytest.mark.parametrize("name", sorted(path.stem for path in SENTENCES.glob("*.txt")))
def test_sentence_lists_are_clean(name: str) -> None:
    lines = (SENTENCES / f"{name}.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 50
    for line in lines:
        assert 3 <= len(line.split()) <= 27 and line == line.strip()
        assert not any(c.isdigit() for c in line)


def test_trim_keeps_a_short_rest_and_refuses_silence() -> None:
    wave = np.zeros(24_000, np.float32)
    wave[10_000:12_000] = 1.5
    cut = trim(wave)
    assert len(cut) == pytest.approx(2_000 + 2 * 1_200, abs=2)
    assert np.abs(cut).max() == pytest.approx(0.99)
    with pytest.raises(AudioError, match="nothing but silence"):
        trim(np.zeros(100, np.float32))


def test_espeak_voices_differ() -> None:
    engine = Espeak()
    said = [engine.speak("hello there", voice, "en-us") for voice in ("f2", "m3", "f2")]
    assert len(said[0]) == len(said[2])  # espeak's oscillators do not restart: lengths do
    assert len(said[0]) != len(said[1]) or not np.allclose(said[0], said[1])
    with pytest.raises(ValueError, match="espeak has no voice xx"):
        engine.speak("hello", "f2", "xx")


@pytest.mark.slow
def test_natural_voices_are_understood() -> None:
    """An independent recogniser reads what Joe and a Kokoro mix were asked to say."""
    text = "The weather will be warm and sunny again tomorrow afternoon."
    whisper, mos = Whisper(), DistillMos()
    for engine, voice in ((Joe(), "joe"), (Kokoro(), "mix-1")):
        wave = engine.speak(text, voice, "en-us")
        assert word_error_rate([text], [whisper.transcribe(wave)]) <= 0.2
        noise = np.random.default_rng(0).normal(0, 0.1, len(wave)).astype(np.float32)
        assert mos.score(wave) > mos.score(noise) + 1


def test_asterisk_recordings_and_transcripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of Debian's packages, with a recording encoded here."""
    import gzip

    folder = tmp_path / "it_IT_m_Carlo"
    folder.mkdir()
    samples = (8_000 * np.sin(np.arange(32_000) * 0.2)).astype(np.int16)
    with av.open(str(folder / "hello.g722"), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    listing = tmp_path / "core-sounds-it.txt.gz"
    lines = "\ufeff; comment\nhello: Ciao.\nbeep: [a beep]\nmissing: Dove?\nsilence/1: Uno\n"
    listing.write_bytes(gzip.compress(lines.encode()))
    monkeypatch.setattr(voices, "_ASTERISK", tmp_path)
    monkeypatch.setattr(voices, "_transcripts", lambda base: listing)
    asterisk_prompts.cache_clear()
    found = asterisk_prompts("it")
    assert {name: r.text for name, r in found.items()} == {"hello": "Ciao."}
    wave = Asterisk().speak("Ciao.", "hello", "it")
    assert len(wave) == pytest.approx(48_000, rel=0.02)
    assert np.abs(wave).max() > 0.1
    asterisk_prompts.cache_clear()


@pytest.fixture
def ray_cluster(home: Path) -> Iterator[None]:
    with clusters.embedded():
        yield


@pytest.mark.ray
def test_corpus_is_made_once_and_one_bad_voice_does_not_stop_it(
    ray_cluster: None, home: Path
) -> None:
    bad = Source(engine="espeak", language="en-nowhere", voices=("f2",), utterances=1)
    chosen = CorpusRecipe(out="corpus", sources=(ESPEAK, bad), workers=2)
    report = make(chosen)
    assert (report["made"], report["already_there"]) == (8, 0)
    (reject,) = report["rejected"]  # type: ignore[misc]
    assert reject["reason"] == "ValueError: espeak has no voice en-nowhere+f2"
    wave, rate = soundfile.read(home / "corpus/espeak-f2/00000.wav")
    assert rate == 24_000 and len(wave) > 12_000
    assert (home / "corpus/espeak-f2/00000.txt").read_text().strip()
    assert "| espeak-f2 | espeak-ng" in (home / "corpus/LICENCES.md").read_text()

    (home / "corpus/espeak-m3/00002.wav").unlink()  # as if the first run had been killed
    again = make(chosen)
    assert (again["made"], again["already_there"]) == (1, 8)
