"""The stages of `prepare` without Ray: what is a row's fault, what ends the run, and rows that end
the process."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_prepare import put, sound

from valle.jobs.ingest import stages
from valle.jobs.ingest.crashes import MAX_ATTEMPTS, attempt, sweep
from valle.jobs.ingest.pipeline import shard_items
from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import Source, SourceItem
from valle.jobs.ingest.stages import DecodeAudio, Phonemize
from valle.platform import storage
from valle.platform.retries import Retrier, StorageError, find_storage_error


@pytest.fixture
def recipe(tmp_path: Path) -> PrepareRecipe:
    return PrepareRecipe(
        out=str(tmp_path / "out"), sources=(Source(path="x"),), storage_retry_seconds=0
    )


def item(name: str, **fields: object) -> SourceItem:
    values = {
        "speaker": "s",
        "language": "en-us",
        "audio": name,
        "text": "hi there",
        "text_uri": None,
    }
    return SourceItem(id=name, **{**values, **fields})  # type: ignore[arg-type]


def reasons(table) -> dict[str, str | None]:  # type: ignore[no-untyped-def]
    return {row["id"]: row["reason"] for row in table.to_pylist()}


def rows_of(*items: SourceItem):  # type: ignore[no-untyped-def]
    (table,) = shard_items(items, 100, "run")
    return table


TEXT_ERRORS = [
    KeyError("x"), TypeError("x"), NotImplementedError("x"), AssertionError("x"),
    OverflowError("x"), IndexError("x"), ValueError("no voice"), AttributeError("x"),
]  # fmt: skip


@pytest.mark.parametrize("error", TEXT_ERRORS, ids=repr)
def test_phonemize_error_of_a_text_is_its_reject(
    recipe: PrepareRecipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stage, original = Phonemize(recipe), stages.phoneme_ids

    def fails(text: str, language: str) -> list[int]:
        if text == "bad":
            raise error
        return original(text, language)

    monkeypatch.setattr(stages, "phoneme_ids", fails)
    table = stage(rows_of(item("a"), item("b", text="bad"), item("c")))
    found = reasons(table)
    assert found["a"] is None and found["c"] is None
    assert found["b"] and found["b"].startswith("text cannot be phonemized")


def test_phonemize_broken_converter_ends_the_run(
    recipe: PrepareRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(text: str, language: str) -> list[int]:
        raise RuntimeError("espeak is not installed")

    monkeypatch.setattr(stages, "phoneme_ids", fails)
    with pytest.raises(RuntimeError, match="espeak is not installed"):
        Phonemize(recipe)


def test_phonemize_transcripts_of_all_kinds(recipe: PrepareRecipe, tmp_path: Path) -> None:
    contents = {
        "bom": "hello there".encode("utf-8-sig"), "utf16": "hello there".encode("utf-16"),
        "latin1": b"caf\xe9", "empty": b" \r\n", "huge": b"a" * 2_000_000, "long": b"a " * 9_000,
    }  # fmt: skip
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    names = [*contents, "gone", "folder", "x" * 300]
    items = [item(n, text=None, text_uri=str(tmp_path / n)) for n in names]
    found = reasons(Phonemize(recipe)(rows_of(*items)))
    assert found["bom"] is None and found["utf16"] is None
    for name, reason in {
        "latin1": "text is not UTF-8", "empty": "empty text",
        "huge": "transcript cannot be read: 2.0 MB, limit 1.0 MB", "long": "text too long: 17999",
        "gone": f"no transcript: {tmp_path}/gone does not exist",
        "folder": "transcript cannot be read: ", "x" * 300: "transcript cannot be read: ",
    }.items():  # fmt: skip
        assert (found[name] or "").startswith(reason), (name, found[name])


def test_decode_bounds_a_file_before_it_is_read(recipe: PrepareRecipe, tmp_path: Path) -> None:
    put(tmp_path / "a.wav", sound(1.0), words=None)
    with (tmp_path / "ten hours.wav").open("wb") as file:
        file.truncate(6_300_000_000)
    names = ["a.wav", "ten hours.wav", "gone.wav"]
    found = reasons(
        DecodeAudio(recipe)(
            Phonemize(recipe)(rows_of(*[item(n, audio=str(tmp_path / n)) for n in names]))
        )
    )
    assert found["a.wav"] is None
    assert (found["ten hours.wav"] or "").startswith("recording cannot be read: 6300.0 MB, limit")
    assert found["gone.wav"] == f"no recording: {tmp_path}/gone.wav does not exist"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "i/o"), OSError(errno.EMFILE, "files"), TimeoutError("slow"),
              OSError("AWS Error SLOW_DOWN during GetObject operation")], ids=str,
)  # fmt: skip
def test_decode_storage_fault_ends_the_run_and_rejects_nothing(
    recipe: PrepareRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    table = Phonemize(recipe)(rows_of(item("a.wav")))
    original = storage.read_bytes

    def fails(uri: str, **options: object) -> bytes:
        if uri.endswith(".wav"):
            raise error
        return original(uri)

    monkeypatch.setattr(storage, "read_bytes", fails)
    with pytest.raises(StorageError):
        DecodeAudio(recipe)(table)
    assert not list(storage.list_files(recipe.out))


def test_decode_file_without_permission_is_its_reject(
    recipe: PrepareRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = storage.read_bytes

    def fails(uri: str, **options: object) -> bytes:
        if uri.endswith(".wav"):
            raise PermissionError(errno.EACCES, "no")
        return original(uri)

    table = Phonemize(recipe)(rows_of(item("a.wav", audio=str(tmp_path / "a.wav"))))
    monkeypatch.setattr(storage, "read_bytes", fails)
    found = reasons(DecodeAudio(recipe)(table))
    assert (found["a.wav"] or "").startswith("recording cannot be read: no permission for ")
    monkeypatch.setattr(stages, "is_forbidden_file", lambda uri, error: False)
    with pytest.raises(StorageError):  # a worker that may not read the folder either
        DecodeAudio(recipe)(table)


def test_decode_program_error_ends_the_run(
    recipe: PrepareRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.wav", sound(1.0), words=None)
    table = Phonemize(recipe)(rows_of(item("a.wav", audio=str(tmp_path / "a.wav"))))
    monkeypatch.setattr(stages.audio, "rms_dbfs", lambda wave: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        DecodeAudio(recipe)(table)


def run_in_child(recipe: PrepareRecipe, crashing: str, result: Path) -> int:
    """Runs a stage on rows a to d in a process that rows in `crashing` end; its exit status."""

    def step(row: stages.Row) -> stages.Row:
        if row["id"] in crashing:
            os._exit(139)
        return {}

    table = rows_of(*[item(name) for name in "abcd"])
    child = os.fork()
    if not child:
        mapped = stages.map_rows(table, step, recipe, Retrier(0), "decode")
        result.write_text(json.dumps(reasons(mapped)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("crashing", "attempts"), [("c", 3), ("bd", 4), ("abcd", 6)])
def test_rows_that_end_the_process_become_rejects(
    recipe: PrepareRecipe, tmp_path: Path, crashing: str, attempts: int
) -> None:
    """Each attempt is a new process, as Ray starts them; the last one ends with all other rows."""
    result = tmp_path / "result.json"
    statuses = [run_in_child(recipe, crashing, result) for _ in range(attempts)]
    assert statuses == [139] * (attempts - 1) + [0]
    found = json.loads(result.read_text())
    assert {name for name, reason in found.items() if reason} == set(crashing)
    assert all(found[name].startswith("ends the worker") for name in crashing)
    assert list((tmp_path / "out/in-flight").iterdir()) == []


def test_attempt_is_bounded_and_forgets_other_runs(tmp_path: Path) -> None:
    out, retrier = str(tmp_path), Retrier(0)
    state = {"run": "old", "number": 5, "crashed": ["a"], "row": "b"}
    storage.write_json(f"{out}/in-flight/s-decode.json", state)
    with attempt(out, "decode", "s", "new", retrier) as present:
        assert not present.is_careful and present.crashed == []
    assert not storage.exists(f"{out}/in-flight/s-decode.json")
    state = {"run": "new", "number": MAX_ATTEMPTS, "crashed": [], "row": None}
    storage.write_json(f"{out}/in-flight/s-decode.json", state)
    with (
        pytest.raises(RuntimeError, match="ended its worker 16 times"),
        attempt(out, "decode", "s", "new", retrier),
    ):
        raise AssertionError("a seventeenth attempt")


def test_notes_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    out, retrier = str(tmp_path), Retrier(0)
    sweep(out, retrier)  # there are none yet
    with attempt(out, "decode", "shard", "run", retrier):
        left = next((tmp_path / "in-flight").iterdir()).read_bytes()
    (tmp_path / "in-flight/shard-decode.json").write_bytes(left)
    sweep(out, retrier)
    assert not any((tmp_path / "in-flight").iterdir())


def test_storage_error_is_found_in_what_ray_wraps_around_it() -> None:
    class TaskError(Exception):
        cause: Exception | None = None

    inner, outer = StorageError("down"), TaskError("task")
    outer.cause = inner
    wrapped = RuntimeError("x")
    wrapped.__cause__ = outer
    assert find_storage_error(wrapped) is inner
    assert find_storage_error(RuntimeError("x")) is None


def test_recipe_bounds_shards_in_seconds(recipe: PrepareRecipe) -> None:
    assert recipe.shard_size == 180  # of 20 s: an hour
    assert replace(recipe, max_seconds=5.0).shard_size == 512
    with pytest.raises(ValueError, match="seconds_per_shard: must be max_seconds or more"):
        replace(recipe, seconds_per_shard=10.0)
    tables = list(shard_items([item(str(n)) for n in range(400)], recipe.shard_size))
    assert [len(table) for table in tables] == [180, 180, 40]
    assert np.unique([t.column("shard")[0].as_py() for t in tables]).size == 3
