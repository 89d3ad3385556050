"""Storage, audio files, recipes and checkpoints."""

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import torch
from helpers.tiny_models import TINY_AR, random_batch, tiny_ar, tiny_nar

from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.jobs.training.recipe import TrainRecipe
from valle.model.ar import AR
from valle.model.codec.encodec import Encodec
from valle.platform import audio, checkpoint, recipe, settings, storage
from valle.platform.checkpoint import TrainState
from valle.platform.recipe import RECIPES, RecipeError, formerly


def test_storage_verbs_on_a_folder(home: Path) -> None:
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


def sound(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3"])
def test_audio_becomes_24_khz_mono(format: str) -> None:
    time = np.arange(48_000) / 48_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    stereo = np.stack([tone, np.zeros_like(tone)], axis=1)
    wave = audio.read(sound(stereo, 48_000, format), max_seconds=5)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(24_000, abs=1_500 if format == "MP3" else 1)
    assert np.abs(wave).max() == pytest.approx(0.25, abs=0.02)
    spectrum = np.abs(np.fft.rfft(wave[:24_000], 24_000))
    assert int(spectrum.argmax()) == 440


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable audio"),
        (b"RIFFgarbage", "unreadable audio"),
        (sound(np.zeros((0, 1)), 24_000, "WAV"), "empty audio"),
        (sound(np.zeros(24_000 * 4), 24_000, "FLAC"), "too long: 4.0 s, limit 3 s"),
        (sound(np.full(2400, np.nan), 24_000, "WAV", "FLOAT"), "NaN or infinite"),
    ],
)
def test_bad_audio_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(audio.AudioError, match=reason):
        audio.read(data, max_seconds=3)


def test_loudness_of_a_full_scale_sine() -> None:
    wave = np.sin(np.linspace(0, 2000 * np.pi, 24_000)).astype(np.float32)
    assert audio.rms_dbfs(wave) == pytest.approx(-3.0, abs=0.1)


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


def write_recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


def test_recipe_with_overrides(tmp_path: Path) -> None:
    name = write_recipe(tmp_path, "corpus: {out: x, rate: 1}")
    loaded = recipe.load(name, "corpus", Example, ["inner.width=9", "out=y z"])
    assert loaded == Example(out="y z", inner=Inner(width=9), rate=1.0)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("corpus: {out: x, wdith: 3}", [], "wdith"),
        ("corpus: {out: x, inner: {widht: 3}}", [], "widht"),
        ("corpus: {out: 3}", [], 'wrong value type for field "out"'),
        ("corpus: {out: x}", ["inner.side=up"], r"inner.side: 'up' is none of \('left', 'right'\)"),
        ("corpus: {rate: 2}", [], '"out"'),
        ("corpus: {out: x, rate: -1}", [], "rate: -1.0 is not above 0"),
        ("corpus: {out: x}", ["rate"], "expected key=value, got 'rate'"),
        ("corpus: {out: x}", ["out.deeper=1"], "out is not a group of settings"),
        ("corpse: {out: x}", [], "unknown section 'corpse'"),
        ("prepare: {out: x}", [], "has no section 'corpus'"),
    ],
)
def test_a_bad_recipe_names_the_field(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.load(write_recipe(tmp_path, text), "corpus", Example, overrides)


def test_a_field_of_a_group_is_pointed_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean inner.width\?"):
        recipe.load(write_recipe(tmp_path, "corpus: {out: x, width: 3}"), "corpus", Example)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("corpus: {out: x, speed: 1}", [], "corpus.speed is called rate now"),
        ("corpus: {out: x}", ["speed=1"], "corpus.speed is called rate now"),
        ("corpus: {out: x}", ["inner.extent=1"], "corpus.inner.extent is called width now"),
        ("corpus: {out: x, inner: {breadth: 1}}", [], "corpus.inner.breadth is called width now"),
        ("corpus: {out: x, core: {width: 1}}", [], "corpus.core is called inner now"),
        ("corpus: {out: x}", ["core.width=1"], "corpus.core is called inner now"),
        (
            "corpus: {out: x, layers: [{width: 1}, {extent: 1}]}", [],
            r"corpus.layers\[1\].extent is called width now",
        ),
        (
            "corpus: {out: x, named: {a b: {extent: 1}}}", [],
            "corpus.named.a b.extent is called width now",
        ),
        ("corpus: {out: x, extra: {extent: 1}}", [], "corpus.extra.extent is called width now"),
        ("codec: {out: x}", [], "section codec is called train_codec now"),
        ("corpus: {out: x}\nquantizer: {}", [], "section quantizer is called train_quantizer now"),
    ],
)  # fmt: skip
def test_a_former_name_fails_with_the_present_one(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^r\.yaml: {message}$"):
        recipe.load(write_recipe(tmp_path, text), "corpus", Example, overrides)


def test_present_names_are_not_taken_for_former_ones(tmp_path: Path) -> None:
    text = "corpus: {out: x, layers: [{width: 1}], named: {extent: {width: 2}}, extra: null}"
    loaded = recipe.load(write_recipe(tmp_path, text), "corpus", Example)
    assert loaded.layers == [Inner(width=1)] and loaded.named == {"extent": Inner(width=2)}


def test_workers_know_where_things_are_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "VALLE_"))]:
        monkeypatch.delenv(name)
    shared = {
        "AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "http://s3:9000", "AWS_ENDPOINT_URL_S3": "http://s3:9000",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_S3_ENDPOINT_URL": "http://s3:9000",
        "VALLE_LOGICAL_GPUS": "1",
    }  # fmt: skip
    withheld = (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
        "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_BEARER_TOKEN",
        "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
        "VALLE_CACHE", "VALLE_SOMETHING_NEW", "SECRET",
    )  # fmt: skip
    for name, value in {"VALLE_HOME": "here", **shared, **dict.fromkeys(withheld, "mine")}.items():
        monkeypatch.setenv(name, value)
    # their folder is another one: paths are absolute
    assert settings.worker_environment() == {**shared, "VALLE_HOME": str(tmp_path / "here")}
    assert not caplog.records

    monkeypatch.setenv("VALLE_FORWARD", "AWS_SECRET_ACCESS_KEY")
    assert settings.worker_environment()["AWS_SECRET_ACCESS_KEY"] == "mine"
    assert "readable in Ray's logs and on its dashboard: AWS_SECRET_ACCESS_KEY" in caplog.text
    monkeypatch.delenv("VALLE_FORWARD")
    caplog.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    settings.worker_environment()
    assert caplog.text.rstrip().endswith("dashboard: MLFLOW_TRACKING_URI")
    for name, message in (
        ("VALLE_CACHE", "each node's own"), ("NOT_THERE", "NOT_THERE is not set"),
    ):  # fmt: skip
        monkeypatch.setenv("VALLE_FORWARD", name)
        with pytest.raises(ValueError, match=message):
            settings.worker_environment()


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="or one of: .*demo"):
        recipe.load("nonsense", "corpus", Example)


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe.parse_arguments(["--help"], "train", TrainRecipe, "Trains.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "optimization.learning_rate (float, default 0.0005)" in text
    assert "ddp or deepspeed." in text


def test_a_bad_command_line_ends_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe.parse_arguments(["backend=horovod"], "train", TrainRecipe, "Trains.")
    assert stop.value.code == 2
    assert "backend: 'horovod' is none of ('ddp', 'deepspeed')" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    from valle.jobs import (
        corpus,
        evaluate,
        export,
        prepare,
        publish,
        select_speakers,
        synthesize,
        train_codec,
        train_quantizer,
    )  # fmt: skip

    schemas = {
        "corpus": corpus.CorpusRecipe, "prepare": prepare.PrepareRecipe,
        "train_codec": train_codec.CodecRecipe, "train": TrainRecipe,
        "publish": publish.PublishRecipe, "evaluate": evaluate.EvaluateRecipe,
        "export": export.ExportRecipe, "synthesize": synthesize.SynthesizeRecipe,
        "train_quantizer": train_quantizer.QuantizerRecipe,
        "select_speakers": select_speakers.SelectionRecipe,
    }  # fmt: skip
    import yaml

    sections = yaml.safe_load(path.read_text())
    assert sections
    for section in sections:
        assert recipe.load(path.stem, section, schemas[section])


def make_metadata(codec: Encodec) -> checkpoint.CheckpointMetadata:
    return checkpoint.new_metadata(TINY_AR, codec.identity, "test", {"run": "x"})


def test_checkpoint_round_trip(tmp_path: Path, tiny_codec: Encodec) -> None:
    model = tiny_ar()
    checkpoint.save(tmp_path, model.state_dict(), make_metadata(tiny_codec))
    loaded, metadata = checkpoint.load(tmp_path)
    assert isinstance(loaded, AR) and metadata == make_metadata(tiny_codec)
    batch = random_batch(9, 14)
    assert torch.equal(loaded(batch), model(batch))


def test_the_best_checkpoint_of_a_run(tmp_path: Path, tiny_codec: Encodec) -> None:
    with pytest.raises(FileNotFoundError, match="train first"):
        checkpoint.find_best(str(tmp_path))
    metadata = checkpoint.new_metadata(TINY_AR, tiny_codec.identity, "test", {})
    for step, metrics in (
        (10, {"validation/wer": 0.5}), (20, {"validation/wer": 0.2}), (30, {"validation/loss": 1.0})
    ):  # fmt: skip
        folder = tmp_path / f"step_{step:08d}"
        checkpoint.save(folder, tiny_ar().state_dict(), metadata)
        checkpoint.save_metrics(folder, metrics)
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000020")
    assert checkpoint.find_best(str(tmp_path / "step_00000010")).endswith("step_00000010")
    for step in (10, 20):
        checkpoint.save_metrics(tmp_path / f"step_{step:08d}", {"validation/loss": 1.0})
    assert checkpoint.find_best(str(tmp_path)).endswith("step_00000030")


def test_optimizer_round_trip_continues_to_the_last_bit(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    batch, level = random_batch(9, 14), torch.tensor([3, 5])

    def steps(model: AR, optimizer: torch.optim.AdamW, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = Objective(model)(batch, level).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = tiny_ar()
    optimizer = build_optimizer(model, Optimization())
    steps(model, optimizer, 5)
    checkpoint.save(tmp_path, model.state_dict(), make_metadata(tiny_codec))
    checkpoint.save_state(tmp_path, TrainState(step=5, epoch=1, batch=2))
    checkpoint.save_optimizer(tmp_path, model, optimizer)
    uninterrupted = steps(model, optimizer, 5)

    resumed, _ = checkpoint.load(tmp_path)
    assert isinstance(resumed, AR)
    fresh = build_optimizer(resumed, Optimization())
    checkpoint.load_optimizer(tmp_path, resumed, fresh)
    assert steps(resumed, fresh, 5) == uninterrupted
    assert checkpoint.load_state(tmp_path) == TrainState(step=5, epoch=1, batch=2)


def test_damaged_checkpoints_are_refused(tmp_path: Path, tiny_codec: Encodec) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        checkpoint.read_metadata(tmp_path)
    checkpoint.save(tmp_path, tiny_nar().state_dict(), make_metadata(tiny_codec))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        checkpoint.load(tmp_path)  # a NAR's weights under an AR's metadata
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ValueError, match="does not fit its config.json"):
        checkpoint.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(ValueError, match="surprise"):
        checkpoint.read_metadata(tmp_path)


def test_a_recipe_that_cannot_run_is_reported_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), recipe.exit_on_error():
        raise RecipeError("train.workers: too many")
    assert capsys.readouterr().err == "error: train.workers: too many\n"
    with pytest.raises(ValueError, match="a fault of ours"), recipe.exit_on_error():
        raise ValueError("a fault of ours")
