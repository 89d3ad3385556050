"""Removes from this node's cache what has not been used for a while.

    valle clean-cache --unused-days 30 --max-gb 100

The cache (`VALLE_CACHE`) holds memory-mapped copies of token datasets, and copies of models
(bundles). Both are made again when they are needed. First, copies that were not used for
--unused-days are removed. Then the least recently used ones are removed until the rest fits into
--max-gb. A training that runs keeps the copies that it has opened. Copies of models are removed
with --bundles only, because endpoints start from them while the registry is down.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.platform import settings

LEFTOVER_SECONDS = 24 * 3600.0
"""Age after which an unfinished copy is what a killed process has left."""


@dataclass(frozen=True)
class Copy:
    """One copy in the cache: of a dataset's shard, or of a bundle."""

    path: Path
    size: int
    used: float
    """Time of the last use, in seconds since 1970."""


def find_copies(cache: Path, *, bundles: bool) -> list[Copy]:
    """The copies in a cache, those used last first."""
    paths = [*(cache / "shards").glob("*.arrow")]
    if bundles:
        paths += [p for p in (cache / "bundles").glob("*") if p.suffix not in (".lock", ".part")]
    copies = []
    for path in paths:
        try:
            files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
            size = 0 if path.is_symlink() else sum(f.stat().st_size for f in files)
            copies.append(Copy(path, size, path.lstat().st_mtime))
        except FileNotFoundError:  # removed by another process
            continue
    return sorted(copies, key=lambda copy: (-copy.used, copy.path.name))


def find_leftovers(cache: Path, now: float) -> list[Path]:
    """Unfinished copies of killed processes, and locks of copies that are gone."""
    found = []
    for path in (cache / "shards").glob("*"):
        orphan = path.suffix == ".lock" and not path.with_suffix("").exists()
        unfinished = path.suffix not in (".lock", ".arrow")
        if (orphan or unfinished) and now - path.lstat().st_mtime > LEFTOVER_SECONDS:
            found.append(path)
    return found


def select_old(
    copies: Sequence[Copy], unused_seconds: float, max_bytes: float, now: float
) -> list[Copy]:
    """The copies to remove, of `copies` in the order of `find_copies`."""
    kept = 0
    removed = []
    for copy in copies:
        if now - copy.used > unused_seconds or kept + copy.size > max_bytes:
            removed.append(copy)
        else:
            kept += copy.size
    return removed


def clean(
    cache: Path, *, unused_days: float, max_gb: float, bundles: bool = False, dry_run: bool = False
) -> list[Copy]:
    """Removes old copies and leftovers; returns the copies, which `dry_run` leaves."""
    now = time.time()
    copies = find_copies(cache, bundles=bundles)
    removed: list[Copy] = select_old(copies, unused_days * 86400, max_gb * 1e9, now)
    if not dry_run:
        for path in [copy.path for copy in removed] + find_leftovers(cache, now):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return removed


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `valle clean-cache`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--unused-days",
        type=float,
        default=30,
        help="remove copies that were unused for longer (default: %(default)g)",
    )
    parser.add_argument(
        "--max-gb",
        type=float,
        default=float("inf"),
        help="size of the copies that may stay (default: no limit)",
    )
    parser.add_argument("--bundles", action="store_true", help="remove copies of models too")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    arguments = parser.parse_args(argv)
    cache = settings.read().cache
    removed = clean(cache, **vars(arguments))
    for copy in removed:
        print(copy.path)
    verb = "would be removed" if arguments.dry_run else "removed"
    print(f"{cache}: {len(removed)} copies, {sum(c.size for c in removed) / 1e9:.2f} GB {verb}")


if __name__ == "__main__":
    main()
