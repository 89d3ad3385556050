"""The model registry: a voice model as one MLflow version of plain files.

    ar/ nar/            checkpoints (weights and description)
    codec/              the codec's weights, unless it is the official one
    bundle.json         codec identity, where the parts came from
    sample.wav          what it sounds like

Nothing in it is pickled, and nothing is executed on loading.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import dacite

from valle.model import codec as codecs
from valle.model.ar import AR
from valle.model.codec import CodecIdentity
from valle.model.nar import NAR
from valle.model.valle import Voice
from valle.platform import checkpoint, settings, storage, tracking

NAME = "valle"
CHAMPION = f"models:/{NAME}@champion"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """`bundle.json`."""

    codec: CodecIdentity
    official_codec: bool
    """True when the codec is `encodec-24khz`, whose weights are not copied."""
    ar: str
    """URI of the checkpoint it was made from."""
    nar: str
    """URI of the checkpoint it was made from."""


def pack(ar: str, nar: str, codec: str, folder: Path) -> Bundle:
    """Gathers two checkpoints and a codec in `folder`; checks that they belong together."""
    _fetch(ar, folder / "ar")
    _fetch(nar, folder / "nar")
    identity = codecs.load(codec, cache=settings.read().cache).identity
    for part, kind in (("ar", "ar"), ("nar", "nar")):
        description = checkpoint.read(folder / part)
        if description.kind != kind:
            raise ValueError(f"{part}: the checkpoint holds a model of kind {description.kind!r}")
        identity.check(description.codec, f"the {part.upper()} checkpoint")
    official = codec == "encodec-24khz"
    if not official:
        source = codecs.NANO_FOLDER if codec == "nano" else Path(codec)
        (folder / "codec").mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(source / name, folder / "codec" / name)
    bundle = Bundle(codec=identity, official_codec=official, ar=ar, nar=nar)
    (folder / "bundle.json").write_text(json.dumps(asdict(bundle), indent=2) + "\n")
    return bundle


def _fetch(uri: str, folder: Path) -> None:
    """Weights and description of a checkpoint, from anywhere."""
    folder.mkdir(parents=True)
    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        source = storage.join(uri, name)
        if not storage.exists(source):
            raise FileNotFoundError(f"no checkpoint at {uri}: {name} is missing")
        (folder / name).write_bytes(storage.read_bytes(source))


def publish(folder: Path, alias: str, tags: dict[str, str]) -> int:
    """Registers a packed bundle as the next version and points `alias` at it."""
    import mlflow

    tracking.connect()
    client = mlflow.MlflowClient()
    with mlflow.start_run(run_name=f"publish-{NAME}") as run:
        mlflow.set_tags({**tags, "code_version": tracking.code_version()})
        model = mlflow.initialize_logged_model(name=NAME, source_run_id=run.info.run_id)
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        version = mlflow.register_model(f"models:/{model.model_id}", NAME)
    client.set_registered_model_alias(NAME, alias, version.version)
    for key, value in tags.items():
        client.set_model_version_tag(NAME, version.version, key, value)
    return int(version.version)


def resolve(source: str, tracking_uri: str | None = None) -> Path:
    """The local folder of a bundle: a path as it is, `models:/...` through the registry.

    Raises FileNotFoundError when there is no such model, with what to do.
    """
    if not source.startswith("models:/"):
        path = Path(source)
        if not (path / "bundle.json").is_file():
            raise FileNotFoundError(f"no model bundle at {source}: bundle.json is missing")
        return path
    import mlflow
    from mlflow.exceptions import MlflowException

    tracking.connect(tracking_uri)
    try:
        return Path(mlflow.artifacts.download_artifacts(source))
    except MlflowException as error:
        raise FileNotFoundError(
            f"the registry at {mlflow.get_tracking_uri()} has no {source} ({error.message}); "
            "train and publish one (make demo), or name a folder with --model"
        ) from error


def load_ar(folder: Path, device: str = "cpu") -> AR:
    """The AR model of a bundle."""
    model, _ = checkpoint.load(folder / "ar", device)
    assert isinstance(model, AR), "pack() has checked the kind"
    return model


def load_nar(folder: Path, device: str = "cpu") -> NAR:
    """The NAR model of a bundle."""
    model, _ = checkpoint.load(folder / "nar", device)
    assert isinstance(model, NAR), "pack() has checked the kind"
    return model


def load_codec(folder: Path, device: str = "cpu") -> codecs.Codec:
    """The codec of a bundle. Raises ValueError when its weights are not those it was made with."""
    values = json.loads((folder / "bundle.json").read_text())
    bundle = dacite.from_dict(Bundle, values, dacite.Config(strict=True))
    source = "encodec-24khz" if bundle.official_codec else str(folder / "codec")
    codec = codecs.load(source, device=device, cache=settings.read().cache)
    codec.identity.check(bundle.codec, "the bundle")
    return codec


def load_voice(folder: Path, device: str = "cpu") -> Voice:
    """All three networks of a bundle."""
    return Voice(load_ar(folder, device), load_nar(folder, device), load_codec(folder, device))
