"""A version written as a folder that can be shipped."""

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_bundles import pack_bundle

from valle.jobs.export import ExportRecipe, export
from valle.jobs.publish import PublishRecipe, publish
from valle.model.codec.encodec import Encodec
from valle.model.valle import Synthesis, Synthesizer
from valle.platform import audio, bundle, checkpoint, model_versions, registry, storage
from valle.platform.recipe import resolve_paths


@pytest.mark.usefixtures("database")
def test_export_writes_a_bundle_that_speaks_like_its_source(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    version = publish(resolve_paths(publish_recipe)).version
    evaluation = home / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.json").write_text(f'{{"bundle": {{"ar": "{home}/runs/test-ar"}}}}')
    model_versions.attach_report(version, evaluation)
    (home / "small").mkdir()
    (home / "small/report.md").write_text("of another model")
    source = registry.resolve(registry.CHAMPION)
    small = export(resolve_paths(ExportRecipe(out="small")))
    exact = export(resolve_paths(ExportRecipe(out="exact", precision="fp32")))
    sizes = [(f / "ar/model.safetensors").stat().st_size for f in (source, exact, small)]
    assert sizes[0] == sizes[1] and sizes[2] < sizes[0] / 3
    for path in small.rglob("*.json"):
        assert str(home) not in path.read_text()
    assert '"ar": "runs/test-ar"' in (small / "report.json").read_text()
    assert not (small / "report.md").exists()
    prompt = audio.read(storage.read_bytes("voices/ann.wav"), max_seconds=60)
    synthesis = Synthesis(max_seconds=0.4)
    results = [
        registry.load_synthesizer(folder).synthesize("Hello.", prompt, synthesis)
        for folder in (source, exact)
    ]
    np.testing.assert_array_equal(*[result.codes for result in results])
    rounded, weights = (checkpoint.load_weights(f / "nar") for f in (small, source))
    for name, value in weights.items():
        bound = value.abs().amax(-1, keepdim=True) / 253
        assert ((rounded[name] - value).abs() <= bound).all(), name


def test_export_replaces_an_earlier_one_as_a_whole(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> None:
    """Its own files and their hashes are new, a card beside them stays, nothing else is left."""
    first = pack_bundle(home / "one", tiny_codec_folder, tiny_codec.identity)
    out = export(ExportRecipe(model=str(first), out=str(home / "out")))
    (out / "README.md").write_text("a card")
    (out / "codec/training.jsonl").write_text("{}")
    (out / "report.md").write_text("of the earlier model")
    before = (out / "ar/model.safetensors").stat().st_ino
    again = ExportRecipe(model=str(first), out=str(home / "out"), precision="fp32")
    assert export(again) == out
    assert (out / "README.md").read_text() == "a card" and not (out / "report.md").exists()
    assert (out / "ar/model.safetensors").stat().st_ino != before
    assert "codec/training.jsonl" in bundle.read_bundle(out).files
    bundle.verify(out)
    assert {p.name for p in home.iterdir()} == {"one", "out", "cache"}, "no temporary folders"


def test_export_undoes_an_interrupted_exchange(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames the process dies; the earlier export comes back."""
    source = pack_bundle(home / "one", tiny_codec_folder, tiny_codec.identity)
    recipe = ExportRecipe(model=str(source), out=str(home / "out"))
    (export(recipe) / "README.md").write_text("a card")
    (home / "out").rename(home / ".out.previous")
    export(recipe)
    assert (home / "out/README.md").read_text() == "a card"
    assert not (home / ".out.previous").exists()

    def fail(folder: Path) -> Synthesizer:
        raise ValueError("no such weights")

    monkeypatch.setattr(registry, "load_synthesizer", fail)
    content = (home / "out/bundle.json").read_bytes()
    with pytest.raises(ValueError, match="no such weights"):
        export(recipe)
    assert (home / "out/bundle.json").read_bytes() == content
    bundle.verify(home / "out")


def test_export_refuses_a_folder_of_other_things_and_a_changed_source(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> None:
    source = pack_bundle(home / "one", tiny_codec_folder, tiny_codec.identity)
    with pytest.raises(ValueError, match=r"out: .* holds other things than an export \(cache\)"):
        export(ExportRecipe(model=str(source), out=str(home)))
    (source / "nar/config.json").write_text("{}")
    with pytest.raises(bundle.BundleError, match="nar/config.json has 2 bytes instead of"):
        export(ExportRecipe(model=str(source), out=str(home / "out")))
    assert not (home / "out").exists()
