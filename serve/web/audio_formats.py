"""Encoding of speech in OpenAI's audio formats, whole or chunk by chunk, with ffmpeg (PyAV).

`speed` changes the duration and keeps the pitch (ffmpeg's `atempo`).
"""

import io
from typing import Any, Literal, get_args

import av
import numpy as np

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE

AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

AUDIO_FORMATS: tuple[str, ...] = get_args(AudioFormat)

MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

_CONTAINERS = {
    "mp3": "mp3",
    "opus": "ogg",
    "aac": "adts",
    "flac": "flac",
    "wav": "wav",
    "pcm": "s16le",
}
_CODECS = {
    "mp3": "libmp3lame",
    "opus": "libopus",
    "aac": "aac",
    "flac": "flac",
    "wav": "pcm_s16le",
    "pcm": "pcm_s16le",
}
_BIT_RATE = 64_000
"""Bits a second of the lossy formats: transparent for one voice at 24 kHz."""


class AudioEncoder:
    """Encodes chunks of samples to the bytes of one file, in order.

    No byte is changed later, so each part can be sent at once. The length in the file's header is
    therefore "unknown"; `encode_audio` writes the real one.
    """

    def __init__(self, format: AudioFormat, speed: float = 1.0) -> None:
        self._pipe = _Pipe()
        self._writer = _Writer(self._pipe, format, speed)

    def add(self, wave: Wave) -> bytes:
        """Encodes samples; returns the bytes that are ready, if any: codecs work in blocks."""
        self._writer.add(wave)
        return self._pipe.take()

    def finish(self) -> bytes:
        """Returns the rest of the file."""
        self._writer.finish()
        return self._pipe.take()


def encode_audio(wave: Wave, format: AudioFormat, speed: float = 1.0) -> bytes:
    """A recording as a complete file, with its length in the header where the format has one."""
    buffer = io.BytesIO()
    writer = _Writer(buffer, format, speed)
    writer.add(wave)
    writer.finish()
    return buffer.getvalue()


class _Pipe:
    """A file object that cannot seek; `take` returns what was written since the last call."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


class _Writer:
    """Samples to `atempo`, then to a codec, then to a container."""

    def __init__(self, file: Any, format: AudioFormat, speed: float) -> None:
        self._container = av.open(file, "w", format=_CONTAINERS[format])
        self._stream = self._container.add_stream(_CODECS[format], rate=SAMPLE_RATE)
        self._stream.codec_context.layout = "mono"
        if format not in ("flac", "wav", "pcm"):
            self._stream.codec_context.bit_rate = _BIT_RATE
        self._tempo = None if speed == 1.0 else _tempo(speed)
        self._samples = 0

    def add(self, wave: Wave) -> None:
        if not len(wave):
            return
        pcm = (np.clip(wave, -1, 1) * 32767).round().astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self._samples
        self._samples += len(wave)
        if self._tempo is None:
            self._mux(frame)
        else:
            self._tempo.push(frame)
            self._drain()

    def finish(self) -> None:
        if self._tempo is not None:
            self._tempo.push(None)
            self._drain()
        self._mux(None)
        self._container.close()

    def _drain(self) -> None:
        assert self._tempo is not None
        while True:
            try:
                self._mux(self._tempo.pull())
            except (av.BlockingIOError, av.EOFError):  # no more for now, or at all
                return

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def _tempo(speed: float) -> av.filter.Graph:
    """A filter graph that plays `speed` times as fast; a single `atempo` allows 0.5 and more."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=SAMPLE_RATE, format="s16", layout="mono")
    steps = [0.5, speed / 0.5] if speed < 0.5 else [speed]
    chain = [source, *(graph.add("atempo", str(step)) for step in steps)]
    chain.append(graph.add("abuffersink"))
    graph.link_nodes(*chain).configure()
    return graph
