"""Reference recordings: what is cut off, what is refused, and that everybody reads them alike."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.deployments import FakeDeployments, recording_codes
from helpers.recordings import speech

from valle.jobs.speak import read_reference
from valle.model.codec.interface import Wave
from valle.model.tokens import HOP, SAMPLE_RATE
from valle.platform import audio
from valle.platform.audio import AudioError, wav_bytes
from valle.platform.reference import ReferenceReader
from valle.serve.deployments.interface import PROMPT_FRAMES
from valle.serve.web.callers import Caller
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.voices import VoiceStore

SPEECH = speech(4)
ANYBODY = Caller()


READER = ReferenceReader()
"""Loads its detector once."""


def silence(seconds: float) -> Wave:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def float_wav(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def hum(seconds: float) -> Wave:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.003 * np.sin(2 * np.pi * 50 * time)).astype(np.float32)


REFUSED: dict[str, tuple[bytes, str]] = {
    "silence": (wav_bytes(silence(5)), "nothing but silence"),
    "hum": (wav_bytes(hum(5)), "0% of it is speech"),
    "noise": (
        wav_bytes(np.random.default_rng(0).normal(0, 0.1, 72_000).astype(np.float32)),
        "0% of it is speech",
    ),
    "mostly silence": (
        wav_bytes(np.concatenate([SPEECH[:12_000], silence(6), SPEECH[:12_000]])),
        "of it is speech, at least 40% has to be",
    ),
    "too little": (
        wav_bytes(np.concatenate([silence(3), SPEECH[:12_000], silence(3)])),
        "too short",
    ),
    "too long": (wav_bytes(np.tile(SPEECH, 16)), "too long: more than 60 s"),
    "too quiet": (wav_bytes(SPEECH * 0.02), "too quiet: -"),
    "integers as floats": (
        float_wav(SPEECH * 32767),
        "too loud: samples reach .*32768 for 16 bits",
    ),
    "clipped": (wav_bytes(np.clip(SPEECH * 20, -1, 1)), "clipped: .*record it again"),
    "clipped floats": (float_wav(np.clip(SPEECH * 20, -3, 3)), "clipped: .*record it again"),
    "NaN": (float_wav(np.where(np.arange(96_000) == 7, np.nan, SPEECH)), "NaN"),
    "nine channels": (float_wav(np.tile(SPEECH[:, None], 9)), "9 channels, limit 8: mix them"),
    "other rate": (float_wav(SPEECH, 384_000), "384000 Hz; 4000 to 192000 Hz can be read"),
    "no sound": (b"%PDF-1.7 and so on", "not a format that is read"),
}

ACCEPTED: dict[str, bytes] = {
    "as it is": wav_bytes(SPEECH),
    "late": wav_bytes(np.concatenate([silence(4), SPEECH])),
    "late, over a hum": wav_bytes(np.concatenate([hum(4), SPEECH, hum(3)])),
    "beyond full scale": float_wav(SPEECH * 6),
    "eight channels": float_wav(np.tile(SPEECH[:, None], 8)),
    "quiet": wav_bytes(SPEECH * 0.1),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VoiceStore:
    return VoiceStore(str(tmp_path_factory.mktemp("voices")))


def read_by_command_line(data: bytes, folder: Path) -> Wave:
    (folder / "sound").write_bytes(data)
    return read_reference(str(folder / "sound"), 3.0)


@pytest.mark.parametrize("name", REFUSED)
def test_reference_is_refused_with_the_same_reason_everywhere(
    name: str, store: VoiceStore, tmp_path: Path
) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(AudioError, match=reason) as refused:
        READER.read(data)
    with pytest.raises(AudioError, match=re.escape(str(refused.value))):
        store.validate_recording("ann", data, Caller())
    with pytest.raises(ValueError, match=re.escape(f"sound: {refused.value}")):
        read_by_command_line(data, tmp_path)


@pytest.mark.parametrize("name", ACCEPTED)
def test_reference_is_the_same_speech_everywhere(
    name: str, store: VoiceStore, tmp_path: Path
) -> None:
    wave = READER.read(ACCEPTED[name])
    assert len(wave) / SAMPLE_RATE == pytest.approx(4, abs=0.35)
    assert np.abs(wave[: SAMPLE_RATE // 2]).max() > 0.02 and np.abs(wave).max() <= 1
    assert np.array_equal(read_by_command_line(ACCEPTED[name], tmp_path), wave)
    uploaded = store.validate_recording("ann", ACCEPTED[name], Caller())
    assert len(uploaded) == len(wave) and np.abs(uploaded - wave).max() < 1e-4
    assert np.array_equal(READER.read(wav_bytes(uploaded)), uploaded)  # cut once


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name",
    ["silence", "clipped", "integers as floats", "nine channels", "late", "beyond full scale"],
)
async def test_requests_read_voices_and_inline_recordings_alike(name: str, tmp_path: Path) -> None:
    """A file put into the folder of voices by hand, and the same bytes as `ref_audio`."""
    data = REFUSED[name][0] if name in REFUSED else ACCEPTED[name]
    (tmp_path / "ann.wav").write_bytes(data)
    inline = base64.b64encode(data).decode()
    for fields in ({"voice": "ann"}, {"ref_audio": inline}):
        [param] = fields
        request = SpeechRequest.model_construct(
            input="x", **{"voice": "", "ref_audio": None} | fields
        )
        prompts = PromptEncoder(VoiceStore(str(tmp_path)), FakeDeployments())
        if name in REFUSED:
            with pytest.raises(ApiError, match=REFUSED[name][1]) as refused:
                await prompts.for_request(request, "one", Caller())
            assert (refused.value.status, refused.value.detail.param) == (400, param)
        else:
            codes = await prompts.for_request(request, "one", Caller())
            expected = recording_codes(READER.read(data)[: PROMPT_FRAMES * HOP])
            assert (codes == expected).all()


def test_clipped_fraction_counts_flat_tops_only() -> None:
    time = np.arange(48_000) / SAMPLE_RATE
    for hertz in (60, 200, 1_000):
        sine = np.sin(2 * np.pi * hertz * time).astype(np.float32)
        assert audio.clipped_fraction(sine) < 0.01
        assert audio.clipped_fraction(0.5 * np.clip(2 * sine, -1, 1)) == 0  # not at full scale
        assert audio.clipped_fraction(np.clip(2 * sine, -1, 1)) == pytest.approx(2 / 3, abs=0.1)
    # 16-bit integers reach -32768, but only 32767
    integers = np.clip(np.sin(2 * np.pi * 200 * time) * 65_536, -32_768, 32_767) / 32_768
    assert audio.clipped_fraction(integers.astype(np.float32)) == pytest.approx(2 / 3, abs=0.1)
    assert audio.clipped_fraction(np.zeros(0, np.float32)) == 0


def test_read_scales_levels_beyond_full_scale_and_leaves_others() -> None:
    for factor in (1.0, 0.2):
        wave = audio.read(float_wav(SPEECH * factor), max_seconds=10)
        assert np.array_equal(wave, SPEECH * np.float32(factor))
    loud = audio.read(float_wav(SPEECH * 6), max_seconds=10)
    assert np.abs(loud).max() == 1 and np.allclose(loud, SPEECH * 2, atol=1e-6)
    with pytest.raises(AudioError, match="too loud"):
        audio.read(float_wav(SPEECH * 33), max_seconds=10)
