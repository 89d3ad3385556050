"""A version written as a folder that can be shipped."""

from pathlib import Path

import numpy as np
import pytest

from valle.jobs.export import ExportRecipe, export
from valle.jobs.publish import PublishRecipe, publish
from valle.model.valle import Synthesis
from valle.platform import audio, checkpoint, registry, storage
from valle.platform.recipe import resolve_paths


def test_export_writes_a_bundle_that_speaks_like_its_source(
    publish_recipe: PublishRecipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a registry without a version begins with it."""
    version = publish(resolve_paths(publish_recipe))
    evaluation = home / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.json").write_text(f'{{"bundle": {{"ar": "{home}/runs/test-ar"}}}}')
    registry.attach(version, evaluation)
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

    assert registry.publish_shipped() is None  # there is a champion already
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/another.db")
    monkeypatch.setattr(registry, "SHIPPED_BUNDLE", small)
    assert registry.publish_shipped() == 1 and registry.publish_shipped() is None
    assert registry.champion_version() == 1
    again = registry.load_ar(registry.resolve(registry.CHAMPION)).head.weight
    assert again.equal(registry.load_ar(small).head.weight)
