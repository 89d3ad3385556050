"""Publishing, the registry and the command line, on untrained models."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import clusters

from valle.__main__ import main as speak_main
from valle.__main__ import read_reference
from valle.jobs.export import ExportRecipe, export
from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.starter_voices import make_starter_voices
from valle.model.quantize import to_int8
from valle.model.valle import Synthesis
from valle.platform import audio, checkpoint, registry, storage, tracking


def test_publish_registers_plain_files_and_moves_the_alias(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    import mlflow

    assert publish(publish_recipe) == 1
    assert publish(publish_recipe) == 2
    folder = registry.resolve(registry.CHAMPION)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "ar/config.json", "ar/model.safetensors", "nar/config.json", "nar/model.safetensors",
        "codec/config.json", "codec/model.safetensors", "bundle.json", "sample.wav", "sample.png",
    }  # fmt: skip
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("valle", "champion")
    assert int(version.version) == 2
    assert version.tags["ar"].endswith("runs/test-ar/step_00000020")


def test_an_exported_model_speaks_like_its_source_and_seeds_a_registry(
    publish_recipe: PublishRecipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ar, nar = home / publish_recipe.ar, home / publish_recipe.nar
    version = publish(replace(publish_recipe, ar=str(ar), nar=f"file://{nar}"))
    evaluation = home / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.json").write_text(f'{{"bundle": {{"ar": "{home}/runs/test-ar"}}}}')
    registry.attach(version, evaluation)
    (home / "small").mkdir()
    (home / "small/report.md").write_text("of another model")
    source = registry.resolve(registry.CHAMPION)
    small = export(ExportRecipe(out="small"))
    exact = export(ExportRecipe(out="exact", precision="fp32"))
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
    ours, theirs = (checkpoint.load_weights(f / "nar") for f in (small, source))
    for name, value in theirs.items():
        bound = value.abs().amax(-1, keepdim=True) / 253
        assert ((ours[name] - value).abs() <= bound).all(), name

    assert registry.publish_shipped() is None  # there is a champion already
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/another.db")
    monkeypatch.setattr(registry, "SHIPPED_BUNDLE", small)
    assert registry.publish_shipped() == 1 and registry.publish_shipped() is None
    assert registry.champion_version() == 1
    again = registry.load_ar(registry.resolve(registry.CHAMPION)).head.weight
    assert again.equal(registry.load_ar(small).head.weight)


def test_weights_without_their_scales_are_refused(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    folder = home / "runs/test-ar/step_00000020"
    weights = to_int8(checkpoint.load_weights(folder))
    del weights["head.weight.scale"]
    checkpoint.save(folder, weights, checkpoint.read_metadata(folder))
    with pytest.raises(ValueError, match="head.weight is int8 and has no head.weight.scale"):
        checkpoint.load(folder)


def test_starter_voices_are_made_once(home: Path) -> None:
    folder = str(home / "fresh")
    make_starter_voices(folder)
    assert sorted(storage.list_files(folder, (".wav",))) == ["heart.wav", "joe.wav"]
    wave = audio.read(storage.read_bytes(storage.join(folder, "joe.wav")), max_seconds=60)
    assert 3 < len(wave) / 24_000 < 8
    (home / "fresh/joe.wav").unlink()
    make_starter_voices(folder)
    assert list(storage.list_files(folder, (".wav",))) == ["heart.wav"]


@pytest.fixture
def mlflow_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real tracking server that keeps artifacts itself, as a team's would."""
    port = clusters.free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{home}/server.db",
        "--artifacts-destination", str(home / "server-artifacts"),
    ]  # fmt: skip
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        clusters.wait_for(lambda: clusters.responds(f"{address}/health"), 120, "MLflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def log_as_worker(run_id: str, address: str) -> None:
    """What the first worker of a training does, in a process of its own."""
    worker = tracking.worker_run(run_id, address)
    worker.log_metrics({"train/loss": 2.5}, step=3)
    worker.log_audio([("hello", np.zeros(2_400, np.float32))], step=3)
    worker.close()


@pytest.mark.slow
def test_runs_and_registry_on_a_real_mlflow_server(
    publish_recipe: PublishRecipe, home: Path, mlflow_server: str
) -> None:
    import mlflow

    with (
        tracking.driver_run("served", {"optimization": {"warmup": 5}}) as run_id,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other,
    ):
        other.submit(log_as_worker, run_id, mlflow_server).result()
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 2.5)
    assert run.data.params == {"optimization.warmup": "5"}
    artifacts = {a.path for a in client.list_artifacts(run_id, "samples/00000003")}
    assert artifacts == {"samples/00000003/hello.wav", "samples/00000003/hello.png"}

    assert publish(publish_recipe) == 1
    folder = registry.resolve(registry.CHAMPION)
    assert (folder / "codec/model.safetensors").read_bytes() == (
        Path(publish_recipe.codec) / "model.safetensors"
    ).read_bytes()
    prompt = audio.read((home / "voices/ann.wav").read_bytes(), max_seconds=10)
    result = registry.load_synthesizer(folder).synthesize(
        "hello", prompt, Synthesis(max_seconds=0.2)
    )
    assert result.codes.shape[0] == 8
    # artifacts went through the server, not into a folder of this process
    assert any((home / "server-artifacts").rglob("sample.wav"))
    assert not (home / "mlruns").exists() and not (home / "mlflow.db").exists()


def test_parts_that_do_not_belong_together_are_refused(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    with pytest.raises(ValueError, match="ar: the checkpoint holds a model of kind 'nar'"):
        publish(replace(publish_recipe, ar="runs/test-nar"))
    with pytest.raises(ValueError, match="codec mismatch: the AR checkpoint"):
        publish(replace(publish_recipe, codec="nano"))
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*: train first"):
        checkpoint.find_best(str(home / "runs/none"))
    with pytest.raises(FileNotFoundError, match="train and publish one"):
        registry.resolve("models:/valle@champion")


def test_command_line_speaks_and_is_repeatable(
    publish_recipe: PublishRecipe, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(publish_recipe)
    arguments = ["hello there", str(home / "voices/ann.wav")]
    for name in ("one.wav", "two.wav"):
        assert speak_main([*arguments, str(home / name), "--max-ar-steps", "40"]) == 0
    assert (home / "one.wav").read_bytes() == (home / "two.wav").read_bytes()
    by_path = [
        "--ar-ckpt", str(home / "runs/test-ar/step_00000020"),
        "--nar-ckpt", str(home / "runs/test-nar/step_00000020"), "--codec", publish_recipe.codec,
    ]  # fmt: skip
    assert speak_main([*arguments, str(home / "three.wav"), "--max-ar-steps", "40", *by_path]) == 0
    assert (home / "three.wav").read_bytes() == (home / "one.wav").read_bytes()
    assert "s of speech" in capsys.readouterr().out
    several = [arguments[0], f"{arguments[1]};{arguments[1]}", str(home / "four.wav")]
    assert speak_main([*several, "--max-ar-steps", "40"]) == 0
    assert (home / "four.wav").read_bytes() != (home / "one.wav").read_bytes()
    for wrong in (["...", arguments[1]], ["hello", f"{arguments[1]};{home / 'none.wav'}"]):
        assert speak_main([*wrong, str(home / "x.wav")]) == 2
    assert "text: nothing to say in it" in capsys.readouterr().err


def test_several_recordings_share_the_prompt(tmp_path: Path) -> None:
    """A tenth of a second of each tone, where the first alone would have filled it."""
    for hertz in (200, 400):
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(24_000) / 24_000)
        (tmp_path / f"{hertz}.wav").write_bytes(audio.wav_bytes(tone.astype(np.float32)))
    wave = read_reference(f"{tmp_path / '200.wav'};{tmp_path / '400.wav'}", 0.2)
    assert len(wave) == 4_800
    for part, hertz in ((wave[:2_400], 200), (wave[2_400:], 400)):
        assert np.abs(np.fft.rfft(part)).argmax() == hertz // 10
    assert len(read_reference(str(tmp_path / "200.wav"), 0.2)) == 24_000
