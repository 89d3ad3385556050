"""The text version that a bundle records."""

import json
from pathlib import Path

import pytest
from helpers.tiny_bundles import save_checkpoints

from valle.model.codec.encodec import Encodec
from valle.model.normalize import TEXT_VERSION
from valle.platform import packing, registry
from valle.platform.bundle import Bundle


def test_bundle_says_the_text_version_and_the_languages(
    tmp_path: Path, tiny_codec_folder: Path, tiny_codec: Encodec, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint without them is of version 1, and a model of another version is announced."""
    folders = {kind: tmp_path / kind for kind in ("ar", "nar")}
    save_checkpoints(folders, tiny_codec.identity)
    versions = {"ar": 1, "nar": 1}

    def pack(name: str) -> Bundle:
        for kind, folder in folders.items():
            path = folder / "config.json"
            values = json.loads(path.read_text())
            changed = {"text_version": versions[kind], "languages": ["de", "en-us"]}
            path.write_text(json.dumps({**values, **changed}))
        (tmp_path / name).mkdir()
        arguments = (str(folders["ar"]), str(folders["nar"]), str(tiny_codec_folder))
        return packing.pack(*arguments, tmp_path / name)

    assert pack("old").text_version == 1
    assert "trained with text version 1, this code reads text as version 2" in caplog.text
    caplog.clear()
    versions["ar"] = versions["nar"] = TEXT_VERSION
    assert (packed := pack("new")).text_version == TEXT_VERSION
    assert packed.languages == registry.read_languages(tmp_path / "new") == ("de", "en-us")
    registry.load_ar(tmp_path / "new")
    assert not caplog.text
    assert registry.read_languages(registry.SHIPPED_BUNDLE) == ("en-us",)
    versions["nar"] = 1
    with pytest.raises(ValueError, match="AR checkpoint learnt text version 2, the NAR .* 1"):
        pack("mixed")
