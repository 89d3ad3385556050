"""The node's cache: copies unused for long, or beyond a size, are removed."""

import os
import time
from pathlib import Path

import pytest
from helpers.token_datasets import write_dataset

from valle.jobs import clean_cache
from valle.model.codec.encodec import Encodec
from valle.platform.dataset import TokenDataset

DAY = 86400


def put(path: Path, size: int, days: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_clean_removes_what_is_unused_or_too_much(home: Path) -> None:
    shards = home / "cache/shards"
    new, middle, old = (put(shards / f"{n}.arrow", 1000, n) for n in (1, 10, 40))
    lock, orphan, part = (
        put(shards / name, 0, 2) for name in ("1.arrow.lock", "gone.arrow.lock", "tmpabc")
    )
    fresh_part = put(shards / "tmpnew", 5, 0)
    bundle = put(home / "cache/bundles/b/model.safetensors", 10, 90).parent
    os.utime(bundle, (0, 0))
    removed = clean_cache.clean(home / "cache", unused_days=30, max_gb=1, dry_run=True)
    assert [copy.path for copy in removed] == [old] and old.exists()
    clean_cache.clean(home / "cache", unused_days=30, max_gb=1)
    assert not old.exists() and not orphan.exists() and not part.exists()
    assert new.exists() and middle.exists() and lock.exists() and fresh_part.exists()
    removed = clean_cache.clean(home / "cache", unused_days=30, max_gb=1.5e-6)
    assert [copy.path for copy in removed] == [middle]  # the one unused for longest
    assert bundle.exists()
    clean_cache.clean(home / "cache", unused_days=30, max_gb=1, bundles=True)
    assert not bundle.exists() and new.exists()


def test_main_keeps_what_was_opened_lately(
    home: Path, tiny_codec: Encodec, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(str(home / "tokens"), tiny_codec)
    TokenDataset(str(home / "tokens"), home / "cache")
    copies = sorted((home / "cache/shards").glob("*.arrow"))
    for path in copies:
        os.utime(path, (0, 0))
    opened = TokenDataset(str(home / "tokens"), home / "cache")
    clean_cache.main([])
    assert all(path.exists() for path in copies)
    clean_cache.main(["--unused-days", "-1"])
    assert "3 copies" in capsys.readouterr().out
    assert not any(path.exists() for path in copies)
    assert opened[0].id == "u0000"  # an open dataset keeps its files
    assert len(TokenDataset(str(home / "tokens"), home / "cache")) == 60  # made again
