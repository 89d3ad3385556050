"""This node's copies of bundles, and the versions that aliases last pointed to.

    bundles/{key}        a bundle: downloaded, or a link to where a local store keeps it
    aliases/{hash}.json  the last answer of a registry about one model URI

A key is the identity of a bundle's content, so a registry that was replaced by another one under
the same address never gets the copies of the old one. A copy is renamed when it is complete: an
interrupted download is never used, and the next one deletes its files. `valle clean-cache
--bundles` deletes copies; all of them may be deleted while no endpoint runs.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from valle.platform import settings

logger = logging.getLogger(__name__)


def find(key: str) -> Path | None:
    """The folder of the bundle `key`, if this node has it."""
    target = _target(key)
    return target.resolve() if target.exists() else None


def fetch(key: str, fill: Callable[[Path], Path]) -> Path:
    """The folder of the bundle `key`. The first caller makes it.

    `fill` gets an empty folder and returns the folder that holds the bundle: one inside it, which
    becomes the copy, or one elsewhere on this machine, which is linked. After an error of `fill`
    no files are left.
    """
    target = _target(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target.resolve()
        if target.is_symlink():  # the local store has moved
            target.unlink()
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of an interrupted call: the lock is ours
        part.mkdir()
        try:
            made = fill(part)
            if made.resolve().is_relative_to(part.resolve()):
                made.rename(target)
            else:
                target.symlink_to(made.resolve())
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target.resolve()


def link_or_copy(source: Path, target: Path) -> None:
    """Copies a folder's files; by hard links where the file system allows them."""
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def remember(address: str, model_uri: str, version: str) -> None:
    """Keeps the version that the registry at `address` gave for a model URI; a cache that cannot
    be written costs that only."""
    if last_version(address, model_uri) == version:
        return
    path = _alias_file(address, model_uri)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"model": model_uri, "version": version}))
        os.replace(part, path)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): while the registry is down, %s is not known here",
            path, error, model_uri,
        )  # fmt: skip


def last_version(address: str, model_uri: str) -> str | None:
    """The version that the registry at `address` last gave for a model URI, if it is known."""
    try:
        version = json.loads(_alias_file(address, model_uri).read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _target(key: str) -> Path:
    return settings.read().cache / "bundles" / key


def _alias_file(address: str, model_uri: str) -> Path:
    digest = hashlib.sha256(f"{address} {model_uri}".encode()).hexdigest()[:32]
    return settings.read().cache / "aliases" / f"{digest}.json"
