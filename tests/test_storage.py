"""Files by URI: on a disk, relative to `VALLE_HOME`, and what is no path."""

import errno
import os
from pathlib import Path

import pytest
from helpers.s3_outages import s3_server

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


NAMES = (
    "a b.wav", "ü é/日本 ß.wav", "a#b.wav", "a?b=c&d.wav", "a%20b.wav", "100%.wav", "a+b.wav",
    "back\\slash.wav", "'q'\"[x]{y}*.wav", "a:b.wav", "..hidden.wav", "e=mc^2|~`.wav", "x@y;z,.wav",
)  # fmt: skip
"""Names that a URI would read in another way."""


def check_names(root: str) -> None:
    """Every function of storage takes names as they are, and what a listing hands out."""
    for name in NAMES:
        uri = storage.join(root, name)
        assert not storage.exists(uri)
        storage.write_bytes(uri, name.encode())
        assert storage.exists(uri) and storage.read_bytes(uri) == name.encode()
    assert sorted(storage.list_files(root)) == sorted(NAMES)
    for entry in storage.list_entries(root):
        uri = storage.join(root, entry.path)
        assert storage.read_bytes(uri) == entry.path.encode()
        assert entry.size == len(entry.path.encode()) and entry.modified_ns > 0
    storage.write_json(storage.join(root, "ü #.json"), {"a": 1})
    assert storage.read_json(storage.join(root, "ü #.json")) == {"a": 1}
    storage.delete(storage.join(root, "ü #.json"))
    for name in NAMES:
        storage.delete(storage.join(root, name))
        storage.delete(storage.join(root, name))  # gone already
    assert list(storage.list_files(root)) == []


def test_names_on_a_disk_are_taken_as_they_are(home: Path) -> None:
    check_names(f"{home}/a dir #1")
    check_names(f"file://{home}/b%20")
    assert (home / "b%20").is_dir()


@pytest.mark.ray
def test_keys_on_s3_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch, "valle") as bucket:
        check_names(bucket)
        check_names(f"{bucket}/a dir #1/ü?")
        storage.write_bytes(f"{bucket}/a", b"a")
        storage.write_bytes(f"{bucket}/a#b", b"another")
        assert storage.read_bytes(f"{bucket}/a#b") == b"another"  # not the key `a`
        with pytest.raises(storage.FileTooLargeError, match="limit"):
            storage.read_bytes(f"{bucket}/a#b", max_bytes=3)
        with pytest.raises(ValueError, match="empty part, `.` or `..`"):
            storage.read_bytes(f"{bucket}/x/../a")


@pytest.mark.ray
def test_filesystem_of_a_bucket_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client for a bucket; another one for other variables and in a forked process."""
    with s3_server(monkeypatch, "valle") as bucket:
        first = storage.filesystem(f"{bucket}/a")[0]
        assert storage.filesystem(f"{bucket}/b/c d")[0] is first
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert storage.filesystem(f"{bucket}/a")[0] is not first
        monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert storage.filesystem(f"{bucket}/a")[0] is not first


def test_storage_that_cannot_be_reached_is_not_a_bad_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_REGION", "us-east-1"),
                        ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage.read_bytes("s3://valle/a.wav")


def test_read_bytes_refuses_what_is_no_file_before_it_is_opened(home: Path) -> None:
    os.mkfifo(home / "pipe")  # would block for ever
    (home / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(storage.NotAFileError, match="is not a file"):
            storage.read_bytes(name)
    (home / "huge").touch()
    os.truncate(home / "huge", 10**12)
    with pytest.raises(storage.FileTooLargeError, match="1000000.0 MB, limit 1.0 MB"):
        storage.read_bytes("huge", max_bytes=10**6)


def test_write_bytes_that_fails_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        storage.write_bytes("out/a", b"x")
    assert list((home / "out").iterdir()) == []


def test_sweep_parts_removes_old_ones(home: Path) -> None:
    storage.write_bytes("out/deep/a.parquet", b"x")
    old, new = home / "out/deep/a.parquet.1.part", home / "out/b.2.part"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    assert storage.sweep_parts("out", older_than_seconds=3600) == 1
    assert not old.exists() and new.exists() and storage.exists("out/deep/a.parquet")


def test_list_files_follows_links_but_not_in_circles(home: Path) -> None:
    storage.write_bytes("data/s/a.wav", b"x")
    storage.write_bytes("elsewhere/b.wav", b"x")
    (home / "data/link").symlink_to(home / "elsewhere")
    (home / "data/s/up").symlink_to(home / "data")
    (home / "data/gone.wav").symlink_to("nowhere")
    (home / os.fsdecode(b"data/caf\xe9.wav")).touch()
    listed = list(storage.list_files("data"))
    assert {"s/a.wav", "link/b.wav", "caf\udce9.wav"} <= set(listed)
    assert "gone.wav" not in listed
    assert len(listed) < 20
    assert {e.path: e.size for e in storage.list_entries("data")}["gone.wav"] is None


def test_absolute_of_other_spellings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert storage.absolute("~/x") == "/home/ann/x"
    assert storage.absolute("file:/x y#") == storage.absolute("file://localhost/x y#") == "/x y#"
    assert storage.absolute("S3://Bucket/Key") == "s3://Bucket/Key"
    for uri in ("s3://KEY:hidden@bucket/a", "s3://KEY@bucket/a", "http://u:hidden@host/a"):
        with pytest.raises(ValueError, match="must not hold credentials") as caught:
            storage.absolute(uri)
        assert "hidden" not in str(caught.value)
