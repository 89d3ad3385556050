"""Lengths in the headers of sound files that are absent, wrong or placeholders.

libsndfile believes a header. Programs that write to a pipe, are ended early or split files leave
0, the largest number or an old length there; the bytes say how long the recording is.
"""

import struct
from collections.abc import Iterator

from valle.platform.sound_formats import AIFF, AU, CAF, FLAC, MP3, W64, WAV, SoundFormat, id3_length

_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")


def repair_lengths(data: bytes, sound_format: SoundFormat) -> bytes:
    """`data` with its header's lengths corrected, so that a decoder reads to the end of the
    samples.

    Programs that write to a pipe, or are ended early, leave 0 or the largest number as length.
    A length that fits the file stays, so that chunks or bytes behind the samples are not read.
    """
    if sound_format is FLAC:
        return _repair_flac(data)
    repaired = bytearray(data)
    try:
        if sound_format is WAV:
            _repair_wav(repaired)
        elif sound_format is W64:
            _repair_w64(repaired)
        elif sound_format is MP3:
            _repair_mp3(repaired)
        elif sound_format is AIFF:
            _repair_aiff(repaired)
        elif sound_format is CAF:
            _repair_caf(repaired)
        elif sound_format is AU:
            _repair_au(repaired)
    except struct.error:  # the header itself is cut off: the decoder says so
        return data
    return bytes(repaired)


def _repair_flac(data: bytes) -> bytes:
    """Makes the total unknown, whatever the header says: the decoder reads until the frames end."""
    start = id3_length(data)
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


def _repair_wav(data: bytearray) -> None:
    order = ">" if data[:4] == b"RIFX" else "<"
    ds64 = None
    for name, start, size in _chunks(data, order):
        if name == b"ds64":
            ds64 = start
        if name != b"data":
            continue
        rest = len(data) - start
        if ds64 is not None and size == 0xFFFFFFFF:
            riff_size, long_size = struct.unpack_from("<QQ", data, ds64)
            if _is_wrong(data, order, start, long_size, riff_size):
                struct.pack_into("<QQ", data, ds64, len(data) - 8, rest)
            return
        if _is_wrong(data, order, start, size, struct.unpack_from(f"{order}I", data, 4)[0]):
            size = rest
        struct.pack_into(f"{order}I", data, start - 4, size)
        if size == len(data) - start:
            struct.pack_into(f"{order}I", data, 4, len(data) - 8)
        return


def _is_wrong(data: bytearray, order: str, start: int, size: int, riff_size: int) -> bool:
    """True if samples that begin at `start` cannot be `size` bytes.

    They are believed to end before the file does if the header's length of the whole file ends
    there too (what follows does not belong to it), or if whole chunks follow.
    """
    end = start + size + size % 2
    if start + size >= len(data):
        return start + size > len(data)
    if size and abs(riff_size + 8 - end) <= 1:
        return False
    follow = 0
    for name, at, length in _chunks(data, order, end):
        follow += 1
        if not (name.isascii() and name.decode().isprintable() and at + length <= len(data)):
            return True
    return follow == 0


def _repair_aiff(data: bytearray) -> None:
    comm = None
    for name, start, size in _chunks(data, ">"):
        if name == b"COMM":
            comm = start
        if name != b"SSND":
            continue
        (form_size,) = struct.unpack_from(">I", data, 4)
        if size <= 8 or _is_wrong(data, ">", start, size, form_size):
            size = len(data) - start
        if comm is not None:  # FFmpeg refuses placeholders there
            struct.pack_into(">I", data, comm + 2, size)
        struct.pack_into(">I", data, start - 4, size)
        if size == len(data) - start:
            struct.pack_into(">I", data, 4, len(data) - 8)
        return


def _repair_w64(data: bytearray) -> None:
    start = 40
    while start + 24 <= len(data):
        (size,) = struct.unpack_from("<Q", data, start + 16)
        if data[start : start + 16] == _W64_DATA:
            (file_size,) = struct.unpack_from("<Q", data, 16)
            rest = len(data) - start
            if not 24 < size <= rest or abs(file_size - start - size) > 8:
                size = rest
            struct.pack_into("<Q", data, start + 16, size)
            if size == len(data) - start:
                struct.pack_into("<Q", data, 16, len(data))
            return
        if size < 24:
            return
        start += size + -size % 8


def _repair_caf(data: bytearray) -> None:
    start = 8
    while start + 12 <= len(data):
        name, size = struct.unpack_from(">4sQ", data, start)
        if name == b"data":
            rest = len(data) - start - 12
            end = start + 12 + size
            # 4 bytes of the chunk count edits; another chunk may follow
            if not 4 < size <= rest or not data[end : end + 4].decode("latin-1").isprintable():
                struct.pack_into(">Q", data, start + 4, rest)
            return
        start += 12 + size


def _repair_au(data: bytearray) -> None:
    order = ">" if data[:4] == b".snd" else "<"
    start, size = struct.unpack_from(f"{order}II", data, 4)
    rest = len(data) - start
    if not rest // 2 < size <= rest:  # more than half of the file is not behind its samples
        struct.pack_into(f"{order}I", data, 8, 0xFFFFFFFF)  # means an unknown length in an au file


_MPEG1_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _repair_mp3(data: bytearray) -> None:
    """Raises the number of frames in the Xing header, if there is one, to that of the file."""
    start = id3_length(bytes(data[: 2**20]))
    length = _mp3_frame_length(data, start)
    found = [data.find(name, start, start + length) for name in (b"Xing", b"Info")]
    at = max(found)
    if at < 0:
        return
    flags, stated = struct.unpack_from(">II", data, at + 4)
    if not flags & 1:
        return
    frames = 0  # the first one holds the header and no sound
    while length and start + length < len(data):
        start += length
        length = _mp3_frame_length(data, start)
        frames += length > 0
    if stated < frames:
        struct.pack_into(">I", data, at + 8, frames)


def _mp3_frame_length(data: bytearray, at: int) -> int:
    """Bytes of the layer III frame at an offset; 0 if there is none."""
    header = data[at : at + 4]
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, rate, bits = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or rate == 3 or bits in (0, 15):
        return 0
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbps = (_MPEG1_KBPS if version == 3 else _MPEG2_KBPS)[bits]
    return (144 if version == 3 else 72) * kbps * 1000 // hertz + (header[2] >> 1 & 1)
