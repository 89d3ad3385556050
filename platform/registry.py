"""The model registry: a voice model as one MLflow version of plain files.

    ar/ nar/            checkpoints (weights and metadata)
    codec/              the codec's weights, unless it is the official one
    bundle.json         codec identity, where the parts came from
    sample.wav          what it sounds like
    report.json, .md    its evaluation, once there is one

A new version is the `candidate`; `champion` is what is served. Each version keeps as tags when and
why it was promoted, and whom it replaced, so that a rollback knows where to go.

Nothing in it is pickled, and nothing is executed on loading.
"""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import dacite
from filelock import FileLock

from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.codec.interface import CodecIdentity
from valle.model.nar import NAR
from valle.model.valle import Synthesizer
from valle.platform import checkpoint, settings, storage, tracking
from valle.platform.cluster import CODE_ROOT

MODEL_NAME = "valle"
REGISTRY_PREFIX = "models:/"
CHAMPION = f"{REGISTRY_PREFIX}{MODEL_NAME}@champion"
SHIPPED_BUNDLE = CODE_ROOT / "release" / "nano"
"""The model that comes with the repository."""


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
    checkpoint.fetch(ar, folder / "ar")
    checkpoint.fetch(nar, folder / "nar")
    identity = encodec.load(codec, cache=settings.read().cache).identity
    for part, kind in (("ar", "ar"), ("nar", "nar")):
        metadata = checkpoint.read_metadata(folder / part)
        if metadata.kind != kind:
            raise ValueError(f"{part}: the checkpoint holds a model of kind {metadata.kind!r}")
        identity.check(metadata.codec, f"the {part.upper()} checkpoint")
    official = codec == "encodec-24khz"
    if not official:
        source = encodec.NANO_CODEC_FOLDER if codec == "nano" else Path(codec)
        (folder / "codec").mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(source / name, folder / "codec" / name)
    bundle = Bundle(codec=identity, official_codec=official, ar=ar, nar=nar)
    (folder / "bundle.json").write_text(json.dumps(asdict(bundle), indent=2) + "\n")
    return bundle


def publish(folder: Path, tags: dict[str, str]) -> int:
    """Registers a packed bundle as the next version, alias `candidate`; returns its number."""
    import mlflow

    tracking.configure()
    client = mlflow.MlflowClient()
    with mlflow.start_run(run_name=f"publish-{MODEL_NAME}") as run:
        mlflow.set_tags({**tags, "code_version": tracking.code_version()})
        model = mlflow.initialize_logged_model(name=MODEL_NAME, source_run_id=run.info.run_id)
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        version = mlflow.register_model(f"models:/{model.model_id}", MODEL_NAME)
    client.set_registered_model_alias(MODEL_NAME, "candidate", version.version)
    _tag(version.version, tags)
    return int(version.version)


def attach(version: int, folder: Path) -> None:
    """Adds the files of a local folder to a version."""
    import mlflow

    client = mlflow.MlflowClient()
    # models:/{its logged model}
    source: str = client.get_model_version(MODEL_NAME, str(version)).source
    client.log_model_artifacts(source.removeprefix("models:/"), str(folder))


def champion_version() -> int | None:
    """The version that is served, if any."""
    import mlflow
    from mlflow.exceptions import MlflowException

    tracking.configure()
    try:
        return int(mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion").version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def publish_shipped() -> int | None:
    """Publishes the shipped model as champion of an empty registry; returns its number then."""
    if list_versions() or not (SHIPPED_BUNDLE / "bundle.json").exists():
        return None
    version = publish(SHIPPED_BUNDLE, {"source": "shipped with the repository"})
    promote(version, "shipped with the repository")
    return version


def promote(version: int, reason: str) -> None:
    """Makes a version the champion and records when, why and instead of whom.

    Raises ValueError when there is no such version.
    """
    import mlflow

    previous = champion_version()
    if version not in (numbers := [v.number for v in list_versions()]):
        raise ValueError(f"version: the registry has no {version}, only {numbers}")
    record = {"promoted_at": _now(), "promoted_because": reason}
    if previous not in (None, version):
        record["replaced"] = str(previous)
    _tag(version, record)
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


def roll_back(reason: str) -> int:
    """Makes the champion's predecessor the champion again; returns its number.

    Raises ValueError when there is no champion or it replaced nothing.
    """
    import mlflow

    current = champion_version()
    if current is None:
        raise ValueError("there is no champion to roll back from")
    client = mlflow.MlflowClient()
    tags = client.get_model_version(MODEL_NAME, str(current)).tags
    if "replaced" not in tags:
        raise ValueError(f"version {current} replaced no other: there is nothing to go back to")
    _tag(current, {"rolled_back_at": _now(), "rolled_back_because": reason})
    client.set_registered_model_alias(MODEL_NAME, "champion", tags["replaced"])
    return int(tags["replaced"])


@dataclass(frozen=True)
class ModelVersion:
    """A line of the registry's history."""

    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]


def list_versions() -> list[ModelVersion]:
    """All versions, newest first."""
    import mlflow

    tracking.configure()
    client = mlflow.MlflowClient()
    results = client.search_model_versions(f"name = '{MODEL_NAME}'")
    # a search leaves the aliases out
    with_aliases = [client.get_model_version(MODEL_NAME, result.version) for result in results]
    versions = [ModelVersion(int(v.version), tuple(v.aliases), dict(v.tags)) for v in with_aliases]
    return sorted(versions, key=lambda version: -version.number)


def _tag(version: int | str, tags: dict[str, str]) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(MODEL_NAME, str(version), key, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def absolute(model_uri: str) -> str:
    """A bundle's folder by its absolute path, for whoever works elsewhere; a registry URI as it
    is."""
    return model_uri if model_uri.startswith(REGISTRY_PREFIX) else storage.absolute(model_uri)


def pin(model_uri: str, tracking_uri: str | None = None) -> str:
    """The version that a registry URI stands for now (`@alias`, `/latest` or a number), as a URI
    that will not move; a path is as it is.

    Raises FileNotFoundError when there is no such model, ValueError for another kind of URI.
    """
    if not model_uri.startswith(REGISTRY_PREFIX):
        return model_uri
    import mlflow
    from mlflow.exceptions import MlflowException

    name, alias, version = _parse(model_uri)
    tracking.configure(tracking_uri)
    client = mlflow.MlflowClient()
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias).version
        elif version == "latest":
            numbers = [int(v.version) for v in client.search_model_versions(f"name = '{name}'")]
            version = str(max(numbers, default=0))
    except MlflowException as error:
        raise FileNotFoundError(f"the registry has no {model_uri} ({error.message})") from error
    return f"models:/{name}/{version}"


def _parse(model_uri: str) -> tuple[str, str, str]:
    """Name, alias and version of `models:/name@alias` or `models:/name/version`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+|latest))", model_uri)
    if match is None:
        raise ValueError(f"model: {model_uri!r} is not models:/name@alias or models:/name/version")
    return match[1], match[2] or "", match[3] or ""


def resolve(model_uri: str, tracking_uri: str | None = None) -> Path:
    """The local folder of a bundle: a path as it is, `models:/...` through the registry.

    Raises FileNotFoundError when there is no such model, with what to do.
    """
    if not model_uri.startswith(REGISTRY_PREFIX):
        path = Path(model_uri)
        if not (path / "bundle.json").is_file():
            raise FileNotFoundError(f"no model bundle at {model_uri}: bundle.json is missing")
        return path
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        version = pin(model_uri, tracking_uri)
        address = mlflow.get_tracking_uri()
        if not address.startswith("http"):
            return Path(mlflow.artifacts.download_artifacts(version))
        return _fetch(version, address)
    except (MlflowException, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"the registry at {mlflow.get_tracking_uri()} has no {model_uri} ({error}); "
            "train and publish one (make demo), or name a folder with --model"
        ) from error


def _fetch(version: str, address: str) -> Path:
    """A version's folder in the node's cache: whoever asks first fetches it, once."""
    import mlflow

    digest = hashlib.sha256(f"{address} {version}".encode()).hexdigest()[:20]
    target = settings.read().cache / "models" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as part:
                Path(mlflow.artifacts.download_artifacts(version, dst_path=part)).rename(target)
    return target


def read_bundle(folder: Path) -> Bundle:
    """What `bundle.json` says."""
    values = json.loads((folder / "bundle.json").read_text())
    return dacite.from_dict(Bundle, values, dacite.Config(strict=True))


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


def load_codec(folder: Path, device: str = "cpu") -> encodec.Encodec:
    """The codec of a bundle. Raises ValueError when its weights are not those it was made with."""
    bundle = read_bundle(folder)
    source = "encodec-24khz" if bundle.official_codec else str(folder / "codec")
    codec = encodec.load(source, device=device, cache=settings.read().cache)
    codec.identity.check(bundle.codec, "the bundle")
    return codec


def load_synthesizer(folder: Path, device: str = "cpu") -> Synthesizer:
    """All three networks of a bundle."""
    ar, nar = load_ar(folder, device), load_nar(folder, device)
    return Synthesizer(ar, nar, load_codec(folder, device))
