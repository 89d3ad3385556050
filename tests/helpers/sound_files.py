"""Sound files of every format that is read, also with wrong lengths or cut off."""

import io
import struct
from collections.abc import Callable

import av
import numpy as np
import soundfile
import soxr

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE


class _Pipe:
    """A file that cannot seek: what a program writes into a pipe."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


def _libsndfile(container: str, subtype: str, rate: int) -> Callable[[Wave], bytes]:
    def write(wave: Wave) -> bytes:
        buffer = io.BytesIO()
        samples = soxr.resample(wave, SAMPLE_RATE, rate) if rate != SAMPLE_RATE else wave
        soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
        return buffer.getvalue()

    return write


def ffmpeg_writer(
    container: str, codec: str, rate: int, *, options: dict[str, str] | None = None,
    pipe: bool = False, video: bool = False, codec_options: dict[str, str] | None = None,
) -> Callable[[Wave], bytes]:  # fmt: skip
    def write(wave: Wave) -> bytes:
        buffer, unseekable = io.BytesIO(), _Pipe()
        target = unseekable if pipe else buffer
        with av.open(target, "w", format=container, options=options or {}) as file:
            if video:  # a phone's recording with a picture
                picture = file.add_stream("mpeg4", rate=10)
                picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            stream = file.add_stream(codec, rate=rate, options=codec_options or {})
            stream.codec_context.layout = "mono"
            if codec == "wmav2":  # the only one without a usual bit rate
                stream.codec_context.bit_rate = 64_000
            if video:
                for index in range(5):
                    image = av.VideoFrame.from_ndarray(
                        np.full((64, 64, 3), 40 * index, np.uint8), format="rgb24"
                    )
                    file.mux(picture.encode(image))
                file.mux(picture.encode(None))
            samples = soxr.resample(wave, SAMPLE_RATE, rate).clip(-1, 1) * 32767
            frame = av.AudioFrame.from_ndarray(
                samples.astype(np.int16)[None], format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = rate, 0
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        return bytes(unseekable.data) if pipe else buffer.getvalue()

    return write


WRITERS: dict[str, Callable[[Wave], bytes]] = {
    "wav 8 bit": _libsndfile("WAV", "PCM_U8", 24_000),
    "wav 16 bit": _libsndfile("WAV", "PCM_16", 24_000),
    "wav 24 bit": _libsndfile("WAV", "PCM_24", 24_000),
    "wav 32 bit": _libsndfile("WAV", "PCM_32", 48_000),
    "wav float": _libsndfile("WAV", "FLOAT", 44_100),
    "wav double": _libsndfile("WAV", "DOUBLE", 24_000),
    "wav extensible": _libsndfile("WAVEX", "PCM_24", 24_000),
    "wav rf64": _libsndfile("RF64", "PCM_16", 24_000),
    "wav mu-law": _libsndfile("WAV", "ULAW", 8_000),
    "wav a-law": _libsndfile("WAV", "ALAW", 8_000),
    "wav ima adpcm": _libsndfile("WAV", "IMA_ADPCM", 16_000),
    "wav ms adpcm": _libsndfile("WAV", "MS_ADPCM", 16_000),
    "wav gsm": _libsndfile("WAV", "GSM610", 8_000),
    "wav g721": _libsndfile("WAV", "G721_32", 8_000),
    "wav nms 16": _libsndfile("WAV", "NMS_ADPCM_16", 8_000),
    "wav nms 32": _libsndfile("WAV", "NMS_ADPCM_32", 8_000),
    "wav g726": ffmpeg_writer("wav", "g726", 8_000),
    "wav mp3": ffmpeg_writer("wav", "libmp3lame", 24_000),
    "w64": _libsndfile("W64", "PCM_16", 24_000),
    "w64 gsm": _libsndfile("W64", "GSM610", 8_000),
    "aiff": _libsndfile("AIFF", "PCM_16", 24_000),
    "aiff gsm": _libsndfile("AIFF", "GSM610", 8_000),
    "au": _libsndfile("AU", "PCM_16", 24_000),
    "au mu-law": _libsndfile("AU", "ULAW", 8_000),
    "au g721": _libsndfile("AU", "G721_32", 8_000),
    "au g723": _libsndfile("AU", "G723_24", 8_000),
    "caf": _libsndfile("CAF", "PCM_16", 24_000),
    "caf alac": _libsndfile("CAF", "ALAC_16", 24_000),
    "nist": _libsndfile("NIST", "PCM_16", 16_000),
    "flac": _libsndfile("FLAC", "PCM_16", 24_000),
    "flac piped": ffmpeg_writer("flac", "flac", 24_000, pipe=True),
    "ogg vorbis": _libsndfile("OGG", "VORBIS", 24_000),
    "ogg opus": _libsndfile("OGG", "OPUS", 48_000),
    "ogg flac": ffmpeg_writer("ogg", "flac", 24_000),
    "mp3": _libsndfile("MP3", "MPEG_LAYER_III", 24_000),
    "mp3 44.1 kHz": ffmpeg_writer("mp3", "libmp3lame", 44_100),
    "mp3 piped": ffmpeg_writer("mp3", "libmp3lame", 24_000, pipe=True),
    "m4a": ffmpeg_writer("ipod", "aac", 44_100),
    "m4a alac": ffmpeg_writer("ipod", "alac", 24_000),
    "mp4 fragmented": ffmpeg_writer(
        "mp4", "aac", 48_000, pipe=True, options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "mp4 video": ffmpeg_writer("mp4", "aac", 44_100, video=True),
    "mov": ffmpeg_writer("mov", "pcm_s16le", 48_000),
    "webm": ffmpeg_writer("webm", "libopus", 48_000),
    "webm piped": ffmpeg_writer("webm", "libopus", 48_000, pipe=True),
    "mkv": ffmpeg_writer("matroska", "aac", 24_000),
    "aac": ffmpeg_writer("adts", "aac", 24_000),
    "amr": ffmpeg_writer("amr", "libopencore_amrnb", 8_000),
    "amr dtx": ffmpeg_writer("amr", "libopencore_amrnb", 8_000, codec_options={"dtx": "1"}),
    "3gp": ffmpeg_writer("3gp", "libopencore_amrnb", 8_000),
    "wma": ffmpeg_writer("asf", "wmav2", 44_100),
}  # fmt: skip
"""A function for each format that makes a file of a mono wave at 24 kHz."""


def set_lengths(data: bytes, value: int) -> bytes:
    """A file whose headers state `value` as the length of the samples (and of the file), where the
    format has such a field; else the same file."""
    file = bytearray(data)
    if data[:4] in (b"RIFF", b"RIFX"):
        for at in (4, file.index(b"data") + 4):
            struct.pack_into("<I", file, at, min(value, 2**32 - 1))
    elif data[:4] == b"RF64":
        struct.pack_into("<QQ", file, file.index(b"ds64") + 8, value, value)
    elif data[:4] == b"riff":
        struct.pack_into("<Q", file, 16, value)
        struct.pack_into("<Q", file, file.index(b"data\xf3") + 16, value)
    elif data[:4] == b"FORM":
        for at in (4, file.index(b"COMM") + 10, file.index(b"SSND") + 4):
            struct.pack_into(">I", file, at, min(value, 2**32 - 1))
    elif data[:4] == b".snd":
        struct.pack_into(">I", file, 8, min(value, 2**32 - 1))
    elif data[:4] == b"caff":
        struct.pack_into(">Q", file, file.index(b"data") + 4, value)
    elif data[:4] == b"fLaC":
        packed = int.from_bytes(data[18:26], "big") >> 36 << 36 | min(value, 2**36 - 1)
        file[18:26] = packed.to_bytes(8, "big")
    return bytes(file)
