"""The formats an answer can have: what was said comes out, whole or in pieces."""

import io

import av
import numpy as np
import pytest
import soundfile

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.serve.web.audio import FORMATS, Encoder, Format, encode


def sweep(seconds: float = 2.0) -> Wave:
    """A tone that rises from 200 to 1000 Hz."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * (200 + 400 * time / seconds) * time)).astype(np.float32)


def decode(data: bytes, format: Format) -> Wave:
    """By ffmpeg, at 24 kHz."""
    if format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32767
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(data)) as container:
        frames = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def best_match(heard: Wave, said: Wave) -> float:
    """Highest correlation of two waves over a shift of up to a tenth of a second."""
    size = min(len(heard), len(said)) - 4800
    middle = said[2400 : 2400 + size]
    found = [
        np.corrcoef(heard[shift : shift + size], middle)[0, 1]
        for shift in range(0, len(heard) - size, 2)
    ]
    return float(max(found))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_encoded_is_heard(format: Format) -> None:
    said = sweep()
    heard = decode(encode(said, format), format)
    assert abs(len(heard) - len(said)) < 0.1 * SAMPLE_RATE
    assert best_match(heard, said) > 0.98


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_pieces_sound_like_the_whole(format: Format, speed: float) -> None:
    said = sweep()
    encoder = Encoder(format, speed)
    parts = [encoder.add(said[start : start + 3001]) for start in range(0, len(said), 3001)]
    assert any(parts[: len(parts) // 2]), "nothing left before half was said"
    data = b"".join([*parts, encoder.finish()])
    whole = decode(encode(said, format, speed), format)
    heard = decode(data, format)
    if format == "mp3":  # only a whole file can say where the encoder's own delay ends
        assert abs(len(heard) - len(whole)) < 0.1 * SAMPLE_RATE
        assert best_match(heard, whole) > 0.98
        return
    assert len(heard) == len(whole)
    size = min(len(heard), len(whole))
    np.testing.assert_allclose(heard[:size], whole[:size], atol=0.02)


def test_a_whole_wav_says_how_long_it_is() -> None:
    said = sweep(1.0)
    file = soundfile.info(io.BytesIO(encode(said, "wav")))
    assert (file.frames, file.samplerate, file.subtype) == (SAMPLE_RATE, SAMPLE_RATE, "PCM_16")
    file = soundfile.info(io.BytesIO(encode(said, "flac")))
    assert file.frames == SAMPLE_RATE


@pytest.mark.parametrize("speed", [0.25, 0.8, 4.0])
def test_speed_changes_the_length_and_not_the_pitch(speed: float) -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = (0.5 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    heard = decode(encode(tone, "wav", speed), "wav")
    assert abs(len(heard) * speed / len(tone) - 1) < 0.1
    loudest = np.abs(np.fft.rfft(heard)).argmax() * SAMPLE_RATE / len(heard)
    assert abs(loudest - 300) < 10


def test_nothing_said_is_an_empty_file() -> None:
    assert encode(np.zeros(0, np.float32), "pcm") == b""
    assert Encoder("pcm").finish() == b""
