"""The model registry: a voice model as one version in MLflow, a bundle of plain files.

    ar/ nar/            checkpoints (weights and metadata)
    codec/              weights of the codec, unless it is the official one
    bundle.json         identity of the codec, URIs of the checkpoints
    sample.wav          a sentence spoken by the model
    report.json, .md    the evaluation, if there was one

A new version gets the alias `candidate`; `champion` is served. The tags of a version record when
and why it was promoted and which version it replaced; a rollback returns to that one.

Nothing is pickled, and loading executes nothing.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.codec.interface import CodecIdentity
from valle.model.nar import NAR
from valle.model.normalize import TEXT_VERSION
from valle.model.valle import Synthesizer
from valle.platform import checkpoint, settings, storage, tracking
from valle.platform.cluster import CODE_ROOT
from valle.platform.typed import from_dict

logger = logging.getLogger(__name__)

MODEL_NAME = "valle"
REGISTRY_PREFIX = "models:/"
CHAMPION = f"{REGISTRY_PREFIX}{MODEL_NAME}@champion"
SHIPPED_BUNDLE = CODE_ROOT / "release" / "nano"
"""The bundle of the model that is part of the repository."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The contents of `bundle.json`."""

    codec: CodecIdentity
    official_codec: bool
    """True for `encodec-24khz`, whose weights are not copied."""
    ar: str
    """URI of the AR checkpoint."""
    nar: str
    """URI of the NAR checkpoint."""
    text_version: int = 1
    """Version of the text processing (`model/normalize.py`) that both models learnt."""
    languages: tuple[str, ...] = ()
    """Languages of the training data, as espeak names them; empty if unknown."""


def pack(ar: str, nar: str, codec: str, folder: Path) -> Bundle:
    """Copies two checkpoints and a codec into `folder`.

    Raises ValueError for checkpoints of the wrong kind or of another codec.
    """
    checkpoint.fetch(ar, folder / "ar")
    checkpoint.fetch(nar, folder / "nar")
    identity = encodec.load(codec, cache=settings.read().cache).identity
    text_versions, languages = [], []
    for part, kind in (("ar", "ar"), ("nar", "nar")):
        metadata = checkpoint.read_metadata(folder / part)
        if metadata.kind != kind:
            raise ValueError(f"{part}: the checkpoint holds a model of kind {metadata.kind!r}")
        identity.check(metadata.codec, f"the {part.upper()} checkpoint")
        text_versions.append(metadata.text_version)
        languages.append(metadata.languages)
    if len(set(text_versions)) > 1:
        raise ValueError(
            f"the AR checkpoint learnt text version {text_versions[0]}, the NAR checkpoint "
            f"{text_versions[1]}; train both on one dataset"
        )
    official = codec == "encodec-24khz"
    if not official:
        source = encodec.NANO_CODEC_FOLDER if codec == "nano" else Path(codec)
        (folder / "codec").mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(source / name, folder / "codec" / name)
    bundle = Bundle(
        codec=identity,
        official_codec=official,
        ar=ar,
        nar=nar,
        text_version=text_versions[0],
        languages=tuple(name for name in languages[0] if name in languages[1]),
    )
    _warn_of_text_version("the model", text_versions[0])
    (folder / "bundle.json").write_text(json.dumps(asdict(bundle), indent=2) + "\n")
    return bundle


def publish(folder: Path, tags: dict[str, str]) -> int:
    """Registers a bundle as the next version, with the alias `candidate`; returns its number."""
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
    # `models:/ID` of the logged model that holds the version's files
    source: str = client.get_model_version(MODEL_NAME, str(version)).source
    client.log_model_artifacts(source.removeprefix("models:/"), str(folder))


def champion_version() -> int | None:
    """The number of the version with the alias `champion`, or None."""
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
    """Publishes the shipped model as the champion of an empty registry.

    Returns its number, or None if the registry holds a version or the model is missing.
    """
    if list_versions() or not (SHIPPED_BUNDLE / "bundle.json").exists():
        return None
    version = publish(SHIPPED_BUNDLE, {"source": "shipped with the repository"})
    promote(version, "shipped with the repository")
    return version


def promote(version: int, reason: str) -> None:
    """Makes a version the champion, and records when, why and which version it replaced.

    Raises ValueError for a missing version.
    """
    import mlflow

    previous = champion_version()
    if version not in (numbers := [v.number for v in list_versions()]):
        raise ValueError(f"version: the registry has no {version}, only {numbers}")
    tags = {"promoted_at": _now(), "promoted_because": reason}
    if previous not in (None, version):
        tags["replaced"] = str(previous)
    # before the alias moves: a champion without its predecessor could not be rolled back
    _tag(version, tags)
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


def roll_back(reason: str) -> int:
    """Makes the version that the champion replaced the champion again; returns its number.

    Raises ValueError if there is no champion or it replaced none.
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
    """A version with its aliases and tags."""

    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]


def list_versions() -> list[ModelVersion]:
    """All versions, newest first."""
    import mlflow

    tracking.configure()
    client = mlflow.MlflowClient()
    results = client.search_model_versions(f"name = '{MODEL_NAME}'")
    # the results of a search lack the aliases
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


def pin(model_uri: str, tracking_uri: str | None = None) -> str:
    """A URI of the same model that later registrations do not change.

    `models:/name@alias` and `models:/name/latest` become `models:/name/version`, a bundle's folder
    its absolute path. Raises FileNotFoundError for a missing model, ValueError for another URI.
    """
    if not model_uri.startswith(REGISTRY_PREFIX):
        return storage.absolute(model_uri)
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
    """(name, alias, version) of `models:/name@alias` or `models:/name/version`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+|latest))", model_uri)
    if match is None:
        raise ValueError(f"model: {model_uri!r} is not models:/name@alias or models:/name/version")
    return match[1], match[2] or "", match[3] or ""


def resolve(model_uri: str, tracking_uri: str | None = None) -> Path:
    """The local folder of a bundle, by its path or by its registry URI.

    Raises FileNotFoundError, with what to do, for a missing model.
    """
    if not model_uri.startswith(REGISTRY_PREFIX):
        path = Path(storage.absolute(model_uri))
        if not (path / "bundle.json").is_file():
            raise FileNotFoundError(f"no model bundle at {path}: bundle.json is missing")
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
    """The local folder of a version in this node's cache, downloaded by the first caller."""
    import mlflow

    digest = hashlib.sha256(f"{address} {version}".encode()).hexdigest()[:20]
    target = settings.read().cache / "models" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            # renamed when complete: an interrupted download must not look like a model
            with tempfile.TemporaryDirectory(dir=target.parent) as part:
                Path(mlflow.artifacts.download_artifacts(version, dst_path=part)).rename(target)
    return target


def read_bundle(folder: Path) -> Bundle:
    """The parsed `bundle.json` of a folder."""
    values = json.loads((folder / "bundle.json").read_text())
    return from_dict(Bundle, values)


def read_languages(folder: Path) -> tuple[str, ...]:
    """Languages of the data that a bundle was trained on; en-us if it does not say."""
    return read_bundle(folder).languages or ("en-us",)


@lru_cache(maxsize=64)
def _warn_of_text_version(name: str, version: int) -> None:
    """Logs, once in a process, that a model learnt from text in another spoken form."""
    if version != TEXT_VERSION:
        logger.warning(
            "%s was trained with text version %d, this code reads text as version %d: numbers, "
            "abbreviations and markup may sound otherwise than it learnt; see docs/data.md",
            name, version, TEXT_VERSION,
        )  # fmt: skip


def load_ar(folder: Path, device: str = "cpu") -> AR:
    """The AR model of a bundle."""
    model, metadata = checkpoint.load(folder / "ar", device)
    _warn_of_text_version(f"the model in {folder}", metadata.text_version)
    assert isinstance(model, AR), "pack() has checked the kind"
    return model


def load_nar(folder: Path, device: str = "cpu") -> NAR:
    """The NAR model of a bundle."""
    model, _ = checkpoint.load(folder / "nar", device)
    assert isinstance(model, NAR), "pack() has checked the kind"
    return model


def load_codec(folder: Path, device: str = "cpu") -> encodec.Encodec:
    """The codec of a bundle. Raises ValueError if its weights differ from the recorded identity."""
    bundle = read_bundle(folder)
    source = "encodec-24khz" if bundle.official_codec else str(folder / "codec")
    codec = encodec.load(source, device=device, cache=settings.read().cache)
    codec.identity.check(bundle.codec, "the bundle")
    return codec


def load_synthesizer(folder: Path, device: str = "cpu") -> Synthesizer:
    """The AR model, the NAR model and the codec of a bundle."""
    ar, nar = load_ar(folder, device), load_nar(folder, device)
    return Synthesizer(ar, nar, load_codec(folder, device))
