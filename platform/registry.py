"""Finds and loads a voice model: by its folder, or by its name in MLflow's model registry.

A model version of the registry is one bundle (`bundle.py`). `champion` is served; `model_versions`
publishes and promotes. Nothing is pickled, and loading executes nothing.

`pin` gives a model a name that holds the identity of its content, so that all processes load the
same files, whatever is registered or exported later:

    models:/valle/3#m-0f3a...            version 3, whose files MLflow keeps as model m-0f3a...
    models:/valle/3#m-0f3a.../1a2b3c4d   the same, with the hash of its bundle.json
    /data/bundle#1a2b...                 a folder, with the hash of its bundle.json
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from valle.model.ar import AR
from valle.model.codec import encodec
from valle.model.nar import NAR
from valle.model.valle import Synthesizer
from valle.platform import bundle as bundles
from valle.platform import checkpoint, node_cache, settings, storage
from valle.platform.bundle import BundleError, read_bundle
from valle.platform.cluster import CODE_ROOT
from valle.platform.credentials import strip_credentials
from valle.platform.packing import warn_of_text_version
from valle.platform.registry_client import (
    MissingModelError,
    RegistryUnavailableError,
    is_missing,
    is_missing_database,
    registry_client,
)

MODEL_NAME = "valle"
REGISTRY_PREFIX = "models:/"
CHAMPION = f"{REGISTRY_PREFIX}{MODEL_NAME}@champion"
SHIPPED_BUNDLE = CODE_ROOT / "release" / "nano"
"""The bundle of the model that is part of the repository."""

HASH_TAG = "bundle_sha256"
"""Tag of a version: the hash that identifies its bundle."""

_PINNED_VERSION = re.compile(
    r"(models:/([^/@#]+)/(\d+))#(m-[0-9a-f]{32}|[0-9a-f]{32})(?:/([0-9a-f]{8}))?"
)
_PINNED_FOLDER = re.compile(r"(.+)#([0-9a-f]{64})", re.DOTALL)

logger = logging.getLogger(__name__)


def pin(
    model_uri: str,
    tracking_uri: str | None = None,
    *,
    allow_cached: bool = False,
    announce: bool = True,
) -> str:
    """The pinned name of a model, which later registrations and exports do not change.

    `allow_cached`: while the registry does not answer, the version that it gave this node last is
    used, with a warning. The champion of a registry that has none, as after `make demo`, is the
    shipped model, with a warning if `announce`; not where this node has known a champion. Raises
    MissingModelError, with the remedy, for a model that the registry does not have,
    FileNotFoundError for a missing folder, RegistryUnavailableError, BundleError for a folder that
    has been changed, ValueError for another URI.
    """
    if _PINNED_VERSION.fullmatch(model_uri) or _PINNED_FOLDER.fullmatch(model_uri):
        return model_uri
    if not model_uri.startswith(REGISTRY_PREFIX):
        return _pin_folder(_local_folder(model_uri))
    name, alias, number = _parse(model_uri)
    address = registry_address(tracking_uri)
    try:
        pinned = _look_up(model_uri, name, alias, number, address)
    except RegistryUnavailableError as error:
        last = node_cache.last_version(address, model_uri) if allow_cached else None
        if last is None:
            raise
        logger.warning("%s; using %s, its last answer to this node", error, display_name(last))
        return last
    if pinned is None:
        logger.log(
            logging.WARNING if announce else logging.DEBUG,
            "the registry at %s has no champion: using the model shipped with the code, %s",
            strip_credentials(address),
            SHIPPED_BUNDLE,
        )
        return _pin_folder(SHIPPED_BUNDLE)
    node_cache.remember(address, model_uri, pinned)
    return pinned


def current_version(
    model_uri: str, tracking_uri: str | None, deployed: str | None, current: str | None
) -> str:
    """The pinned name of the model that an endpoint's new requests get.

    The first time (`current` is None), if the registry does not answer, the result is its last
    answer to this node, or `deployed`. Later calls raise RegistryUnavailableError, so that the
    caller keeps `current`. They raise MissingModelError for a registry that has lost its versions,
    for which `pin` would return the shipped model.
    """
    if current is None:
        try:
            return pin(model_uri, tracking_uri, allow_cached=True)
        except RegistryUnavailableError as error:
            if deployed is None:
                raise
            logger.warning("%s; using %s, the version at deployment", error, display_name(deployed))
            return deployed
    pinned = pin(model_uri, tracking_uri, announce=False)
    if current.startswith(REGISTRY_PREFIX) and not pinned.startswith(REGISTRY_PREFIX):
        raise MissingModelError(
            f"the registry at {strip_credentials(registry_address(tracking_uri))} has no champion "
            f"any more, but had {display_name(current)}"
        )
    return pinned


def resolve(model_uri: str, tracking_uri: str | None = None, *, allow_cached: bool = False) -> Path:
    """The local folder of a bundle, by its path, its registry URI or its pinned name.

    Every file has been checked against `bundle.json`. A pinned version that this node has is found
    without the registry. Errors are those of `pin`.
    """
    if not model_uri.startswith(REGISTRY_PREFIX) and not _PINNED_FOLDER.fullmatch(model_uri):
        folder = _local_folder(model_uri)
        bundles.verify(folder)
        return folder
    pinned = pin(model_uri, tracking_uri, allow_cached=allow_cached)
    if match := _PINNED_VERSION.fullmatch(pinned):
        return _resolve_version(match, registry_address(tracking_uri))
    match = _PINNED_FOLDER.fullmatch(pinned)
    assert match is not None, "pin() returns no other name"
    return _resolve_folder(Path(match[1]), match[2])


def is_same(former: str, pinned: str) -> bool:
    """Whether a name that was stored with results is of the model `pinned`.

    Earlier code stored names without the identity of the content, which count as those of the
    same version or folder. A folder that has moved is the same model.
    """
    name, _, content = pinned.rpartition("#")
    moved = _PINNED_FOLDER.fullmatch(former)
    return former in (pinned, name) or (moved is not None and moved[2] == content)


def display_name(model_uri: str) -> str:
    """A model's name for people and headers: `models:/valle/3#1a2b3c4d`, or for a folder
    `bundle#1a2b3c4d`, without the folders above it. The digits are of the hash of `bundle.json`."""
    if match := _PINNED_VERSION.fullmatch(model_uri):
        return match[1] + (f"#{match[5]}" if match[5] else "")
    if model_uri.startswith(REGISTRY_PREFIX):
        return model_uri
    folder, digits = model_uri, ""
    if match := _PINNED_FOLDER.fullmatch(model_uri):
        folder, digits = match[1], f"#{match[2][:8]}"
    return quote(Path(folder).name, safe=" +,=@#") + digits  # a header holds ASCII only


def registry_address(tracking_uri: str | None = None) -> str:
    """MLflow's address: the given one, or that of the machine's settings."""
    return tracking_uri or settings.read().tracking_uri


def artifact_location(client: Any, source: str) -> str:
    """The address at which MLflow keeps the files of a version with this `source`."""
    if source.startswith(f"{REGISTRY_PREFIX}m-"):
        location: str = client.get_logged_model(
            source.removeprefix(REGISTRY_PREFIX)
        ).artifact_location
        return location
    return source  # registered by other means: the address of its files


def _look_up(model_uri: str, name: str, alias: str, number: str, address: str) -> str | None:
    """The pinned name of a registry URI; None for the champion of a registry that never had one."""
    version, numbers = None, []
    # a look-up must not create the database: that takes seconds, and needs rights to write
    if not is_missing_database(address):
        with registry_client(address, model_uri) as client:
            try:
                version = _find_version(client, name, alias, number)
            except MissingVersionError:
                found = client.search_model_versions(f"name = '{name}'")
                numbers = sorted(int(v.version) for v in found)
    if version is not None:
        digits = version.tags.get(HASH_TAG, "")[:8]
        key = _cache_key(version.source)
        return f"models:/{name}/{version.version}#{key}" + (f"/{digits}" if digits else "")
    # a champion that was there is missing for a reason, which the shipped model would hide
    if model_uri == CHAMPION and not (numbers and node_cache.last_version(address, model_uri)):
        return None
    raise MissingModelError(_missing(model_uri, alias, numbers, address))


class MissingVersionError(Exception):
    """The registry answered that it has no such version or alias."""


def _find_version(client: Any, name: str, alias: str, number: str) -> Any:
    """MLflow's entry of a version. Raises MissingVersionError, or MLflow's error for an outage."""
    from mlflow.exceptions import MlflowException

    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        if number == "latest":
            found = client.search_model_versions(f"name = '{name}'")
            number = str(max((int(v.version) for v in found), default=0))
        return client.get_model_version(name, number)
    except MlflowException as error:
        if is_missing(error):
            raise MissingVersionError from error
        raise


def _missing(model_uri: str, alias: str, numbers: list[int], address: str) -> str:
    """The message for a version that the registry does not have, with what to do."""
    message = f"the registry at {strip_credentials(address)} has no {model_uri}"
    if not numbers:
        return f"{message}; train and publish one (make demo), or name a bundle's folder"
    listed = ", ".join(map(str, numbers[-8:]))
    remedy = "name one of them (models:/valle/N) or another alias (models:/valle@candidate)"
    if alias == "champion":
        remedy += "; `valle model-versions promote N --reason ...` makes one the champion"
    return f"{message}; it has versions {listed}: {remedy}"


def _cache_key(source: str) -> str:
    """The name of a version's files, by MLflow's `source`: the id of its logged model."""
    name = source.removeprefix(REGISTRY_PREFIX)
    if re.fullmatch(r"m-[0-9a-f]{32}", name):
        return name
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def _parse(model_uri: str) -> tuple[str, str, str]:
    """(name, alias, version) of `models:/name@alias` or `models:/name/version`."""
    match = re.fullmatch(r"models:/([^/@#]+)(?:@([\w-]+)|/(\d{1,9}|latest))", model_uri)
    if match is None:
        raise ValueError(f"model: {model_uri!r} is not models:/name@alias or models:/name/version")
    return match[1], match[2] or "", match[3] or ""


def _local_folder(model_uri: str) -> Path:
    path = storage.absolute(model_uri)
    if "://" in path:
        raise ValueError(
            f"model: {model_uri} is no local folder; copy the bundle to a disk of every node, or "
            "publish it to the registry"
        )
    return Path(path)


def _pin_folder(folder: Path) -> str:
    return f"{folder}#{bundles.verify(folder)}"


def _resolve_folder(folder: Path, digest: str) -> Path:
    """The files of a pinned folder in this node's cache, which an export over it leaves alone."""

    def fill(part: Path) -> Path:
        source = folder
        # Ray may unpack the code to another path on each node
        if not source.exists() and SHIPPED_BUNDLE.exists():
            source = SHIPPED_BUNDLE if bundles.verify(SHIPPED_BUNDLE) == digest else source
        found = bundles.verify(source)
        if found != digest:
            raise BundleError(
                f"the bundle at {folder} has been replaced: this endpoint serves "
                f"{digest[:8]}, the folder holds {found[:8]}; deploy again"
            )
        node_cache.link_or_copy(source, part / "bundle")
        return part / "bundle"

    copy = node_cache.find(digest) or node_cache.fetch(digest, fill)
    _check(copy, digest)
    return copy


def _resolve_version(pinned: re.Match[str], address: str) -> Path:
    """The files of a pinned version: this node's copy, or a local store's own."""
    version_uri, name, number, key, digits = pinned.groups()

    def download(part: Path) -> Path:
        import mlflow

        if is_missing_database(address):
            raise MissingModelError(_missing(version_uri, "", [], address))
        with registry_client(address, version_uri) as client:
            try:
                version = _find_version(client, name, "", number)
            except MissingVersionError as error:
                raise MissingModelError(_missing(version_uri, "", [], address)) from error
            if _cache_key(version.source) != key:
                raise MissingModelError(
                    f"the registry at {strip_credentials(address)} has been replaced: "
                    f"its {version_uri} is another model than the one deployed"
                )
            location = artifact_location(client, version.source)
        local = location.removeprefix("file://")
        if Path(local).is_dir():
            folder = Path(local)
        else:
            with registry_client(address, version_uri, bounded=False):
                folder = Path(mlflow.artifacts.download_artifacts(
                    artifact_uri=location, dst_path=str(part), tracking_uri=address
                ))  # fmt: skip
        _check(folder, version.tags.get(HASH_TAG, ""))
        return folder

    folder = node_cache.find(key) or node_cache.fetch(key, download)
    _check(folder, digits or "")
    return folder


def _check(folder: Path, expected: str) -> None:
    """Raises BundleError unless the bundle's files are those that its hash begins with."""
    found = bundles.verify(folder)
    if not found.startswith(expected):
        raise BundleError(
            f"{folder} holds the bundle {found[:8]}, but the version was published as "
            f"{expected[:8]}: its files have been replaced; publish it again"
        )


def read_languages(folder: Path) -> tuple[str, ...]:
    """Languages of the data that a bundle was trained on; en-us if it does not say."""
    return read_bundle(folder).languages or ("en-us",)


def load_ar(folder: Path, device: str = "cpu") -> AR:
    """The AR model of a bundle."""
    model, metadata = checkpoint.load(folder / "ar", device)
    warn_of_text_version(f"the model in {folder}", metadata.text_version or 1)
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
