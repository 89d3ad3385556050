"""Publishes bundles as model versions, moves their aliases and reads their history.

A new version gets the alias `candidate`; `champion` is served. The tags of a version record the
hash of its bundle, when and why it was promoted and which version it replaced; a rollback returns
to that one.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from valle.platform import bundle, settings, tracking
from valle.platform.credentials import strip_credentials
from valle.platform.registry import HASH_TAG, MODEL_NAME, artifact_location, registry_address
from valle.platform.registry_client import is_missing, is_missing_database, registry_client

CHAMPION, CANDIDATE = "champion", "candidate"
REPORT_TAG = "report_sha256"
"""Tag of a version: the hash of its `report.json`."""


class LostRaceError(RuntimeError):
    """Another process has moved the alias since it was read."""


@dataclass(frozen=True)
class ModelVersion:
    """A version with its aliases and tags."""

    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]


def publish(folder: Path, tags: dict[str, str]) -> int:
    """Registers a bundle as the next version, with the alias `candidate`; returns its number.

    Raises BundleError, before anything is registered, for a folder whose files are not those that
    its `bundle.json` lists, and RegistryUnavailableError.
    """
    import mlflow

    digest = bundle.verify(folder)
    # an outage is reported within seconds, before an upload waits as long as MLflow does
    if not is_missing_database(address := registry_address()):
        with registry_client(address) as client:
            client.search_registered_models(max_results=1)
    with registry_client(address, "experiment", bounded=False) as client:
        tracking.configure()
        tags = {key: strip_credentials(value) for key, value in tags.items()}
        with mlflow.start_run(run_name=f"publish-{MODEL_NAME}") as run:
            mlflow.set_tags({**tags, "code_version": tracking.code_version()})
            model = mlflow.initialize_logged_model(name=MODEL_NAME, source_run_id=run.info.run_id)
            client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            entry = mlflow.register_model(f"models:/{model.model_id}", MODEL_NAME)
        version = int(entry.version)
        # tagged before it can be found by an alias: a pinned name holds the hash
        _tag(client, version, {**tags, HASH_TAG: digest})
        newest = _version_of(client, CANDIDATE)
        if newest is None or newest < version:  # of two published at once, the later one
            client.set_registered_model_alias(MODEL_NAME, CANDIDATE, str(version))
    return version


def attach_report(version: int, folder: Path) -> None:
    """Adds the files of a local folder, `report.json` among them, to a version; stores the report's
    hash as a tag."""
    with registry_client(registry_address(), f"version {version}", bounded=False) as client:
        source: str = client.get_model_version(MODEL_NAME, str(version)).source
        client.log_model_artifacts(source.removeprefix("models:/"), str(folder))
        digest = hashlib.sha256((folder / bundle.REPORT).read_bytes()).hexdigest()
        _tag(client, version, {REPORT_TAG: digest})


def read_report(version: int) -> bytes | None:
    """The `report.json` of a version, read from the registry and not from the node's cache.

    None for a version without a report. Raises ValueError for a report that is not the one that
    was attached.
    """
    import mlflow

    address = registry_address()
    with (
        registry_client(address, f"version {version}") as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        entry = client.get_model_version(MODEL_NAME, str(version))
        location = artifact_location(client, entry.source)
        files = mlflow.artifacts.list_artifacts(artifact_uri=location, tracking_uri=address)
        # paths start with the folder's own name where the store is local
        if bundle.REPORT not in {Path(file.path).name for file in files}:
            return None
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location}/{bundle.REPORT}", dst_path=folder, tracking_uri=address
        )
        content = Path(path).read_bytes()
    expected = entry.tags.get(REPORT_TAG)
    if expected not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(
            f"the report of version {version} is not the one that was attached to it: evaluate the "
            "version again, and attach the report (`valle model-versions attach-report`)"
        )
    return content


def champion_version() -> int | None:
    """The number of the version with the alias `champion`, or None."""
    if is_missing_database(address := registry_address()):
        return None
    with registry_client(address) as client:
        return _version_of(client, CHAMPION)


_ANY = -1


def promote(
    version: int, reason: str, *, alias: str = CHAMPION, replacing: int | None = _ANY
) -> None:
    """Moves an alias to a version, and records when, why and which version it replaced.

    `replacing` is the version that the decision was made against: where the alias has moved
    since, LostRaceError is raised and nothing changes. Promotions of one machine exclude each
    other; MLflow has no way to exclude those of others, so the alias is read again afterwards and a
    lost race is reported. Raises ValueError for a missing version.
    """
    with _locked_registry() as client:
        previous = _version_of(client, alias)
        if version not in (numbers := [v.number for v in _list_versions(client)]):
            raise ValueError(f"version: the registry has no {version}, only {numbers}")
        if replacing not in (_ANY, previous):
            raise LostRaceError(
                f"{alias} moved from version {replacing} to {previous} in the meantime: version "
                f"{version} was compared with {replacing}, and has not been promoted; compare it "
                f"with version {previous}"
            )
        if alias == CHAMPION:
            tags = {"promoted_at": _now(), "promoted_because": strip_credentials(reason)}
            if previous not in (None, version):
                tags["replaced"] = str(previous)
            # before the alias moves: a champion without its predecessor cannot be rolled back
            _tag(client, version, tags)
        _move(client, alias, version)


def roll_back(reason: str) -> int:
    """Makes the version that the champion replaced the champion again; returns its number.

    Raises ValueError if there is no champion or it replaced none.
    """
    with _locked_registry() as client:
        current = _version_of(client, CHAMPION)
        if current is None:
            raise ValueError("there is no champion to roll back from")
        tags = client.get_model_version(MODEL_NAME, str(current)).tags
        if "replaced" not in tags:
            raise ValueError(f"version {current} replaced no other: there is nothing to go back to")
        reason = strip_credentials(reason)
        _tag(client, current, {"rolled_back_at": _now(), "rolled_back_because": reason})
        _move(client, CHAMPION, int(tags["replaced"]))
    return int(tags["replaced"])


def list_versions() -> list[ModelVersion]:
    """All versions, newest first."""
    if is_missing_database(address := registry_address()):
        return []
    with registry_client(address) as client:
        return _list_versions(client)


def _list_versions(client: Any) -> list[ModelVersion]:
    results = client.search_model_versions(f"name = '{MODEL_NAME}'")
    # the results of a search lack the aliases
    with_aliases = [client.get_model_version(MODEL_NAME, result.version) for result in results]
    versions = [ModelVersion(int(v.version), tuple(v.aliases), dict(v.tags)) for v in with_aliases]
    return sorted(versions, key=lambda version: -version.number)


@contextmanager
def _locked_registry() -> Iterator[Any]:
    """A client, while no other process of this machine moves an alias of the same registry."""
    address = registry_address()
    lock = settings.read().cache / f"{hashlib.sha256(address.encode()).hexdigest()[:20]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), registry_client(address, f"model {MODEL_NAME}") as client:
        yield client


def _move(client: Any, alias: str, version: int) -> None:
    client.set_registered_model_alias(MODEL_NAME, alias, str(version))
    if (now := _version_of(client, alias)) != version:
        raise LostRaceError(
            f"{alias} is version {now}: another machine moved it while version {version} was "
            "promoted; see `valle model-versions history`"
        )


def _version_of(client: Any, alias: str) -> int | None:
    """The version that an alias points to, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(MODEL_NAME, alias).version)
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None


def _tag(client: Any, version: int, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(MODEL_NAME, str(version), key, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
