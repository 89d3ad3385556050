"""The first commands of the README in a fresh clone: nothing published, nothing in the home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_bundles import pack_bundle
from mlflow import MlflowClient

from valle.jobs.speak import main
from valle.model.codec.encodec import Encodec
from valle.platform import audio, model_versions, registry

ROOT = Path(__file__).parent.parent


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """A second of speech by espeak, which the tests have anyway."""
    from valle.jobs.speakers.espeak import Espeak

    path = tmp_path / "voice.wav"
    wave = Espeak().synthesize("The weather is fine today.", "m3", "en-us")
    path.write_bytes(audio.wav_bytes(wave))
    return path


@pytest.mark.slow
def test_the_command_speaks_with_the_shipped_model(tmp_path: Path, voice: Path) -> None:
    """`python -m valle "text" ref.wav out.wav` from another folder, and an empty `VALLE_HOME`."""
    home = tmp_path / "home"
    home.mkdir()
    out = tmp_path / "out.wav"
    environment = {
        **os.environ, "VALLE_HOME": str(home), "VALLE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "valle", "Hello there.", str(voice), str(out)]
    result = subprocess.run(
        [*command, "--max-ar-steps", "30"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(audio.read(out.read_bytes(), max_seconds=30)) > 2_400
    assert "has no champion: using the model shipped with the code" in result.stderr
    assert not list(home.iterdir()), "nothing is written to the home"


def test_every_user_of_the_champion_gets_the_shipped_model_of_an_empty_registry(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pinned = registry.pin(registry.CHAMPION)
    assert pinned.startswith(f"{registry.SHIPPED_BUNDLE}#")
    assert "has no champion: using the model shipped with the code" in caplog.text
    assert registry.resolve(registry.CHAMPION).is_relative_to(home / "cache")
    assert registry.current_version(registry.CHAMPION, None, None, None) == pinned
    assert registry.current_version(registry.CHAMPION, None, None, pinned) == pinned
    for other in ("models:/valle@candidate", "models:/valle/1", "models:/mine@champion"):
        with pytest.raises(FileNotFoundError, match="train and publish one"):
            registry.pin(other)
    assert not (home / "mlflow.db").exists()
    assert model_versions.champion_version() is None and model_versions.list_versions() == []
    assert not (home / "mlflow.db").exists()


@pytest.mark.usefixtures("database")
def test_a_registry_without_a_champion_leaves_the_shipped_model(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `make demo`. A champion that was there is missed."""
    version = model_versions.publish(pack_bundle(home, tiny_codec_folder, tiny_codec.identity), {})
    shipped = registry.pin(registry.CHAMPION)
    assert shipped.startswith(str(registry.SHIPPED_BUNDLE))
    model_versions.promote(version, "a test")
    assert registry.pin(registry.CHAMPION).startswith("models:/valle/1#")
    MlflowClient(registry.registry_address()).delete_registered_model_alias("valle", "champion")
    with pytest.raises(FileNotFoundError, match="promote N --reason"):
        registry.pin(registry.CHAMPION)
    assert main(["Hello.", str(home / "none.wav"), str(home / "out.wav")]) == 2
    assert "promote N --reason" in capsys.readouterr().err


def test_build_app_serves_the_shipped_model_or_names_what_is_missing(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `serve deploy` does: before anything starts."""
    from valle.serve.app import build_app
    from valle.serve.app_args import AppArgs

    build_app(AppArgs(voices=str(home)))
    assert "has no champion: using the model shipped with the code" in caplog.text
    for model, reason in (
        ("models:/valle@demo", "has no models:/valle@demo; train and publish one"),
        (str(home / "none"), "bundle.json is missing"),
    ):
        with pytest.raises(FileNotFoundError, match=reason):
            build_app(AppArgs(voices=str(home), model=model))
