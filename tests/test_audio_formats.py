"""Audio formats: decoded again, the samples are the same, whole or in chunks."""

import io

import av
import numpy as np
import pytest
import soundfile

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.serve.web.audio_formats import AUDIO_FORMATS, AudioEncoder, AudioFormat, encode_audio


def sweep(seconds: float = 2.0) -> Wave:
    """A tone that rises from 200 to 1000 Hz."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * (200 + 400 * time / seconds) * time)).astype(np.float32)


def decode(data: bytes, format: AudioFormat) -> Wave:
    """Samples of a file at 24 kHz, by ffmpeg."""
    if format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32767
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(data)) as container:
        frames = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def best_match(decoded: Wave, wave: Wave) -> float:
    """Highest correlation of two waves over a shift of up to a tenth of a second."""
    size = min(len(decoded), len(wave)) - 4800
    middle = wave[2400 : 2400 + size]
    correlations = [
        np.corrcoef(decoded[shift : shift + size], middle)[0, 1]
        for shift in range(0, len(decoded) - size, 2)
    ]
    return float(max(correlations))


@pytest.mark.parametrize("format", AUDIO_FORMATS)
def test_encode_audio_keeps_the_samples(format: AudioFormat) -> None:
    wave = sweep()
    decoded = decode(encode_audio(wave, format), format)
    assert abs(len(decoded) - len(wave)) < 0.1 * SAMPLE_RATE
    assert best_match(decoded, wave) > 0.98


@pytest.mark.parametrize("format", AUDIO_FORMATS)
@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_audio_encoder_in_chunks_equals_encode_audio(format: AudioFormat, speed: float) -> None:
    wave = sweep()
    encoder = AudioEncoder(format, speed)
    parts = [encoder.add(wave[start : start + 3001]) for start in range(0, len(wave), 3001)]
    assert any(parts[: len(parts) // 2]), "no bytes before the second half"
    data = b"".join([*parts, encoder.finish()])
    reference = decode(encode_audio(wave, format, speed), format)
    decoded = decode(data, format)
    if format == "mp3":  # only a complete file states the encoder's delay, which decoders cut off
        assert abs(len(decoded) - len(reference)) < 0.1 * SAMPLE_RATE
        assert best_match(decoded, reference) > 0.98
        return
    assert len(decoded) == len(reference)
    size = min(len(decoded), len(reference))
    np.testing.assert_allclose(decoded[:size], reference[:size], atol=0.02)


def test_encode_audio_writes_the_length_to_the_header() -> None:
    wave = sweep(1.0)
    file = soundfile.info(io.BytesIO(encode_audio(wave, "wav")))
    assert (file.frames, file.samplerate, file.subtype) == (SAMPLE_RATE, SAMPLE_RATE, "PCM_16")
    file = soundfile.info(io.BytesIO(encode_audio(wave, "flac")))
    assert file.frames == SAMPLE_RATE


@pytest.mark.parametrize("speed", [0.25, 0.8, 4.0])
def test_speed_changes_the_duration_and_keeps_the_pitch(speed: float) -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = (0.5 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    decoded = decode(encode_audio(tone, "wav", speed), "wav")
    assert abs(len(decoded) * speed / len(tone) - 1) < 0.1
    pitch = np.abs(np.fft.rfft(decoded)).argmax() * SAMPLE_RATE / len(decoded)
    assert abs(pitch - 300) < 10


def test_no_samples_are_an_empty_pcm_file() -> None:
    assert encode_audio(np.zeros(0, np.float32), "pcm") == b""
    assert AudioEncoder("pcm").finish() == b""
