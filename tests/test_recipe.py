"""Sections of recipes: typed, strict, with absolute paths."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from valle.jobs.training.recipe import TrainRecipe
from valle.jobs.training.validation import QuickCheck
from valle.platform import storage
from valle.platform.recipe import (
    RecipeError,
    exit_on_error,
    formerly,
    location,
    parse_section,
    resolve_paths,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = field(default=4, metadata=formerly("breadth", "extent"))
    """How wide."""
    side: Literal["left", "right"] = "left"
    """Which one."""


@dataclass(frozen=True, kw_only=True)
class Example:
    out: str
    """Where to."""
    inner: Inner = field(default_factory=Inner, metadata=formerly("core"))
    rate: float = field(default=0.1, metadata=formerly("speed"))
    """How fast."""
    layers: list[Inner] = field(default_factory=list)
    """One above the other."""
    named: dict[str, Inner] = field(default_factory=dict)
    """Those with a name."""
    extra: Inner | None = None
    """One more, perhaps."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate: {self.rate} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    root: str = field(metadata=location())
    note: str = "a/b"


@dataclass(frozen=True, kw_only=True)
class Locations:
    out: str = field(default="runs", metadata=location() | formerly("output"))
    codec: str = field(default="nano", metadata=location(names=("nano", "nano2")))
    corpora: tuple[str, ...] = field(default=(), metadata=location())
    warm_start: dict[str, str] = field(default_factory=dict, metadata=location(names=("nano",)))
    baseline: str | None = field(default=None, metadata=location())
    inputs: tuple[Inputs, ...] = ()
    optional: Inputs | None = None


def parse(text: str, *overrides: str) -> Example:
    return parse_section(yaml.safe_load(text), "corpus", Example, overrides, source="r.yaml")


def test_parse_section_applies_overrides() -> None:
    section = parse("corpus: {out: x, rate: 1}", "inner.width=9", "out=y z")
    assert section == Example(out="y z", inner=Inner(width=9), rate=1.0)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("corpus: {out: x, wdith: 3}", None, "r.yaml, section corpus: .*wdith"),
        ("corpus: {out: x, inner: {widht: 3}}", None, "widht"),
        ("corpus: {out: 3}", None, 'wrong value type for field "out"'),
        ("corpus: {out: x}", "inner.side=up", r"inner.side: 'up' is none of \('left', 'right'\)"),
        ("corpus: {rate: 2}", None, '"out"'),
        ("corpus: {out: x, rate: -1}", None, "rate: -1.0 is not above 0"),
        ("corpus: {out: x}", "rate", "expected key=value, got 'rate'"),
        ("corpus: {out: x}", "out.deeper=1", "out is not a group of settings"),
        ("prepare: {out: x}", None, "r.yaml has no section 'corpus'"),
        ("corpus: {out: x, width: 3}", None, r"did you mean inner.width\?"),
    ],
)
def test_parse_section_names_the_field_in_errors(
    text: str, override: str | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(text, *([override] if override else []))


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("corpus: {out: x, speed: 1}", None, "corpus.speed is called rate now"),
        ("corpus: {out: x}", "speed=1", "corpus.speed is called rate now"),
        ("corpus: {out: x}", "inner.extent=1", "corpus.inner.extent is called width now"),
        ("corpus: {out: x, inner: {breadth: 1}}", None, "corpus.inner.breadth is called width now"),
        ("corpus: {out: x, core: {width: 1}}", None, "corpus.core is called inner now"),
        ("corpus: {out: x}", "core.width=1", "corpus.core is called inner now"),
        (
            "corpus: {out: x, layers: [{width: 1}, {extent: 1}]}", None,
            r"corpus.layers\[1\].extent is called width now",
        ),
        (
            "corpus: {out: x, named: {a b: {extent: 1}}}", None,
            "corpus.named.a b.extent is called width now",
        ),
        ("corpus: {out: x, extra: {extent: 1}}", None, "corpus.extra.extent is called width now"),
    ],
)  # fmt: skip
def test_formerly_makes_a_former_name_fail_with_the_present_one(
    text: str, override: str | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^r\.yaml: {message}$"):
        parse(text, *([override] if override else []))


def test_formerly_accepts_a_former_name_where_it_is_a_key_of_a_mapping() -> None:
    section = parse(
        "corpus: {out: x, layers: [{width: 1}], named: {extent: {width: 2}}, extra: null}"
    )
    assert section.layers == [Inner(width=1)] and section.named == {"extent": Inner(width=2)}


def test_formerly_and_location_compose() -> None:
    with pytest.raises(RecipeError, match="corpus.output is called out now"):
        parse_section({"corpus": {"output": "x"}}, "corpus", Locations, source="r.yaml")


def test_parse_section_makes_locations_absolute(home: Path) -> None:
    content = {
        "corpus": {
            "corpora": ["a", "/b", "s3://bucket/c", f"file://{home}/d"],
            "warm_start": {"ar": "nano", "nar": "runs/x"},
            "inputs": [{"root": "speech"}],
            "optional": {"root": "more/speech"},
        }
    }
    section = parse_section(content, "corpus", Locations, source="r.yaml")
    assert section.out == f"{home}/runs", "a default is resolved too"
    assert section.codec == "nano" and section.baseline is None
    assert section.corpora == (f"{home}/a", "/b", "s3://bucket/c", f"{home}/d")
    assert section.warm_start == {"ar": "nano", "nar": f"{home}/runs/x"}
    assert section.inputs == (Inputs(root=f"{home}/speech"),)
    assert section.optional == Inputs(root=f"{home}/more/speech", note="a/b")
    assert resolve_paths(section) == section, "a second time changes nothing"


def test_resolve_paths_takes_a_name_for_a_path_only_with_a_slash(home: Path) -> None:
    (home / "nano").mkdir()
    for codec, resolved in (
        ("nano", "nano"),
        ("./nano", f"{home}/nano"),
        ("codecs/nano", f"{home}/codecs/nano"),
        ("nano3", f"{home}/nano3"),
    ):
        assert resolve_paths(Locations(codec=codec)).codec == resolved


def change_folder(folder: str) -> None:
    os.chdir(folder)
    del os.environ["VALLE_HOME"]


def test_resolve_paths_serves_a_worker_in_another_folder(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A process elsewhere, without `VALLE_HOME`, reads the driver's file by a relative path."""
    storage.write_bytes("tokens/one", b"1")
    relative = Locations(out="tokens/one")
    elsewhere = str(tmp_path_factory.mktemp("elsewhere"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, change_folder, (elsewhere,)) as worker:
        assert not worker.submit(storage.exists, relative.out).result()
        assert worker.submit(storage.read_bytes, resolve_paths(relative).out).result() == b"1"


def test_exit_on_error_reports_a_recipe_error_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_error():
        raise RecipeError("train.workers: too many")
    assert capsys.readouterr().err == "error: train.workers: too many\n"
    with pytest.raises(ValueError, match="a fault of ours"), exit_on_error():
        raise ValueError("a fault of ours")


def test_train_recipe_paths_reach_workers_as_absolute_ones(home: Path) -> None:
    """Workers of Ray Train have another current folder; `nano` stays the shipped codec."""
    check = QuickCheck(recordings="data/evaluation", nar_checkpoint="runs/nano-nar")
    recipe = TrainRecipe(data="tokens", run="r", codec="codecs/mine", quick_check=check)
    (home / "nano").mkdir()
    resolved = resolve_paths(recipe)
    assert (resolved.data, resolved.codec) == (f"{home}/tokens", f"{home}/codecs/mine")
    assert resolved.quick_check is not None
    assert resolved.quick_check.recordings == f"{home}/data/evaluation"
    assert resolved.quick_check.nar_checkpoint == f"{home}/runs/nano-nar"
    assert resolve_paths(TrainRecipe(data="tokens", run="r")).codec == "nano"
