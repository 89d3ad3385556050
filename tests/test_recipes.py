"""The shipped recipes, and the command line of the jobs that run one."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.jobs.corpus import CorpusRecipe
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.export import ExportRecipe
from valle.jobs.prepare import PrepareRecipe
from valle.jobs.publish import PublishRecipe
from valle.jobs.recipes import RECIPES, SECTIONS, load, parse_arguments
from valle.jobs.select_speakers import SelectionRecipe
from valle.jobs.synthesize import SynthesizeRecipe
from valle.jobs.train_codec import CodecRecipe
from valle.jobs.train_quantizer import QuantizerRecipe
from valle.jobs.training.recipe import TrainRecipe
from valle.model.codec.loading import load_codec
from valle.platform.recipe import RecipeError, resolve_paths

SCHEMAS: dict[str, type] = {
    "corpus": CorpusRecipe, "select_speakers": SelectionRecipe, "prepare": PrepareRecipe,
    "train_codec": CodecRecipe, "train_quantizer": QuantizerRecipe, "train": TrainRecipe,
    "evaluate": EvaluateRecipe, "publish": PublishRecipe, "export": ExportRecipe,
    "synthesize": SynthesizeRecipe,
}  # fmt: skip


def strings(value: Any) -> Iterator[str]:
    """Every string inside nested dictionaries and sequences."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def test_sections_are_those_of_the_jobs() -> None:
    assert set(SECTIONS) == set(SCHEMAS)
    for section in SECTIONS:
        assert (RECIPES.parent / f"{section}.py").is_file()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_load_accepts_every_shipped_recipe(path: Path, home: Path) -> None:
    """And leaves no relative path in it: workers have current folders of their own."""
    sections = yaml.safe_load(path.read_text())
    assert sections
    for section in sections:
        recipe = load(path.stem, section, SCHEMAS[section])
        relative = [
            s for s in strings(asdict(recipe)) if s.startswith(("data/", "runs", "release"))
        ]
        assert relative == [], section


def write_recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpse: {out: x}", "unknown section 'corpse'; known: "),
        ("codec: {out: x}", "section codec is called train_codec now$"),
        ("corpus: {out: x}\nquantizer: {}", "section quantizer is called train_quantizer now$"),
    ],
)
def test_load_refuses_unknown_and_former_sections(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r\.yaml: {message}"):
        load(write_recipe(tmp_path, text), "corpus", CorpusRecipe)


def test_load_lists_the_recipes_for_an_unknown_name() -> None:
    with pytest.raises(RecipeError, match="no recipe 'nonsense': .* one of: .*demo"):
        load("nonsense", "corpus", CorpusRecipe)


def parse_exit_status(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments, "train", TrainRecipe, "Trains.")
    return stop.value.code


def test_parse_arguments_lists_every_field_as_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_exit_status(["--help"]) == 0
    text = capsys.readouterr().out
    assert "optimization.learning_rate (float, default 0.0005)" in text
    assert "ddp or deepspeed." in text


def test_parse_arguments_exits_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_exit_status(["--recipe", "demo", "backend=horovod"]) == 2
    assert "backend: 'horovod' is none of ('ddp', 'deepspeed')" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["data=tokens", "run=mine"]])
def test_parse_arguments_requires_a_recipe(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one, `valle publish` alone would promote what the demonstration trains."""
    assert parse_exit_status(arguments) == 2
    message = capsys.readouterr().err
    assert "--recipe is required: give a path to YAML, or one of: " in message
    for path in RECIPES.glob("*.yaml"):
        assert path.stem in message


def test_parse_arguments_takes_overrides_on_both_sides_of_the_recipe(home: Path) -> None:
    arguments = ["run=mine", "--recipe", "demo", "data=elsewhere"]
    recipe = parse_arguments(arguments, "train", TrainRecipe, "Trains.")
    assert (recipe.run, recipe.data) == ("mine", f"{home}/elsewhere")


def test_shipped_names_are_no_paths(home: Path) -> None:
    recipe = EvaluateRecipe(items="quick", recordings="r", out="o", training_data="t")
    resolved = resolve_paths(recipe)
    assert (resolved.items, resolved.model) == ("quick", "models:/valle@champion")
    assert (resolved.recordings, resolved.training_data) == (f"{home}/r", f"{home}/t")
    assert resolve_paths(EvaluateRecipe(items="my.jsonl", recordings="r", out="o")).items == (
        f"{home}/my.jsonl"
    )
    train = TrainRecipe(data="d", run="x", warm_start={"ar": "nano", "nar": "runs/y"})
    assert resolve_paths(train).warm_start == {"ar": "nano", "nar": f"{home}/runs/y"}


def test_a_folder_named_nano_does_not_replace_the_codec(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_codec("nano").identity
    (home / "nano").mkdir()
    (home / "nano/config.json").write_text('{"frame_rate": 50}')
    monkeypatch.chdir(home)
    recipe = load("demo", "prepare", PrepareRecipe)
    assert load_codec(recipe.codec).identity == shipped
    recipe = load("demo", "prepare", PrepareRecipe, ["codec=./nano"])
    assert recipe.codec == f"{home}/nano"
    with pytest.raises((OSError, TypeError, ValueError)):
        load_codec(recipe.codec)  # that folder holds no weights
