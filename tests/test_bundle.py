"""Bundles: hashes of every file, checked once for each state of a folder."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_bundles import pack_bundle

from valle.model.codec.encodec import Encodec
from valle.platform import bundle, node_cache, registry, settings
from valle.platform.bundle import BundleError, FileEntry


@pytest.fixture
def folder(home: Path, tiny_codec: Encodec, tiny_codec_folder: Path) -> Path:
    return pack_bundle(home, tiny_codec_folder, tiny_codec.identity)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip_last_byte(f / "ar/model.safetensors"), "ar/model.safetensors has changed"),
        (lambda f: (f / "nar/config.json").write_text("{}"), "nar/config.json has 2 bytes instead"),
        (lambda f: (f / "codec/config.json").unlink(), "codec/config.json is missing"),
        (lambda f: (f / "ar/more.safetensors").touch(), "ar/more.safetensors is not listed"),
        (lambda f: (f / "code.py").write_text("1"), "code.py is not listed"),
        (lambda f: shutil.rmtree(f / "nar"), "nar/config.json is missing; nar/model.safetensors"),
    ],
)
def test_verify_names_each_difference(
    folder: Path,
    change: Callable[[Path], object],
    message: str,
    tiny_codec: Encodec,
    tiny_codec_folder: Path,
) -> None:
    """Before the first check and after one whose result is recorded."""
    digest = bundle.verify(folder)
    change(folder)
    for find in (bundle.verify, lambda f: registry.resolve(str(f)), lambda f: registry.pin(str(f))):
        with pytest.raises(BundleError, match=message):
            find(folder)
    shutil.rmtree(folder)
    packed_again = pack_bundle(folder.parent, tiny_codec_folder, tiny_codec.identity)
    assert bundle.verify(packed_again) == digest, "the hash is of the content"


def test_verify_reads_the_files_once_for_each_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = bundle.verify(folder)
    (folder / "report.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / ".DS_Store").write_text("hidden")
    assert bundle.verify(folder) == digest, "a report and documents are no part of the model"

    def fail(folder: Path) -> None:
        raise AssertionError("the files are read again")

    monkeypatch.setattr(bundle, "_entries", fail)
    assert bundle.verify(folder) == digest
    os.utime(folder / "ar/config.json")
    with pytest.raises(AssertionError, match="read again"):
        bundle.verify(folder)


def test_verify_accepts_an_earlier_bundle_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((folder / "bundle.json").read_text())
    del content["files"]
    (folder / "bundle.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        first, second = bundle.verify(folder), bundle.verify(folder)
    assert first == second and len(caplog.records) == 1
    assert "lists no hashes, so its files are not checked" in caplog.text
    flip_last_byte(folder / "ar/model.safetensors")
    assert bundle.verify(folder) != first, "pinned by its content all the same"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": 3}', "\x00", "[" * 10_000, " " * 4_000_001],
    ids=lambda text: repr(text)[:16],
)
def test_read_bundle_names_an_unreadable_file(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle.json cannot be read"):
        bundle.verify(folder)


def test_a_listed_path_outside_the_folder_is_missing(folder: Path) -> None:
    entry = FileEntry(sha256="0" * 64, bytes=0)
    content = bundle.read_bundle(folder)
    bundle.write_bundle(folder, content)
    text = json.loads((folder / "bundle.json").read_text())
    text["files"]["../../etc/passwd"] = vars(entry)
    (folder / "bundle.json").write_text(json.dumps(text))
    with pytest.raises(BundleError, match=r"\.\./\.\./etc/passwd is missing"):
        bundle.verify(folder)
    assert replace(content, files={}) == replace(bundle.read_bundle(folder), files={})


def test_a_pinned_folder_keeps_its_content_when_it_is_replaced(folder: Path) -> None:
    """On a node that has loaded it; elsewhere the error names both contents."""
    pinned = registry.pin(str(folder))
    copy = registry.resolve(pinned)
    assert copy != folder and (copy / "ar/config.json").samefile(folder / "ar/config.json")
    weights = (folder / "ar/model.safetensors").read_bytes()
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    flip_last_byte(other / "ar/model.safetensors")
    bundle.write_bundle(other, bundle.read_bundle(other))
    shutil.rmtree(folder)
    other.rename(folder)
    assert registry.pin(str(folder)) != pinned
    assert (registry.resolve(pinned) / "ar/model.safetensors").read_bytes() == weights
    shutil.rmtree(copy.parent)
    with pytest.raises(BundleError, match=r"has been replaced: this endpoint serves \w{8}, the f"):
        registry.resolve(pinned)


def test_a_changed_copy_of_a_pinned_folder_is_refused(folder: Path) -> None:
    pinned = registry.pin(str(folder))
    copy = registry.resolve(pinned)
    flip_last_byte(copy / "nar/model.safetensors")
    with pytest.raises(BundleError, match="nar/model.safetensors has changed"):
        registry.resolve(pinned)


def test_shipped_bundle_lists_its_files() -> None:
    assert bundle.read_bundle(registry.SHIPPED_BUNDLE).files
    assert registry.display_name(registry.pin(str(registry.SHIPPED_BUNDLE))).startswith("nano#")


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/home/ann/models/mine#" + "0123456789abcdef" * 4, "mine#01234567"),
        ("/home/ann/models/mine", "mine"),
        ("/data/größe/größe#" + "0" * 64, "gr%C3%B6%C3%9Fe#00000000"),
        ("/data/a#b#" + "0" * 64, "a#b#00000000"),
        ("models:/valle/3#m-" + "0" * 32, "models:/valle/3"),
        ("models:/valle/3#m-" + "0" * 32 + "/1a2b3c4d", "models:/valle/3#1a2b3c4d"),
        ("models:/valle@champion", "models:/valle@champion"),
    ],
)
def test_display_name_has_the_hash_and_no_folders(uri: str, name: str) -> None:
    assert registry.display_name(uri) == name
    registry.display_name(uri).encode("ascii")


def test_fetch_leaves_nothing_of_an_interrupted_download(home: Path) -> None:
    def interrupted(part: Path) -> Path:
        (part / "half").write_text("half")
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        node_cache.fetch("key", interrupted)
    assert node_cache.find("key") is None
    left = home / "cache/bundles/key.part"  # of a process that was killed
    left.mkdir()
    (left / "half").write_text("half")

    def complete(part: Path) -> Path:
        assert not list(part.iterdir())
        (part / "bundle").mkdir()
        return part / "bundle"

    copy = node_cache.fetch("key", complete)
    assert copy == node_cache.find("key") and not left.exists()
    assert node_cache.fetch("key", interrupted) == copy, "made by the first caller"


def test_fetch_links_a_local_store_and_notices_when_it_has_moved(home: Path) -> None:
    for name in ("one", "two"):
        (home / name).mkdir()
    assert node_cache.fetch("key", lambda part: home / "one") == home / "one"
    (home / "one").rmdir()
    assert node_cache.find("key") is None
    assert node_cache.fetch("key", lambda part: home / "two") == home / "two"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 3}', "null"])
def test_last_version_of_a_damaged_record_is_unknown(home: Path, text: str) -> None:
    node_cache.remember("http://a", "models:/valle@champion", "models:/valle/1")
    assert node_cache.last_version("http://a", "models:/valle@champion") == "models:/valle/1"
    assert node_cache.last_version("http://b", "models:/valle@champion") is None
    [record] = (home / "cache/aliases").iterdir()
    record.write_text(text)
    assert node_cache.last_version("http://a", "models:/valle@champion") is None


def test_an_answer_that_cannot_be_kept_is_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that is part of a read-only image serves what it holds."""
    aliases = settings.read().cache / "aliases"
    aliases.parent.mkdir(parents=True, exist_ok=True)
    aliases.write_text("no folder")
    node_cache.remember("http://a", "models:/valle@champion", "models:/valle/1")
    assert "models:/valle@champion is not known here" in caplog.text
    assert node_cache.last_version("http://a", "models:/valle@champion") is None
