"""Sound files to samples, in this process: libsndfile first, FFmpeg (PyAV) for the rest.

`decoder_pool` runs the same functions in processes of its own, for files that may be hostile. This
module imports neither torch nor the rest of the project, so that those processes are small.
"""

import io
from collections.abc import Iterator

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from valle.platform.sound_formats import (
    CONVERSION_HINT,
    OGG,
    AudioError,
    SoundFormat,
    detect,
    is_chained_ogg,
)
from valle.platform.sound_lengths import repair_lengths

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 192_000
"""Accepted sample rates of a file, in Hz."""
MAX_CHANNELS = 8
"""More channels are no recording of one voice: 7.1 has eight."""
MAX_BYTES = 256 * 2**20
"""Size limit of a file: ten minutes of stereo at 48 kHz as float32 are smaller."""
BLOCK_SAMPLES = 65_536
"""Samples per channel that are decoded at a time."""

Samples = NDArray[np.float32]
"""`[samples]`: mono, at the file's own sample rate."""

_CODECS = frozenset((
    "aac", "aac_latm", "ac3", "adpcm_g722", "adpcm_g726", "adpcm_g726le", "adpcm_ima_qt",
    "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb", "amrwb", "eac3", "flac", "g722", "g726",
    "g726le", "gsm", "gsm_ms",
    "libopencore_amrnb", "libopencore_amrwb", "libopus", "libspeex", "libvorbis", "mp2",
    "mp2float", "mp3", "mp3float", "opus", "pcm_alaw", "pcm_f32be", "pcm_f32le", "pcm_f64be",
    "pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32be",
    "pcm_s32le", "pcm_s8", "pcm_u8", "speex", "vorbis", "wmalossless", "wmapro", "wmav1", "wmav2",
    "wmavoice",
))  # fmt: skip
"""FFmpeg's decoders that are used: those of speech and music, none of pictures."""

_INSTEAD_OF = {"amrnb": "libopencore_amrnb", "amrwb": "libopencore_amrwb"}
"""FFmpeg's own AMR decoders refuse the frames that stand for silence (DTX)."""
_AMR_PADDING = 0x83
"""Bits of an AMR frame's first byte that are 0; the decoders take any."""

_OPTIONS = {
    "codec_whitelist": ",".join(sorted(_CODECS)),
    "protocol_whitelist": "none",  # the bytes alone: a file cannot name another one
    "enable_drefs": "0",
    "max_streams": "32",
}

_NATIVE_ERRORS = (
    soundfile.SoundFileRuntimeError,
    av.FFmpegError,
    ValueError,
    TypeError,
    RuntimeError,
    OverflowError,
    NotImplementedError,
)
"""What the two libraries raise for bytes that they cannot read."""


def decode(data: bytes, max_seconds: float) -> tuple[Samples, int]:
    """The samples of a sound file, mono, and their sample rate.

    No length in a header is trusted: samples are read until there are no more, and at most
    `max_seconds` of them. Raises AudioError for a file that cannot be read or is longer.
    """
    sound_format = detect(data)
    if len(data) > MAX_BYTES:
        raise AudioError(f"too large: {len(data) >> 20} MB, limit {MAX_BYTES >> 20} MB")
    repaired = repair_lengths(data, sound_format)
    # libsndfile stops at the end of the first stream, and says nothing of the others
    first_only = sound_format is OGG and is_chained_ogg(data)
    readers = [read_with_libsndfile] if sound_format.libsndfile and not first_only else []
    readers += [read_with_ffmpeg] if sound_format.ffmpeg else []
    reason: Exception | None = None
    for reader in readers:
        mono = _Mono(max_seconds)
        try:
            for block, rate in reader(repaired, sound_format):
                mono.add(block, rate)
        except AudioError:
            raise
        except _NATIVE_ERRORS as error:  # FFmpeg reads some files that libsndfile refuses
            reason = reason or error
            continue
        if mono.parts:
            return np.concatenate(mono.parts), mono.rate
        if reason is None:
            raise AudioError("empty audio: 0 samples")
    raise AudioError(
        f"unreadable audio: damaged or unusual {sound_format.name} file ({_words(reason)}); "
        f"{CONVERSION_HINT}"
    ) from reason


class _Mono:
    """Blocks mixed to mono, up to a length limit."""

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds, self._count, self.rate = max_seconds, 0, 0
        self.parts: list[Samples] = []

    def add(self, block: NDArray[np.float32], rate: int) -> None:
        """Adds samples `[n, channels]`."""
        if self.rate and rate != self.rate:
            raise AudioError(
                f"its sample rate changes from {self.rate} to {rate} Hz; {CONVERSION_HINT}"
            )
        check_header(rate, block.shape[1])
        self.rate = rate
        self._count += len(block)
        if self._count > self._max_seconds * rate:
            limit = self._max_seconds
            raise AudioError(f"too long: more than {limit:g} s, limit {limit:g} s")
        if len(block):
            self.parts.append(block.mean(axis=1))


def check_header(rate: int, channels: int) -> None:
    """Raises AudioError for a sample rate or a number of channels beyond the limits."""
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"{rate} Hz; {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz can be read: "
            "convert it with `ffmpeg -i FILE -ar 24000 out.wav`"
        )
    if channels > MAX_CHANNELS:
        raise AudioError(
            f"{channels} channels, limit {MAX_CHANNELS}: "
            "mix them with `ffmpeg -i FILE -ac 1 out.wav`"
        )


class _Bytes(io.BytesIO):
    """A file in memory; libsndfile may seek to wherever a header says."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a position inside the file."""
        size = len(self.getbuffer())
        start = (0, self.tell(), size)[whence]
        return super().seek(min(max(start + offset, 0), size))


class _Sequential(soundfile.SoundFile):
    """A sound file that is read from beginning to end: no seek, no count of its frames.

    Some formats (GSM 6.10, G.721, NMS ADPCM) cannot seek; for others the count is a guess.
    """

    def seekable(self) -> bool:
        """False: `read` then neither seeks nor trusts the header's count."""
        return False


def read_with_libsndfile(data: bytes, sound_format: SoundFormat) -> Iterator[tuple[Samples, int]]:
    """Yields blocks `[n, channels]` and the sample rate."""
    with _Sequential(_Bytes(data)) as file:
        check_header(file.samplerate, file.channels)
        if file.subtype == "GSM610":  # one block too many, with remains of the one before
            raise ValueError("left to FFmpeg")
        while True:
            # zeroed memory of our own: what libsndfile leaves unwritten is not other data
            block = np.zeros((BLOCK_SAMPLES, file.channels), np.float32)
            block = file.read(BLOCK_SAMPLES, out=block)
            if not len(block):
                return
            yield block, file.samplerate


def _refuse_open(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError("a sound file must not name another file")


def read_with_ffmpeg(data: bytes, sound_format: SoundFormat) -> Iterator[tuple[Samples, int]]:
    """Yields blocks `[n, channels]`. Damage at the end cuts the recording; elsewhere, and where it
    is the larger part, it is an error."""
    with av.open(
        _Bytes(data),
        format=sound_format.ffmpeg,
        container_options=_OPTIONS,
        metadata_errors="ignore",
        io_open=_refuse_open,
    ) as container:
        if not container.streams.audio:
            raise AudioError(f"there is no sound in this {sound_format.name} file")
        stream = container.streams.audio[0]
        if stream.codec_context is None or stream.codec_context.name not in _CODECS:
            raise ValueError("its codec is not one that is read")
        decoder = stream.codec_context
        if name := _INSTEAD_OF.get(decoder.name):
            decoder = av.AudioCodecContext.create(name, "r")
            decoder.sample_rate = stream.codec_context.sample_rate
            decoder.layout = "mono"
        decoder.thread_count = 1
        damage: Exception | None = None
        n_decoded = n_damaged = 0
        for packet in container.demux(stream):
            try:
                if name and packet.size and bytes(packet)[0] & _AMR_PADDING:
                    raise ValueError("a frame has no header")
                frames = decoder.decode(packet)
            except (av.FFmpegError, ValueError) as error:
                damage = damage or error
                n_damaged += 1
                if n_damaged > max(n_decoded, 100):  # millions of them would take minutes
                    raise
                continue
            n_decoded += 1
            for frame in frames:
                if damage is not None:
                    raise damage
                yield _frame_samples(frame), frame.sample_rate
        if damage is not None and n_damaged > n_decoded:
            raise damage


def _frame_samples(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Samples `[n, channels]` of a frame, -1 to 1."""
    samples = frame.to_ndarray()
    channels = frame.layout.nb_channels
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int16, np.int32):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32)


def read_comment(data: bytes) -> str:
    """The comment in a sound file's header, or an empty string. Raises AudioError."""
    sound_format = detect(data)
    if not sound_format.libsndfile:
        return ""
    try:
        with _Sequential(_Bytes(data)) as file:
            return str(file.comment)
    except _NATIVE_ERRORS as error:
        raise AudioError(
            f"unreadable audio: damaged or unusual {sound_format.name} file ({_words(error)}); "
            f"{CONVERSION_HINT}"
        ) from error


def _words(error: Exception | None) -> str:
    """The message of a library's error, without names of Python objects."""
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string.rstrip(".")
    if isinstance(error, av.FFmpegError):
        return str(error.strerror)
    return str(error)
