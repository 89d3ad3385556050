"""Which format a sound file has, by its first bytes, and lengths in headers that are wrong.

Pure Python: bytes that are no listed format are refused before a native decoder sees them. What
FFmpeg could open besides (playlists, concatenations, subtitles, devices) is not listed and thus
never reached.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

WAY_OUT = "convert it with `ffmpeg -i FILE out.wav`"
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
_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_BEGINNINGS = (
    (b"fLaC", FLAC), (b"OggS", OGG), (_W64_RIFF, W64), (b".snd", AU), (b"dns.", AU),
    (b"caff", CAF), (b"NIST_1A", NIST), (b"\x1a\x45\xdf\xa3", WEBM),
    (b"#!AMR\n", AMR), (b"#!AMR-WB\n", AMR), (_ASF, WMA),
)  # fmt: skip
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def detect(data: bytes) -> SoundFormat:
    """The format of a sound file. Raises AudioError for an empty or unknown one."""
    if not data:
        raise AudioError("unreadable audio: the file is empty (0 bytes)")
    found = _detect(data)
    if found is None:
        names = ", ".join(sound_format.name for sound_format in FORMATS)
        raise AudioError(f"unreadable audio: not a format that is read ({names}); {WAY_OUT}")
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
    return _detect_frames(data[_id3_length(data) :][:4])


def _id3_length(data: bytes) -> int:
    """Bytes of the ID3v2 tags at the beginning."""
    start = 0
    while data[start : start + 3] == b"ID3" and len(data) >= start + 10:
        sizes = data[start + 6 : start + 10]
        footer = 10 if data[start + 5] & 0x10 else 0
        start += 10 + footer + sum((size & 0x7F) << 7 * (3 - i) for i, size in enumerate(sizes))
    while start and data[start : start + 1] == b"\0":  # padding behind a tag
        start += 1
    return start


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


def mend_lengths(data: bytes, sound_format: SoundFormat) -> bytes:
    """`data` with lengths in its header that let the decoder read to the end of the samples.

    Programs that write to a pipe, or are ended early, leave 0 or the largest number as length.
    A length that fits the file stays, so that chunks or bytes behind the samples are not read.
    """
    if sound_format is FLAC:
        return _mend_flac(data)
    mended = bytearray(data)
    try:
        if sound_format is WAV:
            _mend_wav(mended)
        elif sound_format is W64:
            _mend_w64(mended)
        elif sound_format is CAF:
            _mend_caf(mended)
        elif sound_format is AU:
            _mend_au(mended)
    except struct.error:  # the header itself is cut off: the decoder says so
        return data
    return bytes(mended)


def _mend_flac(data: bytes) -> bytes:
    """Makes the total unknown, whatever the header says: the decoder reads until the frames end."""
    start = _id3_length(data)
    if len(data) < start + 26 or data[start + 4] & 0x7F:  # the first block must be STREAMINFO
        return data
    packed = int.from_bytes(data[start + 18 : start + 26], "big") >> 36 << 36
    return data[start : start + 18] + packed.to_bytes(8, "big") + data[start + 26 :]


def _chunks(data: bytearray, order: str, start: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, offset of the content and size of the chunks of a RIFF file."""
    while start + 8 <= len(data):
        name, size = struct.unpack_from(f"{order}4sI", data, start)
        yield name, start + 8, size
        start += 8 + size + size % 2


def _mend_wav(data: bytearray) -> None:
    order = ">" if data[:4] == b"RIFX" else "<"
    ds64 = None
    for name, start, size in _chunks(data, order):
        if name == b"ds64":
            ds64 = start
        if name != b"data":
            continue
        rest = len(data) - start
        if ds64 is not None and size == 0xFFFFFFFF:
            (long_size,) = struct.unpack_from("<Q", data, ds64 + 8)
            if not 0 < long_size <= rest:
                struct.pack_into("<QQ", data, ds64, len(data) - 8, rest)
        elif size > rest or (size < rest and not _ends_well(data, order, start + size + size % 2)):
            struct.pack_into(f"{order}I", data, start - 4, rest)
            struct.pack_into(f"{order}I", data, 4, len(data) - 8)
        return


def _ends_well(data: bytearray, order: str, end: int) -> bool:
    """True if a `data` chunk that ends at `end` fits the rest of the file.

    Either the header's own length ends there too (what follows does not belong to the file), or
    whole chunks follow.
    """
    (riff_size,) = struct.unpack_from(f"{order}I", data, 4)
    if end > 44 and abs(riff_size + 8 - end) <= 1:
        return True
    follow = list(_chunks(data, order, end))
    return bool(follow) and all(
        name.isascii() and name.decode().isprintable() and start + size <= len(data)
        for name, start, size in follow
    )


def _mend_w64(data: bytearray) -> None:
    start = 40
    while start + 24 <= len(data):
        (size,) = struct.unpack_from("<Q", data, start + 16)
        if data[start : start + 16] == _W64_DATA:
            rest = len(data) - start
            if not 24 < size <= rest:
                struct.pack_into("<Q", data, start + 16, rest)
                struct.pack_into("<Q", data, 16, len(data))
            return
        if size < 24:
            return
        start += size + -size % 8


def _mend_caf(data: bytearray) -> None:
    start = 8
    while start + 12 <= len(data):
        name, size = struct.unpack_from(">4sQ", data, start)
        if name == b"data":
            rest = len(data) - start - 12
            if not 4 < size <= rest:  # 4 bytes of the chunk count edits
                struct.pack_into(">Q", data, start + 4, rest)
            return
        start += 12 + size


def _mend_au(data: bytearray) -> None:
    order = ">" if data[:4] == b".snd" else "<"
    start, size = struct.unpack_from(f"{order}II", data, 4)
    if not 0 < size <= len(data) - start:
        struct.pack_into(f"{order}I", data, 8, 0xFFFFFFFF)  # Sun's word for unknown
