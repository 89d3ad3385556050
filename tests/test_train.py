"""Training on Ray: equal to the plain loop, both backends, killed workers, resumed runs."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from helpers import clusters
from helpers.tiny_models import TINY_CODEC
from helpers.training import last_checkpoint, run_two_ranks, tiny_train_recipe, write_tones

from valle.jobs import train_codec, train_quantizer
from valle.jobs.train import fit, resolve_recipe
from valle.jobs.train_codec import CodecRecipe
from valle.jobs.train_quantizer import QuantizerRecipe
from valle.jobs.training import run_folder
from valle.jobs.training.language_model import LanguageModelTrainee, build_backend
from valle.jobs.training.optimizer import Optimization
from valle.jobs.training.recipe import ModelSize, TrainRecipe
from valle.jobs.training.validation import QuickCheck
from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec
from valle.model.codec.quantizer import QuantizerConfig
from valle.model.codec.weights import load_quantizer
from valle.platform import checkpoint, checkpoint_files, tracking
from valle.platform.dataset import TokenDataset
from valle.platform.recipe import RecipeError
from valle.platform.resources import Placement


@pytest.fixture
def ray_cluster(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less per run


@pytest.fixture
def recipe(home: Path, tiny_codec: Encodec, tiny_codec_folder: Path) -> TrainRecipe:
    return tiny_train_recipe(home, tiny_codec, tiny_codec_folder)


def losses(name: str) -> dict[int, float]:
    return logged(name, "train/loss")


def logged(name: str, metric: str) -> dict[int, float]:
    """A metric by step, as MLflow has it (the last value wins after a restart)."""
    import mlflow

    tracking.configure()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    history = [m for run in runs for m in client.get_metric_history(run.info.run_id, metric)]
    return {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}


def weights(uri: str) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(Path(uri))


@pytest.mark.ray
def test_fit_equals_two_plain_ranks(
    ray_cluster: None, recipe: TrainRecipe, home: Path, tmp_path: Path
) -> None:
    """DDP on Ray and the same loop in two processes without Ray: same losses, same weights."""
    import mlflow

    for kind in ("ar", "nar"):
        uri = fit(recipe, kind)
        _, metadata = checkpoint.load(Path(uri))
        assert metadata.kind == kind and metadata.recipe["run"] == "test"
        losses_by_step = losses(f"test-{kind}")
        assert list(losses_by_step) == list(range(1, 25))
        plain = run_two_ranks(partial(LanguageModelTrainee, recipe, kind), tmp_path / kind)
        assert losses_by_step == {step: metrics["train/loss"] for step, metrics in plain.items()}
        expected = weights(str(last_checkpoint(tmp_path / kind)))
        for name, value in weights(uri).items():
            assert torch.equal(value, expected[name]), name
        assert checkpoint.load_state(Path(uri)).step == 24

        client = mlflow.MlflowClient()
        (run,) = mlflow.search_runs(
            experiment_names=["valle"], filter_string=f"attributes.run_name = 'test-{kind}'",
            output_format="list",
        )  # fmt: skip
        assert run.info.status == "FINISHED"
        assert run.data.params["optimization.warmup"] == "5"
        assert run.data.tags["code_version"] == tracking.code_version()
        assert "validation/loss_wrong_text" in run.data.metrics
        accuracies = [m for m in run.data.metrics if m.startswith("validation/accuracy_codebook")]
        assert len(accuracies) == (1 if kind == "ar" else 6)  # six utterances, a level each
        names = [a.path for a in client.list_artifacts(run.info.run_id, "samples/00000024")]
        assert any(n.endswith("-recording.wav") for n in names)
        assert sum(n.endswith(".png") for n in names) == sum(n.endswith(".wav") for n in names)
        assert math.isfinite(run.data.metrics["train/gradient_norm"])


@pytest.mark.ray
def test_fit_deepspeed_equals_ddp_and_resumes(ray_cluster: None, recipe: TrainRecipe) -> None:
    """ZeRO-1 on the NAR, whose per-level weights are what breaks it in other designs."""
    short = replace(recipe, steps={"nar": 10}, checkpoint_every=5, samples=0, models=("nar",))
    ddp = weights(fit(replace(short, run="ddp"), "nar"))
    uri = fit(replace(short, run="zero", backend="deepspeed"), "nar")
    assert json.loads((Path(uri) / "state/deepspeed.json").read_text())["zero_stage"] == 1
    zero = weights(uri)
    assert ddp.keys() == zero.keys()
    for name, value in ddp.items():
        torch.testing.assert_close(zero[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert list(losses("zero-nar").values()) == pytest.approx(
        list(losses("ddp-nar").values()), rel=1e-4
    )
    # resumed from step 7 equals uninterrupted, to the last bit
    longer = replace(short, steps={"nar": 14}, optimization=Optimization(warmup=50))
    uninterrupted = weights(fit(replace(longer, run="uninterrupted", backend="deepspeed"), "nar"))
    first = replace(longer, run="parts", backend="deepspeed", steps={"nar": 7})
    fit(first, "nar")
    parts = weights(fit(replace(first, steps={"nar": 14}), "nar"))
    for name, value in uninterrupted.items():
        assert torch.equal(parts[name], value), name


@pytest.mark.ray
@pytest.mark.parametrize("stage", [2, 3])
def test_fit_zero_2_and_3_equal_ddp(ray_cluster: None, recipe: TrainRecipe, stage: int) -> None:
    short = replace(recipe, steps={"nar": 6}, checkpoint_every=3, samples=0, models=("nar",))
    ddp = weights(fit(replace(short, run="ddp"), "nar"))
    zero = weights(fit(replace(short, run="zero", backend="deepspeed", zero_stage=stage), "nar"))
    assert ddp.keys() == zero.keys()
    for name, value in ddp.items():
        torch.testing.assert_close(zero[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.ray
@pytest.mark.parametrize("backend", ["ddp", "deepspeed"])
def test_fit_bf16_follows_fp32(ray_cluster: None, recipe: TrainRecipe, backend: str) -> None:
    """Losses agree to bf16's three digits, and the weights in the checkpoint are float32."""
    short = replace(recipe, steps={"ar": 8}, checkpoint_every=8, samples=0, models=("ar",))
    fit(replace(short, run="fp32"), "ar")
    uri = fit(replace(short, run="bf16", backend=backend, precision="bf16"), "ar")
    full, half = (list(losses(f"{name}-ar").values()) for name in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=1e-2)
    assert half != full
    assert {value.dtype for value in weights(uri).values()} == {torch.float32}


@pytest.mark.ray
def test_fit_resumed_ranks_checkpoints_without_a_score(
    ray_cluster: None, recipe: TrainRecipe
) -> None:
    """Ray keeps the scores of checkpoints as JSON and compares them after a restart."""
    check = QuickCheck(recordings="nowhere", every=800)  # due long after this run
    first = replace(
        recipe, quick_check=check, models=("ar",), steps={"ar": 8}, samples=0, keep_checkpoints=2
    )
    fit(first, "ar")
    uri = fit(replace(first, steps={"ar": 24}), "ar")
    assert checkpoint.load_state(Path(uri)).step == 24
    assert len(list(Path(uri).parent.glob("step_*"))) == 2


@pytest.mark.ray
def test_fit_codecs_track_export_and_resume(ray_cluster: None, home: Path) -> None:
    """The codecs' trainers on the same adapter: MLflow, `out`, and a run's name."""
    corpus = str(write_tones(home / "corpus", ("a/0", "a/1", "b/0", "b/1", "c/0")))
    storage_path = str(home / "runs")
    cpu = Placement(accelerator="cpu")  # the shared cluster's GPU is only a number
    codec = CodecRecipe(
        data=corpus, out=str(home / "encodec"), run="codec", held_out_every=4, codec=TINY_CODEC,
        steps=4, batch_size=4, crop_seconds=0.2, log_every=1, checkpoint_every=2, workers=2,
        threads=1, storage_path=storage_path, keep_checkpoints=1, placement=cpu,
    )  # fmt: skip
    quantizer = QuantizerRecipe(
        corpora=(corpus,), out=str(home / "quantizer"), run="quantizer", held_out_speakers=("c",),
        steps=4, unquantized_steps=2, batch_size=4, log_every=1, checkpoint_every=2, threads=1,
        storage_path=storage_path, keep_checkpoints=1, placement=cpu,
        quantizer=QuantizerConfig(
            n_codebooks=2, codebook_size=16, dimension=8, width=16, blocks=1
        ),
    )  # fmt: skip
    for run, term, validation, name in (
        (lambda: train_codec.fit(codec), "train/mel", "validation/mel", "codec"),
        (lambda: train_quantizer.fit(quantizer), "train/error", "validation/error_2_codebooks",
         "quantizer"),
    ):  # fmt: skip
        uri = run()
        assert Path(uri).name == "step_00000004"
        assert [path.name for path in Path(uri).parent.glob("step_*")] == ["step_00000004"]
        history = logged(name, term)
        assert list(history) == [1, 2, 3, 4]
        assert list(logged(name, validation))[-1] == 4
        assert run() == uri, "a finished run of this name takes no step"
    assert encodec.load(codec.out).identity.name == TINY_CODEC.name
    assert load_quantizer(Path(quantizer.out)).config == quantizer.quantizer


def training_workers() -> list[psutil.Process]:
    """Processes of this test's own cluster that run the training loop."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
        except psutil.NoSuchProcess:
            continue
    return workers


@pytest.mark.ray
def test_fit_with_a_killed_worker_equals_uninterrupted(
    ray_cluster: None, recipe: TrainRecipe, home: Path
) -> None:
    """SIGKILL of one of two workers mid-run: the run finishes with the same losses and weights."""
    import threading

    steps = {"ar": 240}
    long = replace(recipe, steps=steps, models=("ar",), checkpoint_every=40, samples=0)
    expected = fit(replace(long, run="uninterrupted"), "ar")
    killed: list[int] = []

    def kill_one() -> None:
        folder = home / "runs" / "interrupted-ar"
        clusters.wait_for(lambda: any(folder.glob("step_*/config.json")), 120, "a checkpoint")
        clusters.wait_for(lambda: len(training_workers()) == 2, 60, "two workers")
        victim = training_workers()[-1]
        victim.kill()
        killed.append(victim.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    uri = fit(replace(long, run="interrupted"), "ar")
    thread.join()
    assert killed
    first, second = losses("uninterrupted-ar"), losses("interrupted-ar")
    assert len(first) == 240 and first == second
    ours = weights(uri)
    for name, value in weights(expected).items():
        assert torch.equal(ours[name], value), name


def test_resolve_recipe_refuses_another_codec(
    home: Path, tiny_codec: Encodec, tmp_path: Path, recipe: TrainRecipe
) -> None:
    with pytest.raises(ValueError, match="codec mismatch: the dataset"):
        resolve_recipe(replace(recipe, codec="nano"))


def test_build_backend_warm_start_takes_weights_only(recipe: TrainRecipe, home: Path) -> None:
    device = torch.device("cpu")
    earlier = build_backend(replace(recipe, seed=5), "ar", device)
    manifest = TokenDataset(recipe.data, home / "cache").manifest
    metadata = checkpoint.new_metadata(recipe.model.resolve("ar"), manifest.codec, "x", {})
    checkpoint.save(home / "runs/earlier-ar/step_00000010", earlier.weights(), metadata)

    warm = resolve_recipe(replace(recipe, warm_start={"ar": "runs/earlier-ar"}))
    started = build_backend(warm, "ar", device, manifest.codec).weights()
    for name, value in earlier.weights().items():
        assert torch.equal(started[name], value), name
    fresh = build_backend(recipe, "ar", device).weights()
    assert not torch.equal(fresh["head.weight"], started["head.weight"])

    grouped = replace(warm, model=replace(warm.model, group_size=2))
    with pytest.raises(ValueError, match="earlier-ar has group_size 1, this run has 2"):
        build_backend(grouped, "ar", device, manifest.codec)
    with pytest.raises(ValueError, match="earlier-ar holds an AR model"):
        build_backend(
            replace(warm, warm_start={"nar": warm.warm_start["ar"]}), "nar", device, manifest.codec
        )
    other = replace(manifest.codec, sha256="0" * 64)
    with pytest.raises(ValueError, match="codec mismatch"):
        build_backend(warm, "ar", device, other)
    resumed = build_backend(warm, "ar", device).weights()  # of its own checkpoint, later
    assert torch.equal(resumed["head.weight"], fresh["head.weight"])
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resolve_recipe(replace(recipe, warm_start={"ar": "runs/nowhere"}))
    with pytest.raises(ValueError, match="warm_start: 'arr' is none of ar, nar"):
        replace(recipe, warm_start={"arr": "nano"})


def test_train_recipe_names_bad_fields() -> None:
    with pytest.raises(ValueError, match="model.size: 'nano' is called 'mini' now"):
        TrainRecipe(data="x", run="y", model=ModelSize(size="nano"))
    with pytest.raises(ValueError, match="model.size: 'huge' is none of"):
        TrainRecipe(data="x", run="y", model=ModelSize(size="huge"))
    with pytest.raises(ValueError, match="zero_stage: 4"):
        TrainRecipe(data="x", run="y", zero_stage=4)
    with pytest.raises(ValueError, match="'ar' needs to be ar or nar, with steps"):
        TrainRecipe(data="x", run="y", steps={"nar": 5})


@pytest.mark.ray
def test_fit_refuses_stops_and_goes_on_after_damage(
    ray_cluster: None, recipe: TrainRecipe, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose newest checkpoint and Ray's list of checkpoints are broken equals an unbroken
    one; another seed is refused; a run without a finite loss ends with the reason."""
    short = replace(recipe, models=("ar",), steps={"ar": 8}, checkpoint_every=4, samples=0)
    short = replace(short, workers=1)
    uri = Path(fit(short, "ar"))
    assert checkpoint_files.is_sealed(str(uri))
    assert checkpoint_files.find_fault(str(uri), hashes=True) is None
    expected = {name: value.clone() for name, value in weights(str(uri)).items()}  # mapped

    content = bytearray((uri / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (uri / "model.safetensors").write_bytes(content)
    snapshot = uri.parent / run_folder.SNAPSHOT
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    assert fit(short, "ar") == str(uri)
    assert "SHA-256 differs" in caplog.text and "written anew" in caplog.text
    for name, value in weights(str(uri)).items():
        assert torch.equal(value, expected[name]), name

    with pytest.raises(RecipeError, match="seed: 0 -> 1.*resume_anyway"):
        fit(replace(short, seed=1), "ar")

    steep = Optimization(learning_rate=1e38, warmup=1)
    with pytest.raises(RecipeError, match=r"3 batches in a row .*max_skipped_in_row: 2"):
        fit(replace(short, run="steep", optimization=steep, max_skipped_in_row=2), "ar")
    files = sorted((home / "runs/steep-ar/skipped").iterdir())
    assert len(files) == 3 and json.loads(files[0].read_text())["items"][0].startswith("u")
