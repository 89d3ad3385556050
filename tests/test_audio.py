"""Sound files: formats, sample rates, and files that are refused."""

import io

import numpy as np
import pytest
import soundfile
from helpers.recordings import speech

from valle.platform import audio, decoding


def sound(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3"])
def test_read_gives_24_khz_mono(format: str) -> None:
    time = np.arange(48_000) / 48_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    stereo = np.stack([tone, np.zeros_like(tone)], axis=1)
    wave = audio.read(sound(stereo, 48_000, format), max_seconds=5)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(24_000, abs=1_500 if format == "MP3" else 1)
    assert np.abs(wave).max() == pytest.approx(0.25, abs=0.02)
    spectrum = np.abs(np.fft.rfft(wave[:24_000], 24_000))
    assert int(spectrum.argmax()) == 440


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable audio"),
        (b"RIFFgarbage", "unreadable audio"),
        (sound(np.zeros((0, 1)), 24_000, "WAV"), "empty audio"),
        (sound(np.zeros(24_000 * 4), 24_000, "FLAC"), "too long: more than 3 s, limit 3 s"),
        (sound(np.full(2400, np.nan), 24_000, "WAV", "FLOAT"), "NaN or infinite"),
    ],
)
def test_read_gives_the_reason_for_bad_audio(data: bytes, reason: str) -> None:
    with pytest.raises(audio.AudioError, match=reason):
        audio.read(data, max_seconds=3)


def test_rms_dbfs_of_a_full_scale_sine() -> None:
    wave = np.sin(np.linspace(0, 2000 * np.pi, 24_000)).astype(np.float32)
    assert audio.rms_dbfs(wave) == pytest.approx(-3.0, abs=0.1)


def test_trim_cuts_silence_to_a_margin() -> None:
    wave = np.zeros(24_000, np.float32)
    wave[8_000:12_000] = 2.0
    trimmed = audio.trim(wave, margin_seconds=0.05)
    assert abs(len(trimmed) - (4_000 + 2 * 1_200)) <= 1
    assert trimmed.max() == pytest.approx(0.99)
    with pytest.raises(audio.AudioError, match="nothing but silence"):
        audio.trim(np.zeros(100, np.float32))


def test_flac_bytes_hold_a_comment_of_any_length() -> None:
    comment = "x" * 100_000
    assert decoding.read_comment(audio.flac_bytes(np.zeros(100, np.float32), comment)) == comment


def test_read_alters_a_recording_to_learn_from_in_no_other_way() -> None:
    """What `prepare` reads: silence stays, and what is wrong is refused."""
    speech_wave = speech(1)
    late = np.concatenate([np.zeros(48_000, np.float32), speech_wave])
    limits = {"max_seconds": 5, "max_clipped": audio.MAX_CLIPPED}
    wave = audio.read(sound(late, 24_000, "WAV", "FLOAT"), **limits)
    assert np.array_equal(wave, late)
    for samples, reason in (
        (speech_wave * 32_767, "too loud"),
        (np.clip(speech_wave * 20, -1, 1), "clipped"),
    ):
        with pytest.raises(audio.AudioError, match=reason):
            audio.read(sound(samples, 24_000, "WAV", "FLOAT"), **limits)
    # to look at, a clipped recording is fine
    audio.read(sound(np.clip(speech_wave * 20, -1, 1), 24_000, "WAV"), max_seconds=5)
