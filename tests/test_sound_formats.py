"""Sound files of every format: their length, whatever a header says, and what is refused."""

import io
import struct
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import soundfile
from helpers.recordings import speech
from helpers.sound_files import WRITERS, ffmpeg_writer, set_lengths
from hypothesis import given
from hypothesis import strategies as st

from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, decoding, sound_formats
from valle.platform.decoder_pool import DecoderPool
from valle.serve.web.audio_formats import encode_audio

SECONDS = 3.0
WAVE = speech(SECONDS)
LENGTHS = (0, 200, 10**7, 2**32 - 1, 2**63 - 1, 2**64 - 1)
"""Absent, too short, too long and placeholders, as headers state them, in bytes or samples."""
LOSSY = ("mp3", "ogg", "m4a", "mp4", "webm", "mkv", "aac", "amr", "3gp", "wma", "g721", "g723")
NEEDS_ITS_END = ("m4a", "m4a alac", "mp4 video", "mov", "3gp")
"""Formats whose index comes last: half a file is nothing."""


def seconds(data: bytes) -> float:
    return len(audio.read(data, max_seconds=30)) / SAMPLE_RATE


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: write(WAVE) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_read_finds_the_length_of_every_format(files: dict[str, bytes], name: str) -> None:
    data = files[name]
    wave = audio.read(data, max_seconds=30)
    # lossy and block formats add up to some frames of theirs
    tolerance = (
        0.1 if any(word in name for word in LOSSY) or "adpcm" in name or "gsm" in name else 0.02
    )
    assert len(wave) / SAMPLE_RATE == pytest.approx(SECONDS, abs=tolerance)
    # it is the recording and not something of that length
    assert 0.1 < np.abs(wave).max() <= 1.05
    level = audio.rms_dbfs(WAVE)
    assert audio.rms_dbfs(wave[:24_000]) == pytest.approx(level, abs=4)
    for value in LENGTHS:
        stated = set_lengths(data, value)
        if stated != data:
            assert seconds(stated) == pytest.approx(len(wave) / SAMPLE_RATE, abs=0.02), value


@pytest.mark.parametrize("name", WRITERS)
def test_read_takes_what_there_is_of_a_file_that_is_cut_off(
    files: dict[str, bytes], name: str
) -> None:
    data = files[name]
    half = data[: len(data) * 55 // 100]
    if name in NEEDS_ITS_END:
        with pytest.raises(audio.AudioError, match="convert it with `ffmpeg"):
            seconds(half)
    elif name in ("wma", "ogg flac", "ogg opus", "ogg vorbis"):
        # what is whole of a few large packets or pages: there may be none
        with suppress(audio.AudioError):
            assert seconds(half) < 0.7 * SECONDS
    else:
        assert 0.2 * SECONDS < seconds(half) < 0.7 * SECONDS
    for length in (1, 3, 10):
        with pytest.raises(audio.AudioError):
            seconds(data[:length])


@pytest.mark.parametrize("name", WRITERS)
def test_read_ignores_what_follows_a_file(files: dict[str, bytes], name: str) -> None:
    data = files[name]
    garbage = np.random.default_rng(0).bytes(1_000)
    if "amr" in name:  # frames without any structure around them: what follows is damage
        with pytest.raises(audio.AudioError, match="damaged or unusual amr file"):
            seconds(data + garbage)
        return
    # formats without a length, or whose length is not believed, may end in a moment of noise
    assert seconds(data) - 0.02 <= seconds(data + garbage) <= seconds(data) + 0.5


@pytest.mark.parametrize("name", WRITERS)
def test_read_refuses_or_reads_hardly_any_samples(name: str) -> None:
    for count in (0, 1, 24):
        try:
            data = WRITERS[name](WAVE[:count])
        except Exception:  # the encoder takes no such file
            continue
        try:
            assert seconds(data) < 0.2
        except audio.AudioError as error:
            assert "0 samples" in str(error) or "unreadable audio" in str(error)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24"])
def test_read_of_formats_that_cannot_seek_holds_no_other_memory(subtype: str) -> None:
    """The decoder has no way to know the length; what it leaves unwritten is not ours to keep."""
    for duration in (0.5, 3.0):
        buffer = io.BytesIO()
        samples = np.sin(np.arange(int(8_000 * duration)) / 5) / 2
        soundfile.write(buffer, samples, 8_000, format="WAV", subtype=subtype)
        waves = []
        for seed in range(6):
            noise = [np.random.default_rng(seed).normal(0, 50, 65_536) for _ in range(20)]
            del noise  # freed memory full of large numbers
            waves.append(audio.read(buffer.getvalue(), max_seconds=30))
        assert all(np.array_equal(wave, waves[0]) for wave in waves)
        assert duration <= len(waves[0]) / SAMPLE_RATE < duration + 0.04  # the last block is padded
        if subtype == "GSM610":  # 320 samples in a block
            assert len(waves[0]) == -(-len(samples) // 320) * 320 * 3
        assert np.abs(waves[0]).max() < 0.6


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus", "aac"])
def test_read_takes_the_answers_of_the_endpoint(format: str) -> None:
    data = encode_audio(speech(6), format)  # type: ignore[arg-type]  # one of its formats
    assert seconds(data) == pytest.approx(6, abs=0.1)
    for tenths in (3, 5, 8):
        assert seconds(data[: len(data) * tenths // 10]) == pytest.approx(tenths * 0.6, abs=1.1)


def test_read_keeps_to_the_frames_of_an_mp3_with_a_wrong_count() -> None:
    data = bytearray(WRITERS["mp3"](WAVE))
    at = data.index(b"Xing")
    for count in (0, 3, 10**6, 2**32 - 1):
        struct.pack_into(">I", data, at + 8, count)
        assert seconds(bytes(data)) == pytest.approx(SECONDS, abs=0.06)


@pytest.mark.parametrize("length", [4, 5, 8, 11])
def test_read_refuses_an_mp3_that_ends_in_its_header(length: int) -> None:
    data = WRITERS["mp3"](WAVE)
    with pytest.raises(audio.AudioError, match="damaged or unusual mp3 file"):
        seconds(data[: data.index(b"Xing") + length])


@pytest.mark.parametrize("name", ["ogg vorbis", "ogg opus", "ogg flac"])
def test_read_takes_all_streams_of_a_joined_ogg_file(files: dict[str, bytes], name: str) -> None:
    data = files[name]
    assert not sound_formats.is_chained_ogg(data)
    assert seconds(data + data) == pytest.approx(2 * SECONDS, abs=0.1)
    other = WRITERS["ogg opus" if "vorbis" in name else "ogg vorbis"](WAVE)
    with pytest.raises(audio.AudioError, match="damaged or unusual ogg file"):
        seconds(data + other)


@pytest.mark.parametrize("container", ["amr", "3gp"])
def test_read_takes_the_silent_frames_of_telephones(container: str) -> None:
    """Pauses of a recording with DTX are frames without sound."""
    wave = np.concatenate([WAVE, np.zeros(3 * SAMPLE_RATE, np.float32), WAVE])
    write = ffmpeg_writer(container, "libopencore_amrnb", 8_000, codec_options={"dtx": "1"})
    assert seconds(write(wave)) == pytest.approx(9, abs=0.1)
    if container == "amr":  # there are such frames
        assert len(write(wave)) < 0.8 * len(WRITERS["amr"](wave))
    assert seconds(b"#!AMR-WB\n" + b"\x7c" * 100) == pytest.approx(2)


def test_read_refuses_a_file_most_of_which_is_damage() -> None:
    """FFmpeg's muxer writes such files, and its decoder reads the first of their packets only."""
    with pytest.raises(audio.AudioError, match="damaged or unusual wav file"):
        seconds(ffmpeg_writer("wav", "aac", 24_000)(WAVE))


def test_read_keeps_chunks_out_of_the_samples() -> None:
    """Chunks before and behind the samples, an odd length and its padding."""
    data = WRITERS["wav 16 bit"](WAVE[:24_000])
    tags = b"LIST" + struct.pack("<I", 8) + b"INFOabcd"
    at = data.index(b"data")
    for changed in (data + tags, data[:at] + tags + data[at:], data + tags + tags):
        file = bytearray(changed)
        for length in (len(file) - 8, 0, 2**32 - 1):
            struct.pack_into("<I", file, 4, length)
            assert seconds(bytes(file)) == 1.0
    odd = bytearray(WRITERS["wav 8 bit"](WAVE[:24_001]))
    assert len(audio.read(bytes(odd + tags), max_seconds=30)) == 24_001
    empty = bytearray(WRITERS["wav 16 bit"](WAVE[:0])) + tags
    with pytest.raises(audio.AudioError, match="0 samples"):
        seconds(bytes(empty))


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        b"[Script Info]\n",
        b"1\n00:00:01,000 --> 00:00:02,000\nhello\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x10\0\0\0AVI LIST",
        b"PK\x03\x04",
        b"%PDF-1.7",
        b"<html>",
        b"MThd\0\0\0\x06",
        bytes(1_000),
        b"\xff" * 1_000,
        b"FORM\0\0\0\x108SVX",
        b"ID3\x04\0\0\x7f\x7f\x7f\x7f",
        b"ID3\x04\0\0\0\0\0\0" * 1_000,
        b"\x01\0\0\0\0\0\0\0",
    ],
)
def test_unknown_files_reach_no_decoder(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(*arguments: object) -> None:
        raise AssertionError("a decoder was asked")

    monkeypatch.setattr(decoding, "read_with_ffmpeg", decoder)
    monkeypatch.setattr(decoding, "read_with_libsndfile", decoder)
    with pytest.raises(audio.AudioError) as refused:
        audio.read(data, max_seconds=3)
    message = str(refused.value)
    assert "wav" in message and "m4a/mp4" in message and "`ffmpeg -i FILE out.wav`" in message
    assert "object at" not in message


def test_messages_name_the_format_and_no_object() -> None:
    for name, data in (
        ("wav", b"RIFF\0\0\0\0WAVEjunk"), ("flac", b"fLaC" + bytes(500)), ("ogg", b"OggS" * 99),
        ("m4a/mp4", b"\0\0\0\x18ftypM4A " + bytes(500)), ("wma", sound_formats._ASF + bytes(500)),
        ("webm/mkv", b"\x1a\x45\xdf\xa3" + bytes(500)), ("amr", b"#!AMR\n" + bytes(range(256)) * 3),
    ):  # fmt: skip
        with pytest.raises(audio.AudioError, match=f"unreadable audio: .*{name}") as refused:
            audio.read(data, max_seconds=3)
        assert "object" not in str(refused.value) and "ffmpeg -i FILE" in str(refused.value)


def test_read_refuses_a_video_without_sound() -> None:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        file.mux(stream.encode(image))
        file.mux(stream.encode(None))
    with pytest.raises(audio.AudioError, match="there is no sound in this m4a/mp4 file"):
        audio.read(buffer.getvalue(), max_seconds=3)


@pytest.fixture(scope="module")
def short_files() -> list[bytes]:
    return [write(WAVE[:12_000]) for write in WRITERS.values()]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """A decoder with little time and memory: a library's crash ends it and not the tests."""
    with DecoderPool(time_limit=20, memory_bytes=256 * 2**20) as decoders:
        yield decoders


def _check_message(message: str) -> None:
    """No hang, no Python error in the decoder (status 1), no object."""
    for word in ("too slow", "exit status 1", "object at"):
        assert word not in message, message


PATCHES = st.tuples(
    st.sampled_from([64, 256, 10**9]),  # most often in the header
    st.integers(0, 10**9),
    st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(4), bytes(8), b"\x7f" + b"\xff" * 7])
    | st.binary(min_size=1, max_size=8),
)


@pytest.mark.fuzz
@given(
    st.integers(0, len(WRITERS) - 1),
    st.lists(PATCHES, min_size=1, max_size=4),
    st.none() | st.integers(0, 10**6),
)
def test_read_raises_nothing_but_audio_errors(
    short_files: list[bytes],
    pool: DecoderPool,
    index: int,
    patches: list[tuple[int, int, bytes]],
    cut: int | None,
) -> None:
    """Valid files with bytes overwritten, and cut off."""
    file = bytearray(short_files[index])
    for reach, position, patch in patches:
        at = position % min(reach, len(file))
        file[at : at + len(patch)] = patch
    if cut is not None:
        del file[cut % len(file) :]
    try:
        wave = audio.read(bytes(file), max_seconds=3, decode=pool.decode)
        assert np.isfinite(wave).all() and len(wave) <= 3 * SAMPLE_RATE + 1
    except audio.AudioError as error:
        _check_message(str(error))


@pytest.mark.fuzz
@given(
    st.sampled_from(
        [
            b"",
            b"RIFF\0\0\0\0WAVEfmt ",
            b"fLaC",
            b"OggS\0\x02",
            b"ID3\x04",
            b"\xff\xfb\x90\x44",
            b"\xff\xf1\x58\x40",
            b"\0\0\0\x18ftyp",
            b"\x1a\x45\xdf\xa3",
            b"caff",
            b".snd",
            b"FORM\0\0\0\0AIFF",
            b"#!AMR\n",
            b"NIST_1A\n   1024\n",
            sound_formats._ASF,
        ]
    ),
    st.binary(max_size=2_000),
)
def test_read_of_random_bytes_raises_nothing_but_audio_errors(
    pool: DecoderPool, start: bytes, rest: bytes
) -> None:
    try:
        audio.read(start + rest, max_seconds=3, decode=pool.decode)
    except audio.AudioError as error:
        _check_message(str(error))
