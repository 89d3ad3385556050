"""The layouts of sources, and the preparation of valid and invalid recordings."""

import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import yaml
from helpers import clusters
from pyarrow import parquet

from valle.jobs import prepare as prepare_module
from valle.jobs.ingest.layouts import list_items
from valle.jobs.ingest.listing import list_sources
from valle.jobs.ingest.source import Reject, Source, SourceItem, compile_speaker_pattern
from valle.jobs.prepare import PrepareRecipe, prepare, shard_items
from valle.model import text
from valle.model.codec import encodec
from valle.platform import audio, dataset
from valle.platform.dataset import TokenDataset
from valle.platform.resources import Placement
from valle.platform.retries import Retrier


def sound(seconds: float, rate: int = 24_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.1, (int(seconds * rate), channels))


def put(
    path: Path, samples: np.ndarray, rate: int = 24_000, words: str | None = "hello there"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    if words is not None:
        path.with_suffix(".txt").write_text(words, encoding="utf-8")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Nine valid recordings in several formats, and nine invalid ones (`REASONS`)."""
    root = tmp_path / "my corpus"
    for number in range(6):
        put(root / f"speaker{number % 2}" / f"{number}.wav", sound(0.6 + number / 5, seed=number))
    put(root / "speaker1" / "stereo 48k.flac", sound(1.0, 48_000, 2), 48_000)
    put(root / "Zoë Ünïcode" / "naïve file.wav", sound(0.8))
    put(root / "speaker0" / "compressed.mp3", sound(1.2))
    bad = root / "bad"
    put(bad / "zero.wav", sound(0.0))
    put(bad / "short.wav", sound(0.2))
    put(bad / "long.wav", sound(4.0))
    put(bad / "quiet.wav", sound(1.0) * 1e-5)
    put(bad / "no text.wav", sound(1.0), words=None)
    put(bad / "empty text.wav", sound(1.0), words=" \n")
    put(bad / "wordless.wav", sound(1.0), words="!")
    put(bad / "latin1.wav", sound(1.0))
    (bad / "latin1.txt").write_bytes("café".encode("latin-1"))
    put(bad / "corrupt.wav", sound(1.0))
    (bad / "corrupt.wav").write_bytes(b"RIFF" + bytes(range(200)))
    return root


REASONS = {
    "bad/zero": "empty audio: 0 samples",
    "bad/short": "too short: 0.20 s, limit 0.5 s",
    "bad/long": "too long: more than 3 s, limit 3 s",
    "bad/quiet": "too quiet: -93 dB, limit -50 dB",
    "bad/no text": "no transcript beside the recording",
    "bad/empty text": "empty text",
    "bad/wordless": "text cannot be phonemized: text: nothing to say in it",
    "bad/latin1": "text is not UTF-8",
    "bad/corrupt": "unreadable audio",
}


def recipe_for(corpus: Path, tmp_path: Path, codec: Path) -> PrepareRecipe:
    return PrepareRecipe(
        out=str(tmp_path / "tokens"),
        sources=(Source(path=str(corpus)),),
        codec=str(codec),
        max_seconds=3.0,
        utterances_per_shard=6,
        workers=1,
        placement=Placement(accelerator="cpu"),
    )


@pytest.mark.ray
def test_prepare_mixed_inputs_encodes_or_rejects(
    ray_cluster: None, corpus: Path, tmp_path: Path, tiny_codec_folder: Path
) -> None:
    """Codes equal those of each recording alone; later runs process new inputs only."""
    recipe = recipe_for(corpus, tmp_path, tiny_codec_folder)
    report = prepare(recipe)
    assert (report["inputs"], report["prepared"], report["utterances"]) == (18, 9, 9)
    assert sum(report["rejected"].values()) == 9
    rejects = [
        json.loads(line)
        for path in (tmp_path / "tokens/rejects").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    reasons = {r["id"].removeprefix("my corpus/"): r["reason"] for r in rejects}
    assert reasons.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reasons[name].startswith(reason), (name, reasons[name])

    # Codes from shards and batches equal those of one recording at a time.
    codec = encodec.load(str(tiny_codec_folder))
    tokens = TokenDataset(recipe.out, tmp_path / "cache")
    assert len(tokens) == 9
    for number in range(9):
        utterance = tokens[number]
        source = corpus / f"{utterance.id.removeprefix('my corpus/')}"
        path = next(
            p for p in source.parent.iterdir() if p.stem == source.name and p.suffix != ".txt"
        )
        wave = audio.read(path.read_bytes(), max_seconds=3)
        np.testing.assert_array_equal(utterance.codes, codec.encode([wave])[0])
        assert utterance.speaker == path.parent.name
        assert text.decode(utterance.phonemes.tolist()) == text.phonemize(["hello there"])[0]

    # A second run tries the rejects again; nothing else is left.
    again = prepare(recipe)
    assert (again["already_done"], again["prepared"], again["utterances"]) == (9, 0, 9)
    assert again["rejected"] == report["rejected"]
    assert (again["rejects_tried_again"], again["rejects_cured"], again["changed"]) == (9, 0, 0)

    # A third run processes a new file, repaired ones and changed ones.
    put(corpus / "speaker9" / "new.wav", sound(1.0))
    (corpus / "bad/no text.txt").write_text("a transcript")
    (corpus / "bad/latin1.txt").write_text("café", encoding="utf-8")
    put(corpus / "bad" / "corrupt.wav", sound(1.0))
    (corpus / "speaker0/0.txt").write_text("another text")
    third = prepare(replace(recipe, max_seconds=5.0))  # "long" is allowed now
    assert (third["already_done"], third["prepared"], third["utterances"]) == (8, 6, 14)
    assert (third["rejects_tried_again"], third["rejects_cured"]) == (9, 4)
    assert (third["changed"], third["rows_removed"]) == (1, 1)
    assert sum(third["rejected"].values()) == 5
    rejects = [
        json.loads(line)["id"].removeprefix("my corpus/")
        for path in (tmp_path / "tokens/rejects").glob("*.jsonl")
        for line in path.read_text().split("\n")
        if line
    ]
    assert sorted(rejects) == [
        "bad/empty text",
        "bad/quiet",
        "bad/short",
        "bad/wordless",
        "bad/zero",
    ]
    tokens = TokenDataset(recipe.out, tmp_path / "cache")
    texts = {tokens[number].id: tokens[number].text for number in range(14)}
    assert len(texts) == 14 and texts["my corpus/speaker0/0"] == "another text"
    # A limit that leaves out what was prepared takes it away.
    fourth = prepare(recipe)
    assert (fourth["changed"], fourth["rows_removed"], fourth["utterances"]) == (1, 1, 13)

    with pytest.raises(ValueError, match="codec mismatch: the dataset"):
        other = tmp_path / "other codec"
        encodec.save(
            encodec.build(encodec.EncodecConfig(**_tiny())), encodec.EncodecConfig(**_tiny()), other
        )
        prepare(replace(recipe, codec=str(other)))


def _tiny() -> dict:
    return {"name": "other", "n_filters": 2, "dimension": 8, "lstm": 0, "n_codebooks": 8}


@pytest.mark.ray
def test_prepare_interrupted_before_listing_adopts_the_shard(
    ray_cluster: None,
    corpus: Path,
    tmp_path: Path,
    tiny_codec_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dataset stays valid, and a second run completes it with equal codes."""
    recipe = recipe_for(corpus, tmp_path, tiny_codec_folder)
    original = prepare_module.pipeline

    def interrupted(*arguments: object) -> Iterator[dict]:
        results = original(*arguments)  # type: ignore[arg-type]
        yield next(results)
        raise KeyboardInterrupt  # the driver dies before it can list the shard

    monkeypatch.setattr(prepare_module, "pipeline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe)
    assert dataset.read_manifest(recipe.out).shards == []  # valid, but without the shard
    monkeypatch.setattr(prepare_module, "pipeline", original)
    report = prepare(recipe)
    assert report["already_done"] >= 4
    assert report["utterances"] == 9

    uninterrupted = prepare(replace(recipe, out=str(tmp_path / "uninterrupted")))
    assert uninterrupted["utterances"] == 9
    datasets = [TokenDataset(uri, tmp_path / "cache") for uri in (recipe.out, uninterrupted["out"])]
    codes = [{d[i].id: d[i].codes.tobytes() for i in range(9)} for d in datasets]
    assert codes[0] == codes[1]


@pytest.mark.ray
def test_prepare_killed_by_sigkill_is_resumed(
    ray_cluster: None,
    corpus: Path,
    tmp_path: Path,
    tiny_codec_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job with its own embedded Ray is killed after its first shard, then run again."""
    ray_folder = tempfile.TemporaryDirectory(prefix="valle-ray-", ignore_cleanup_errors=True)
    monkeypatch.setenv("RAY_TMPDIR", ray_folder.name)
    recipe = recipe_for(corpus, tmp_path, tiny_codec_folder)
    for number in range(40):
        put(corpus / f"speaker{number % 4}" / f"more {number}.wav", sound(0.6, seed=number))
    (tmp_path / "killed.yaml").write_text(
        yaml.safe_dump({"prepare": json.loads(json.dumps(asdict(recipe)))})
    )
    command = [
        sys.executable,
        "-m",
        "valle.jobs.prepare",
        "--recipe",
        str(tmp_path / "killed.yaml"),
    ]
    with (tmp_path / "killed.log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        shards = tmp_path / "tokens"
        clusters.wait_for(lambda: any(shards.rglob("*.parquet")), 120, "a shard")
    finally:
        children = psutil.Process(job.pid).children(recursive=True)
        job.kill()
        for child in children:
            child.kill()
    assert job.wait(timeout=30) == -signal.SIGKILL
    for path in shards.rglob("*.parquet"):
        parquet.read_table(path)  # raises for an incomplete file

    report = prepare(recipe)
    assert 0 < report["already_done"] < report["inputs"]
    assert report["utterances"] == 49
    assert len(TokenDataset(recipe.out, tmp_path / "cache")) == 49
    ray_folder.cleanup()


@pytest.mark.parametrize(
    ("pattern", "path", "speaker"),
    [
        ("{speaker}/*", "a/b/c.wav", ("b",)),
        ("{speaker}/*/*", "root/a/b/c.wav", ("a",)),
        ("{speaker}/{speaker}/*", "x/lib/19/c.wav", ("lib", "19")),
        ("{speaker}/*/*", "c.wav", None),
    ],
)
def test_compile_speaker_pattern_matches_end_of_path(
    pattern: str, path: str, speaker: tuple[str, ...] | None
) -> None:
    match = compile_speaker_pattern(pattern).search(path)
    assert (match.groups() if match else None) == speaker


@pytest.mark.parametrize(
    "pattern", ["*/*", "{speaker}", "lambda p: p", "{speaker}/{name}", "*/{speaker}"]
)
def test_source_bad_speaker_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"speaker_pattern: .* must be folders of"):
        Source(path="x", speaker_pattern=pattern)


def test_list_items_ljspeech_libritts_and_manifest(tmp_path: Path) -> None:
    """Each layout yields its items, and rejects for what does not fit it."""
    lj = tmp_path / "LJSpeech-1.1"
    put(lj / "wavs/LJ001-0001.wav", sound(1), words=None)
    (lj / "metadata.csv").write_text("LJ001-0001|Dr. 1|Doctor one\nLJ001-0002\n")
    items = list(list_items(Source(path=str(lj), layout="ljspeech")))
    assert isinstance(items[0], SourceItem) and isinstance(items[1], Reject)
    assert (items[0].speaker, items[0].text) == ("LJSpeech-1.1", "Doctor one")
    assert items[0].audio.endswith("wavs/LJ001-0001.wav")

    libri = tmp_path / "train-clean-100"
    put(libri / "19/198/19_198_0.wav", sound(1), words=None)
    (libri / "19/198/19_198_0.normalized.txt").write_text("hello there")
    put(libri / "stray.wav", sound(1), words=None)
    items = list(list_items(Source(path=str(libri), layout="libritts")))
    assert isinstance(items[0], SourceItem) and isinstance(items[1], Reject)
    assert items[0].speaker == "19"
    assert items[0].text_uri == f"{libri}/19/198/19_198_0.normalized.txt"

    manifest = tmp_path / "list.jsonl"
    rows = [
        '{"audio": "a b.wav", "text": "hi", "speaker": "s", "language": "de", "id": "7"}',
        '{"audio": "s3://bucket/x.wav", "text": "ho", "speaker": "s"}',
        "",
        '{"audio": "c.wav"}',
        "not json",
    ]
    manifest.write_text("\n".join(rows))
    entries = list(list_items(Source(path=str(manifest), layout="manifest")))
    items = [entry for entry in entries if isinstance(entry, SourceItem)]
    assert [(i.id, i.language, i.audio) for i in items] == [
        ("7", "de", f"{tmp_path}/a b.wav"),
        ("list.jsonl/s3://bucket/x.wav", "en-us", "s3://bucket/x.wav"),
    ]
    assert [e.source for e in entries if isinstance(e, Reject)] == [
        f"{manifest}:4",
        f"{manifest}:5",
    ]
    with pytest.raises(FileNotFoundError, match="prepare.sources: .* does not exist"):
        list(list_items(Source(path=str(tmp_path / "none"))))


def test_shard_items_any_order_gives_equal_shards() -> None:
    """Shards are in order of speaker, and their names do not depend on the order of items."""
    items = [
        SourceItem(
            id=f"{n}", speaker=f"s{n % 3}", language="en-us", audio="", text="x", text_uri=None
        )
        for n in range(10)
    ]
    tables = list(shard_items(items, 4))
    speakers = [s for t in tables for s in t.column("speaker").to_pylist()]
    assert speakers == sorted(speakers)
    names = [set(t.column("shard").to_pylist()) for t in tables]
    reversed_names = [set(t.column("shard").to_pylist()) for t in shard_items(items[::-1], 4)]
    assert names == reversed_names and all(len(n) == 1 for n in names)


def test_prepare_roots_with_equal_ids_raise(tmp_path: Path, tiny_codec_folder: Path) -> None:
    for parent in ("a", "b"):
        put(tmp_path / parent / "data" / "s" / "1.wav", sound(1))
    sources = tuple(Source(path=str(tmp_path / parent / "data")) for parent in ("a", "b"))
    recipe = PrepareRecipe(out=str(tmp_path / "o"), sources=sources, codec=str(tiny_codec_folder))
    with pytest.raises(ValueError, match="have the same id 'data/s/1'"):
        list_sources(recipe.sources, Retrier(0))


def test_wav_bytes_round_trip_keeps_samples() -> None:
    wave = sound(0.5)[:, 0].astype(np.float32)
    samples, rate = soundfile.read(io.BytesIO(audio.wav_bytes(wave)))
    assert rate == 24_000
    np.testing.assert_allclose(samples, wave, atol=1e-4)
