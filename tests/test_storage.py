"""Files by URI: on a disk, relative to `VALLE_HOME`, and what is no path."""

from pathlib import Path

import pytest

from valle.platform import storage


def test_files_on_a_disk_are_written_read_and_listed(home: Path) -> None:
    storage.write_bytes("a/b c/ü.txt", b"one")
    assert (home / "a/b c/ü.txt").read_bytes() == b"one"  # relative paths start at home
    storage.write_bytes("a/b c/ü.txt", b"two")
    assert storage.read_bytes(f"file://{home}/a/b c/ü.txt") == b"two"
    storage.write_bytes("a/z.WAV", b"")
    (home / "a/half.wav.part").write_bytes(b"a writer was killed here")
    assert list(storage.list_files("a")) == ["b c/ü.txt", "z.WAV"]
    assert list(storage.list_files("a", (".wav",))) == ["z.WAV"]
    assert list(storage.list_files("nothing")) == []
    assert storage.exists("a/z.WAV") and not storage.exists("a/none")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/none")
    with pytest.raises(ValueError, match="not a usable storage URI: 'ftp://x/y'"):
        storage.filesystem("ftp://x/y")


def test_absolute_resolves_relative_paths_only(home: Path) -> None:
    assert storage.absolute("a/b") == storage.absolute("./a/b") == f"{home}/a/b"
    assert storage.absolute("file:///x/y") == "/x/y"
    for uri in ("/x/y", "s3://bucket/key", "models:/valle@champion"):
        assert storage.absolute(uri) == uri
    assert storage.absolute("nano", ("nano",)) == "nano"
    assert storage.absolute("./nano", ("nano",)) == f"{home}/nano"
