"""Voices for an endpoint that has none."""

from pathlib import Path

from valle.jobs.starter_voices import make_starter_voices
from valle.platform import audio, storage


def test_make_starter_voices_writes_two_recordings_once(home: Path) -> None:
    folder = str(home / "fresh")
    make_starter_voices(folder)
    assert sorted(storage.list_files(folder, (".wav",))) == ["heart.wav", "joe.wav"]
    wave = audio.read(storage.read_bytes(storage.join(folder, "joe.wav")), max_seconds=60)
    assert 3 < len(wave) / 24_000 < 8
    (home / "fresh/joe.wav").unlink()
    make_starter_voices(folder)
    assert list(storage.list_files(folder, (".wav",))) == ["heart.wav"]
