"""The command `valle speak`, on untrained models."""

from pathlib import Path

import numpy as np
import pytest
from helpers.recordings import speech

from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.speak import main, read_reference
from valle.model.sentences import PAUSE
from valle.platform import audio


@pytest.mark.usefixtures("database")
def test_main_writes_the_same_speech_for_the_same_seed(
    publish_recipe: PublishRecipe, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(publish_recipe)
    arguments = ["hello there", str(home / "voices/ann.wav")]
    for name in ("one.wav", "two.wav"):
        assert main([*arguments, str(home / name), "--max-ar-steps", "40"]) == 0
    assert (home / "one.wav").read_bytes() == (home / "two.wav").read_bytes()
    by_path = [
        "--ar-ckpt", str(home / "runs/test-ar/step_00000020"),
        "--nar-ckpt", str(home / "runs/test-nar/step_00000020"), "--codec", publish_recipe.codec,
    ]  # fmt: skip
    assert main([*arguments, str(home / "three.wav"), "--max-ar-steps", "40", *by_path]) == 0
    assert (home / "three.wav").read_bytes() == (home / "one.wav").read_bytes()
    assert "s of speech" in capsys.readouterr().out
    several = [arguments[0], f"{arguments[1]};{arguments[1]}", str(home / "four.wav")]
    assert main([*several, "--max-ar-steps", "40"]) == 0
    assert (home / "four.wav").read_bytes() != (home / "one.wav").read_bytes()
    for wrong in (["...", arguments[1]], ["hello", f"{arguments[1]};{home / 'none.wav'}"]):
        assert main([*wrong, str(home / "x.wav")]) == 2
    assert "text: nothing to say in it" in capsys.readouterr().err


def test_read_reference_gives_each_recording_an_equal_share(tmp_path: Path) -> None:
    """A tenth of a second of each recording, where the first alone would have filled it."""
    for seed in (0, 1):
        (tmp_path / f"{seed}.wav").write_bytes(audio.wav_bytes(speech(1.5, seed)))
    wave = read_reference(f"{tmp_path / '0.wav'};{tmp_path / '1.wav'}", 0.2)
    assert len(wave) == 4_800
    for part, seed in ((wave[:2_400], 0), (wave[2_400:], 1)):
        assert np.abs(part - speech(1.5, seed)[:2_400]).max() < 1e-4
    assert len(read_reference(str(tmp_path / "0.wav"), 0.2)) == 36_000
    (tmp_path / "silence.wav").write_bytes(audio.wav_bytes(np.zeros(48_000, np.float32)))
    with pytest.raises(ValueError, match="silence.wav: nothing but silence"):
        read_reference(f"{tmp_path / '0.wav'};{tmp_path / 'silence.wav'}", 0.2)


def test_main_splits_long_text_as_the_endpoint_does(
    publish_recipe: PublishRecipe, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One wave of both sentences, with a pause between them, each with its own seed."""
    publish(publish_recipe)
    voice = home / "voices/ann.wav"
    options = ["--max-ar-steps", "100"]  # time for each of the two, so that none is split
    text = "Hello there. Good bye."
    assert main([text, str(voice), str(home / "both.wav"), *options]) == 0
    assert "s of speech" in capsys.readouterr().out
    parts = []
    for seed, sentence in enumerate(text.split(". ")):
        path = home / f"{seed}.wav"
        sentence = f"{sentence.removesuffix('.')}."
        assert main([sentence, str(voice), str(path), "--seed", str(seed), *options]) == 0
        parts += [PAUSE, audio.read(path.read_bytes(), max_seconds=60)]
    both = audio.read((home / "both.wav").read_bytes(), max_seconds=60)
    np.testing.assert_allclose(both, np.concatenate(parts[1:]), atol=1e-4)
    assert main([text, str(voice), str(home / "both.mp3"), *options]) == 0
    assert (home / "both.mp3").read_bytes()[:4] != b"RIFF"
    assert len(audio.read((home / "both.mp3").read_bytes(), max_seconds=60)) > len(both) / 2


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("none/x.wav", "there is no folder"), ("x.txt", "suffix '.txt'"), ("x", "suffix ''"),
        ("folder.wav", "is a folder"),
    ],
)  # fmt: skip
def test_main_checks_the_output_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, reason: str
) -> None:
    """The recording does not exist: it is not looked for."""
    (tmp_path / "folder.wav").mkdir()
    assert main(["Hello.", str(tmp_path / "none.wav"), str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith("error: out: ") and error.count("\n") == 1
