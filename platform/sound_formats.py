"""Which format a sound file has, by its first bytes.

Pure Python: bytes that are no listed format are refused before a native decoder sees them. What
FFmpeg could open besides (playlists, concatenations, subtitles, devices) is not listed and thus
never opened.
"""

from dataclasses import dataclass

CONVERSION_HINT = "convert it with `ffmpeg -i FILE out.wav`"
"""What to do with a file that cannot be read; part of the messages."""


class AudioError(ValueError):
    """A recording that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class SoundFormat:
    """A format of sound files, and which libraries read it."""

    name: str
    """Name in messages."""
    ffmpeg: str | None
    """FFmpeg's demuxer, for what libsndfile does not read or refuses."""
    libsndfile: bool = True
    """True if libsndfile is asked first."""


WAV = SoundFormat("wav", "wav")
W64 = SoundFormat("w64", "w64")
FLAC = SoundFormat("flac", "flac")
OGG = SoundFormat("ogg", "ogg")
MP3 = SoundFormat("mp3", "mp3")
AIFF = SoundFormat("aiff", "aiff")
AU = SoundFormat("au", "au")
CAF = SoundFormat("caf", "caf")
NIST = SoundFormat("nist sphere", None)
MP4 = SoundFormat("m4a/mp4", "mov", libsndfile=False)
WEBM = SoundFormat("webm/mkv", "matroska", libsndfile=False)
AAC = SoundFormat("aac", "aac", libsndfile=False)
AMR = SoundFormat("amr", "amr", libsndfile=False)
WMA = SoundFormat("wma", "asf", libsndfile=False)

FORMATS = (WAV, W64, FLAC, OGG, MP3, AIFF, AU, CAF, NIST, MP4, WEBM, AAC, AMR, WMA)
"""All formats that are read."""

_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_BEGINNINGS = (
    (b"fLaC", FLAC), (b"OggS", OGG), (_W64_RIFF, W64), (b".snd", AU), (b"dns.", AU),
    (b"caff", CAF), (b"NIST_1A", NIST), (b"\x1a\x45\xdf\xa3", WEBM),
    (b"#!AMR\n", AMR), (b"#!AMR-WB\n", AMR), (_ASF, WMA),
)  # fmt: skip
_MAX_TAGS, _MAX_PADDING = 4, 65_536
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def detect(data: bytes) -> SoundFormat:
    """The format of a sound file. Raises AudioError for an empty or unknown one."""
    if not data:
        raise AudioError("unreadable audio: the file is empty (0 bytes)")
    found = _detect(data)
    if found is None:
        names = ", ".join(sound_format.name for sound_format in FORMATS)
        raise AudioError(
            f"unreadable audio: not a format that is read ({names}); {CONVERSION_HINT}"
        )
    return found


def _detect(data: bytes) -> SoundFormat | None:
    for beginning, sound_format in _BEGINNINGS:
        if data.startswith(beginning):
            return sound_format
    form = data[8:12]
    if data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and form == b"WAVE":
        return WAV
    if data[:4] == b"FORM" and form in (b"AIFF", b"AIFC"):
        return AIFF
    if data[4:8] in _MP4_BOXES and int.from_bytes(data[:4], "big") != 0:
        return MP4
    return _detect_frames(data[(start := id3_length(data)) : start + 4])


def id3_length(data: bytes) -> int:
    """Bytes of the ID3v2 tags at the beginning, at most a few, with the padding behind them."""
    start = 0
    for _ in range(_MAX_TAGS):
        if data[start : start + 3] != b"ID3" or len(data) < start + 10:
            break
        sizes = data[start + 6 : start + 10]
        footer = 10 if data[start + 5] & 0x10 else 0
        start += 10 + footer + sum((size & 0x7F) << 7 * (3 - i) for i, size in enumerate(sizes))
    padding = data[start : start + _MAX_PADDING] if start else b""
    return start + len(padding) - len(padding.lstrip(b"\0"))


def _detect_frames(header: bytes) -> SoundFormat | None:
    """A format that is a sequence of frames, each with its own header, or flac behind a tag."""
    if header == b"fLaC":
        return FLAC
    if len(header) < 4 or header[0] != 0xFF:
        return None
    if header[1] & 0xF6 == 0xF0:  # layer 0: ADTS
        return AAC if header[2] >> 2 & 0xF <= 12 else None
    valid = (
        header[1] & 0xE0 == 0xE0
        and header[1] & 0x18 != 0x08  # version
        and header[1] & 0x06 != 0  # layer
        and header[2] & 0xF0 != 0xF0  # bit rate
        and header[2] & 0x0C != 0x0C  # sample rate
    )
    return MP3 if valid else None


def is_chained_ogg(data: bytes) -> bool:
    """Whether one ogg stream ends and another begins, as where files or broadcasts were joined."""
    at, sound = 0, False
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        begins, n_segments = bool(data[at + 5] & 2), data[at + 26]
        if begins and sound:
            return True
        sound = sound or not begins
        at += 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])
    return False
