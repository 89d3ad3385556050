"""Results of earlier runs: compared with the inputs, repaired, and never listed twice."""

from pathlib import Path

import pytest
from helpers.token_datasets import random_rows

from valle.jobs import prepare as prepare_module
from valle.jobs.ingest import output
from valle.jobs.ingest.output import compare, remove_obsolete, scan_output
from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import Reject, Source, SourceItem
from valle.model.codec.encodec import Encodec
from valle.model.normalize import TEXT_VERSION
from valle.platform import dataset, storage
from valle.platform.dataset import Shard, Statistics, TokenDataset
from valle.platform.lease import LeaseError
from valle.platform.recipe import RecipeError
from valle.platform.retries import Retrier, StorageError

RETRIER = Retrier(0)


def write(uri: str, name: str, rows: list[dict]) -> None:
    dataset.write_shard(uri, name, dataset.to_table(rows))


def rows_of(count: int = 6, stamp: str | None = "1@1") -> list[dict]:
    return [{**row, "stamp": stamp} for row in random_rows(count)]


def items_of(rows: list[dict], **changes: object) -> list[SourceItem]:
    return [
        SourceItem(**{
            "id": row["id"], "speaker": row["speaker"], "language": row["language"],
            "audio": row["source"], "text": row["text"], "text_uri": None,
            "stamp": row["stamp"] or "", **changes,
        })
        for row in rows
    ]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> PrepareRecipe:
    return PrepareRecipe(
        out=str(tmp_path), sources=(Source(path="x"),), min_seconds=0.1, max_seconds=1.0
    )


@pytest.mark.parametrize(
    ("change", "has_changed"),
    [
        ({}, False),
        ({"text": "another text"}, True),
        ({"text": " sentence 0 \n"}, True),  # of the other rows
        ({"speaker": "another"}, True),
        ({"language": "de"}, True),
        ({"stamp": "1@2"}, True),
        ({"stamp": "2@1"}, True),
        ({"stamp": ""}, False),  # unknown
        ({"text": None, "text_uri": "x"}, False),  # in a file, whose stamp is the same
        ({"audio": "/moved.wav"}, False),  # the id is from the path
        ({"audio": "/other.wav", "has_own_id": True}, True),
    ],
)
def test_compare_notices_changed_inputs(
    tmp_path: Path, tiny_codec: Encodec, recipe: PrepareRecipe, change: dict, has_changed: bool
) -> None:
    rows = rows_of()
    write(str(tmp_path), "one", rows)
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    result = compare(items_of(rows[1:], **change), state, recipe, 75)
    assert len(result.changed) == (5 if has_changed else 0)
    assert len(result.to_prepare) == len(result.changed)
    assert result.n_unchanged == 5 - len(result.changed)
    assert remove_obsolete(str(tmp_path), state, RETRIER) == len(result.changed)
    left = dataset.read_columns(str(tmp_path), "one", ["id"]).column("id").to_pylist()
    assert len(left) == 6 - len(result.changed) and "u0000" in left
    assert state.shards["one"].utterances == len(left)


@pytest.mark.parametrize("limits", [{"max_seconds": 0.5}, {"min_seconds": 0.5},
                                    {"min_phonemes": 9}, {"max_phonemes": 9}])  # fmt: skip
def test_compare_notices_limits_that_leave_out_what_exists(
    tmp_path: Path, tiny_codec: Encodec, limits: dict
) -> None:
    rows = rows_of(20)
    write(str(tmp_path), "one", rows)
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    values = {"min_seconds": 0.1, "max_seconds": 1.0, **limits}
    recipe = PrepareRecipe(out="o", sources=(Source(path="x"),), **values)
    changed = compare(items_of(rows), state, recipe, 75).changed
    assert 0 < len(changed) < 20


@pytest.mark.parametrize("former", ["file:///corpus/{}", "/corpus/./{}", "/corpus/text/../{}"])
def test_compare_takes_another_spelling_of_a_path_for_the_same(
    tmp_path: Path, tiny_codec: Encodec, recipe: PrepareRecipe, former: str
) -> None:
    """Earlier rows hold the paths as their manifests say them."""
    rows = rows_of()
    items = items_of(rows, has_own_id=True)
    for row in rows:
        row["source"] = former.format(Path(row["source"]).name)
    write(str(tmp_path), "one", rows)
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    assert compare(items, state, recipe, 75).n_unchanged == 6 and not state.obsolete


def test_compare_keep_leaves_changed_ones(tmp_path: Path, tiny_codec: Encodec) -> None:
    rows = rows_of()
    write(str(tmp_path), "one", rows)
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    recipe = PrepareRecipe(out="o", sources=(Source(path="x"),), min_seconds=0.1, on_change="keep")
    result = compare(items_of(rows, stamp="9@9"), state, recipe, 75)
    assert len(result.changed) == 6 and not result.to_prepare and not state.obsolete


def test_old_data_with_line_numbers_and_without_stamps_stays(
    tmp_path: Path, tiny_codec: Encodec, recipe: PrepareRecipe
) -> None:
    """Its recordings are found by their paths, wherever their lines are now."""
    rows = [{**row, "id": f"list.jsonl/{n}"} for n, row in enumerate(rows_of(stamp=None), 1)]
    old = dataset.to_table(rows).drop_columns("stamp")
    path = Path(tmp_path / "shards/one.parquet")
    path.parent.mkdir()
    import pyarrow.parquet as pq

    pq.write_table(old, path)
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    items = [
        SourceItem(
            id=f"list.jsonl/{row['source']}", speaker=row["speaker"], language=row["language"],
            audio=row["source"], text=row["text"], text_uri=None, stamp="5@5",
        )
        for row in rows[::-1]
    ]  # fmt: skip
    result = compare(items, state, recipe, 75)
    assert (result.n_unchanged, result.to_prepare, result.changed) == (6, [], [])
    statistics = output.statistics_of(str(tmp_path), state.shards, RETRIER)
    dataset.write_manifest(
        str(tmp_path), tiny_codec.identity, list(state.shards.values()), statistics
    )
    assert len(TokenDataset(str(tmp_path), tmp_path / "cache")) == 6


def test_doubled_ids_are_removed(tmp_path: Path, tiny_codec: Encodec) -> None:
    """Of two shards that two runs have written, and within one."""
    rows = rows_of()
    write(str(tmp_path), "a", rows[:4])
    write(str(tmp_path), "b", [*rows[2:], rows[5]])
    write(str(tmp_path), "c", rows[:2])
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    assert remove_obsolete(str(tmp_path), state, RETRIER) == 5
    assert set(state.shards) == {"a", "b"} and not (tmp_path / "shards/c.parquet").exists()
    ids = [
        name
        for shard in state.shards
        for name in dataset.read_columns(str(tmp_path), shard, ["id"]).column("id").to_pylist()
    ]
    assert sorted(ids) == [row["id"] for row in rows]
    with pytest.raises(ValueError, match="'u0001' is in shard new and in shard a"):
        state.add_shard(dataset.Shard(name="new", sha256="", utterances=1, frames=1), ["u0001"], {})


def test_scan_output_killed_while_a_shard_was_rewritten(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    """The manifest says six rows, the file has four: the file counts."""
    rows = rows_of()
    shard = dataset.write_shard(str(tmp_path), "a", dataset.to_table(rows))
    dataset.write_manifest(str(tmp_path), tiny_codec.identity, [shard], Statistics())
    write(str(tmp_path), "a", rows[:4])
    state = scan_output(str(tmp_path), tiny_codec.identity, RETRIER)
    assert state.shards["a"].utterances == 4 and state.shards["a"].sha256 != shard.sha256
    (tmp_path / "shards/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="shard a is damaged .* delete it"):
        scan_output(str(tmp_path), tiny_codec.identity, RETRIER)


def test_rejects_with_any_text_are_written_and_read(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\nd", "caf\udce9", '"quoted"', "\x85"]
    rejects = [Reject(id=name, source=name, reason="r") for name in names]
    output.write_rejects(str(tmp_path), "one", rejects)
    assert output.former_rejects(str(tmp_path), RETRIER) == {"one.jsonl": set(names)}
    storage.write_bytes(str(tmp_path / "rejects/edited.jsonl"), b"not json\n[]\n{}\n\xff\n")
    assert output.former_rejects(str(tmp_path), RETRIER)["edited.jsonl"] == set()


REPORT = {"out": "o", "inputs": 2, "utterances": 0, "rejected": {"too short": 2}}


class LostLease:
    """Another run has taken the output over meanwhile."""

    def check(self) -> None:
        raise LeaseError("lost")


@pytest.mark.parametrize(
    ("text_version", "error"), [(TEXT_VERSION, LeaseError), (TEXT_VERSION - 1, RecipeError)]
)
def test_prepare_that_must_not_write_removes_nothing(
    tmp_path: Path, tiny_codec: Encodec, text_version: int, error: type[Exception]
) -> None:
    """Rows have changed, but the lease is lost, or the dataset is of another text version."""
    out, speaker = str(tmp_path / "out"), tmp_path / "corpus/ann"
    speaker.mkdir(parents=True)
    for name in ("a.wav", "a.txt"):
        (speaker / name).write_text("x")
    rows = [{**rows_of(1)[0], "id": "corpus/ann/a", "speaker": "another"}]
    write(out, "one", rows)
    statistics = Statistics()
    statistics.text_version = text_version
    shards = [Shard(name="one", sha256="0" * 64, utterances=1, frames=rows[0]["frames"])]
    dataset.write_manifest(out, tiny_codec.identity, shards, statistics)
    source = Source(path=str(tmp_path / "corpus"))
    recipe = PrepareRecipe(out=out, sources=(source,), min_seconds=0.1)
    run = prepare_module._Run(recipe, tiny_codec.identity, RETRIER)
    with pytest.raises(error):
        prepare_module._prepare(run, None, LostLease())  # type: ignore[arg-type]
    left = dataset.read_columns(out, "one", ["id"]).column("id").to_pylist()
    assert left == ["corpus/ann/a"]


@pytest.mark.parametrize(
    ("result", "status", "message"),
    [
        (REPORT, 1, "none of 2 inputs could be used, most often: too short"),
        ({**REPORT, "inputs": 0, "rejected": {}}, 1, "no recordings were found"),
        ({**REPORT, "utterances": 1}, None, ""),
        (StorageError("storage failed 9 times"), 1, "error: storage failed 9 times"),
        (LeaseError("another run is writing there"), 1, "error: another run is writing there"),
        (FileNotFoundError("x does not exist"), 1, "error: x does not exist"),
    ],
)
def test_main_exit_status(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    result: object, status: int | None, message: str,
) -> None:  # fmt: skip
    from contextlib import nullcontext

    def run(recipe: PrepareRecipe) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    (home / "r.yaml").write_text("prepare: {out: o, sources: [{path: x}]}")
    monkeypatch.setattr(prepare_module, "connect", nullcontext)
    monkeypatch.setattr(prepare_module, "prepare", run)
    if status is None:
        prepare_module.main(["--recipe", str(home / "r.yaml")])
    else:
        with pytest.raises(SystemExit) as caught:
            prepare_module.main(["--recipe", str(home / "r.yaml")])
        assert caught.value.code == status
    assert message in capsys.readouterr().err
