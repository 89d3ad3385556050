"""Checkpoints of former formats: the shipped ones, and made ones of each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_AR, TINY_NAR, random_items, tiny_ar, tiny_nar

from valle.jobs.recipes import load
from valle.jobs.training.recipe import ModelSize, TrainRecipe
from valle.model.ar import AR
from valle.model.config import SIZES, ARConfig, NARConfig
from valle.model.nar import NAR
from valle.model.sampling import Sampling
from valle.platform import checkpoint, registry
from valle.platform.recipe import RecipeError

SHIPPED_SIZE = ModelSize(size="mini", dropout=0.0, group_size=2)


@pytest.mark.parametrize(("kind", "format"), [("ar", 1), ("nar", 2)])
def test_shipped_checkpoint_loads_with_the_present_config(kind: str, format: int) -> None:
    folder = registry.SHIPPED_BUNDLE / kind
    content = json.loads((folder / "config.json").read_text())
    assert content["format"] == format and content["model"]["group"] in (1, 2)
    model, metadata = checkpoint.load(folder)
    assert metadata.format == checkpoint.FORMAT
    assert metadata.model == model.config == SHIPPED_SIZE.resolve(kind)
    phonemes, prompt, codes = random_items(12)[0]
    sampling = Sampling(temperature=0.0)
    if isinstance(model, AR):
        output = model.generate(phonemes, prompt, sampling=sampling, max_frames=4, seed=0)
        assert 0 < len(output.codes) <= 4
    else:
        filled = model.generate(phonemes, prompt, codes[0], sampling=sampling, seed=0)
        assert torch.equal(filled[0], codes[0])


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_shipped_checkpoint_compares_with_the_present_config(kind: str) -> None:
    """As the weights that a run begins with."""
    folder = registry.SHIPPED_BUNDLE / kind
    codec = checkpoint.read_metadata(folder).codec
    model = checkpoint.build_model(SHIPPED_SIZE.resolve(kind))
    checkpoint.warm_start(model, str(folder), codec)
    for name, value in checkpoint.load_weights(folder).items():
        assert torch.equal(model.state_dict()[name], value)
    if kind == "ar":
        ungrouped = AR(ARConfig.from_shared(SIZES["mini"]))
        with pytest.raises(ValueError, match="has group_size 2, this run has 1"):
            checkpoint.warm_start(ungrouped, str(folder), codec)


def write_old(folder: Path, model: AR | NAR, format: int, **fields: Any) -> None:
    """A checkpoint as an earlier version wrote it: every config had a `group`."""
    codec = checkpoint.read_metadata(registry.SHIPPED_BUNDLE / "ar").codec
    metadata = checkpoint.new_metadata(model.config, codec, "test", {})
    checkpoint.save(folder, model.state_dict(), metadata)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["model"].pop("group_size", None)
    content["model"].update(fields)
    path.write_text(json.dumps({**content, "format": format}))


@pytest.mark.parametrize("format", [1, 2])
def test_old_ar_checkpoint_reads_group_as_group_size(tmp_path: Path, format: int) -> None:
    config = ARConfig.from_shared(TINY_AR, group_size=3)
    write_old(tmp_path, tiny_ar(config=config), format, group=3)
    model, metadata = checkpoint.load(tmp_path)
    assert model.config == metadata.model == config
    # written again, it is of the present format
    checkpoint.save(tmp_path / "again", model.state_dict(), metadata)
    assert checkpoint.load(tmp_path / "again")[1] == metadata


def test_old_ar_checkpoint_without_group_has_groups_of_one(tmp_path: Path) -> None:
    write_old(tmp_path, tiny_ar(), 1)
    assert checkpoint.load(tmp_path)[1].model == TINY_AR


def test_old_nar_checkpoint_loses_its_group(tmp_path: Path) -> None:
    write_old(tmp_path, tiny_nar(), 2, group=2)
    assert checkpoint.load(tmp_path)[1].model == TINY_NAR


def test_nar_checkpoint_of_format_1_only_begins_a_run(tmp_path: Path) -> None:
    write_old(tmp_path, tiny_nar(), 1, group=2)
    with pytest.raises(ValueError, match="a NAR model of format 1, whose prompt attends to more"):
        checkpoint.load(tmp_path)
    model, metadata = checkpoint.load(tmp_path, allow_old_format=True)
    assert model.config == TINY_NAR and metadata.format == 1
    checkpoint.save(tmp_path / "again", model.state_dict(), metadata)
    assert checkpoint.read_metadata(tmp_path / "again") == metadata
    codec = metadata.codec
    checkpoint.warm_start(NAR(NARConfig.from_shared(TINY_NAR)), str(tmp_path), codec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 4}, "format: 4 is of newer code; this code reads up to 3"),
        ({"kind": "gan"}, r"kind: 'gan' is none of \['ar', 'nar'\]"),
        ({"kind": "nar"}, "group_size"),
    ],
)
def test_metadata_that_this_code_cannot_read_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_old(tmp_path, tiny_ar(), checkpoint.FORMAT, group_size=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_metadata(tmp_path)


def test_recipe_with_the_former_name_of_group_size_fails() -> None:
    with pytest.raises(RecipeError, match="train.model.group is called group_size now"):
        load("nano", "train", TrainRecipe, ["model.group=2"])
