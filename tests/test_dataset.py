"""The token dataset: round trip, cache, refusal of changed or foreign data."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.token_datasets import random_rows, write_dataset

from valle.model.codec.encodec import Encodec
from valle.model.normalize import TEXT_VERSION
from valle.platform import dataset, storage
from valle.platform.dataset import SCHEMA, Statistics, TokenDataset


def test_token_dataset_round_trip(tmp_path: Path, tiny_codec: Encodec) -> None:
    rows = write_dataset(str(tmp_path / "tokens"), tiny_codec)
    loaded = TokenDataset(str(tmp_path / "tokens"), tmp_path / "cache")
    assert len(loaded) == len(rows)
    for number in (0, 24, 25, 59):
        utterance, row = loaded[number], rows[number]
        for field in ("id", "speaker", "text"):
            assert getattr(utterance, field) == row[field]
        np.testing.assert_array_equal(utterance.codes, row["codes"])
        assert utterance.phonemes.tolist() == row["phonemes"]
    assert loaded.frames().tolist() == [row["frames"] for row in rows]
    assert loaded.n_phonemes().tolist() == [len(row["phonemes"]) for row in rows]
    speakers = loaded.speakers()
    assert len(set(speakers.tolist())) == 3
    assert (np.diff(speakers) >= 0).all()  # utterances of a speaker lie together


def test_read_manifest_counts_utterances_and_hours(tmp_path: Path, tiny_codec: Encodec) -> None:
    rows = write_dataset(str(tmp_path), tiny_codec)
    manifest = dataset.read_manifest(str(tmp_path))
    frames = sum(row["frames"] for row in rows)
    assert manifest.utterances == 60
    assert manifest.hours == pytest.approx(frames / 75 / 3600, abs=1e-4)
    assert set(manifest.hours_by_speaker) == {"s0", "s1", "s2"}
    assert set(manifest.hours_by_language) == {"en-us"}
    assert manifest.codec == tiny_codec.identity


def test_write_shard_bounds_row_groups_in_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "FRAMES_PER_ROW_GROUP", 300)
    dataset.write_shard(str(tmp_path), "one", dataset.to_table(random_rows(50)))
    footer = pq.ParquetFile(tmp_path / "shards/one.parquet").metadata
    assert footer.num_row_groups > 4
    frames = np.asarray([row["frames"] for row in random_rows(50)])
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    for group in np.split(frames, np.cumsum(sizes)[:-1]):
        assert group.sum() <= 300 + frames.max()


def test_token_dataset_refuses_a_changed_shard(tmp_path: Path, tiny_codec: Encodec) -> None:
    write_dataset(str(tmp_path), tiny_codec)
    path = next((tmp_path / "shards").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="does not match its hash"):
        TokenDataset(str(tmp_path), tmp_path / "cache")


def test_token_dataset_builds_its_cache_once(
    tmp_path: Path, tiny_codec: Encodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "tokens")
    write_dataset(uri, tiny_codec)
    TokenDataset(uri, tmp_path / "cache")
    files = sorted((tmp_path / "cache/shards").glob("*.arrow"))
    assert len(files) == 3
    for path in (tmp_path / "tokens/shards").glob("*.parquet"):
        path.unlink()  # a second opening needs the cache only
    assert len(TokenDataset(uri, tmp_path / "cache")) == 60

    def refuse(path: Path) -> None:
        raise PermissionError("another user's cache")

    monkeypatch.setattr(dataset.os, "utime", refuse)
    assert len(TokenDataset(uri, tmp_path / "cache")) == 60


def test_missing_and_empty_datasets_are_errors(tmp_path: Path, tiny_codec: Encodec) -> None:
    with pytest.raises(FileNotFoundError, match="run `prepare` first"):
        dataset.read_manifest(str(tmp_path))
    dataset.write_manifest(str(tmp_path), tiny_codec.identity, [], Statistics())
    with pytest.raises(ValueError, match="is empty: see its rejects/"):
        TokenDataset(str(tmp_path), tmp_path / "cache")


def test_read_manifest_refuses_another_inventory_version_or_key(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    manifest = dataset.write_manifest(str(tmp_path), tiny_codec.identity, [], Statistics())
    path = str(tmp_path / "dataset.json")
    storage.write_json(path, {**asdict(manifest), "inventory": ["x", "y"]})
    with pytest.raises(ValueError, match="made with another phoneme inventory"):
        dataset.read_manifest(str(tmp_path))
    storage.write_json(path, {**asdict(manifest), "version": 99})
    with pytest.raises(ValueError, match="version 99, this code reads 1"):
        dataset.read_manifest(str(tmp_path))
    storage.write_json(path, {**asdict(manifest), "surprise": 1})
    with pytest.raises(ValueError, match="dataset.json is not a dataset's manifest: .*surprise"):
        dataset.read_manifest(str(tmp_path))


@pytest.mark.slow
def test_token_dataset_opens_without_reading_rows(tmp_path: Path, tiny_codec: Encodec) -> None:
    """200,000 utterances: their columns stay on disk, memory-mapped."""
    count = 200_000
    frames = np.full(count, 4, np.int32)
    lists = pa.ListArray.from_arrays(np.arange(0, count * 4 + 1, 4), np.zeros(count * 4, np.int16))
    codes = pa.ListArray.from_arrays(
        np.arange(0, count * 32 + 1, 32), np.zeros(count * 32, np.int16)
    )
    names = pa.array([f"s{i // 1000}" for i in range(count)])
    ids = pa.array([str(i) for i in range(count)])
    table = pa.Table.from_arrays(
        [ids, names, names, ids, lists, codes, pa.array(frames), ids, ids], schema=SCHEMA
    )
    shard = dataset.write_shard(str(tmp_path), "big", table)
    statistics = Statistics()
    statistics.add(table)
    dataset.write_manifest(str(tmp_path), tiny_codec.identity, [shard], statistics)
    TokenDataset(str(tmp_path), tmp_path / "cache")
    del table, lists, codes
    allocated = pa.total_allocated_bytes()
    loaded = TokenDataset(str(tmp_path), tmp_path / "cache")
    (copy,) = (tmp_path / "cache/shards").glob("*.arrow")
    assert pa.total_allocated_bytes() - allocated < 0.01 * copy.stat().st_size
    assert len(loaded.frames()) == len(loaded.speakers()) == count
    assert loaded[123_456].id == "123456"


def test_text_version_of_a_dataset(tmp_path: Path, tiny_codec: Encodec) -> None:
    """An older dataset does not say it and is version 1: nothing is added to it."""
    path = str(tmp_path / "dataset.json")
    dataset.write_manifest(str(tmp_path), tiny_codec.identity, [], dataset.Statistics())
    values = storage.read_json(path)
    assert values.pop("text_version") == TEXT_VERSION
    storage.write_json(path, values)
    version = dataset.read_manifest(str(tmp_path)).text_version
    assert version == 1
    with pytest.raises(ValueError, match="phonemes of text version 1, this code makes version 2"):
        dataset.check_text_version(version, str(tmp_path))
    dataset.check_text_version(TEXT_VERSION, str(tmp_path))
