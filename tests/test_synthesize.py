"""Offline synthesis of a manifest: equality with the slow twin, errors, and resuming."""

import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.synthesize import SynthesizeRecipe, SynthesizeShard, read_lines, synthesize
from valle.model.sentences import join_waves
from valle.model.text import phoneme_ids
from valle.model.valle import Synthesis, SynthesisResult, Synthesizer
from valle.platform import audio, registry, storage
from valle.platform.resources import Placement
from valle.platform.retries import Retrier, StorageError
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request
from valle.serve.web.audio_formats import encode_audio


@pytest.fixture
def synthesizer(database: Path, publish_recipe: PublishRecipe) -> Synthesizer:
    publish(publish_recipe)
    return registry.load_synthesizer(registry.resolve(registry.CHAMPION))


def test_offline_synthesizer_batch_equals_single_requests(synthesizer: Synthesizer) -> None:
    """Codes and waves equal those of the slow twin; a too long request is an error of its own."""
    prompt = audio.read(storage.read_bytes("voices/ann.wav"), max_seconds=30)
    synthesis = Synthesis(max_seconds=1.0)
    codes = synthesizer.encode_prompt(prompt, synthesis)
    texts = ["One.", "Two and three, and a few more words.", "Four.", "Five six seven."]

    def request(number: int, ids: list[int]) -> Request:
        return Request(
            id=str(number),
            phonemes=ids,
            prompt=codes,
            sampling=synthesis.ar,
            max_frames=75,
            seed=number,
        )

    requests = [request(n, phoneme_ids(text, "en-us")) for n, text in enumerate(texts)]
    offline = OfflineSynthesizer(synthesizer, synthesis, slots=2, max_phonemes=100)
    requests.insert(2, request(99, [5] * 500))
    for _ in range(2):  # used slots give the same results as new ones
        results = offline.synthesize(requests)
        assert isinstance(results[2], ValueError) and "a slot holds" in str(results[2])
        for number, (text, result) in enumerate(zip(texts, results[:2] + results[3:], strict=True)):
            expected = synthesizer.synthesize(text, prompt, replace(synthesis, seed=number))
            assert isinstance(result, SynthesisResult)
            np.testing.assert_array_equal(result.codes, expected.codes)
            np.testing.assert_allclose(result.wave, expected.wave, atol=1e-5)
            assert result.hit_limit == expected.hit_limit


@pytest.mark.ray
def test_synthesize_second_run_does_missing_and_changed_lines(
    ray_cluster: None, synthesizer: Synthesizer, publish_recipe: PublishRecipe, home: Path
) -> None:
    """JSONL first, then Parquet: missing, retried and changed lines; another model is refused."""
    lines = [
        {"id": "a", "text": "Hello there. Good bye.", "prompt": "ann.wav", "seed": 7},
        {"id": "b", "text": "Hello there.", "prompt": "bob.wav"},
        {"id": "c", "text": "...", "prompt": "ann.wav"},
        {"text": "No name.", "prompt": "ann.wav"},
        {"id": "e", "text": "Bonjour.", "prompt": "ann.wav", "language": "xx"},
    ]
    (home / "lines.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    recipe = SynthesizeRecipe(
        manifest=str(home / "lines.jsonl"),
        recordings="voices",
        out=str(home / "spoken"),
        synthesis=Synthesis(max_seconds=1.0),
        lines_per_shard=2,
        format="wav",
    )
    half_gpu = Placement(gpus_per_worker=0.5)
    report = synthesize(replace(recipe, placement=half_gpu))
    assert (report["lines"], report["already_done"], report["errors"]) == (4, 0, 2)
    assert report["accelerator"] == "gpu"
    recipe = replace(recipe, placement=Placement(accelerator="cpu"), workers=1)
    (home / "voices/bob.wav").write_bytes((home / "voices/ann.wav").read_bytes())
    blank = {"id": None, "language": None, "seed": None}
    table = pa.Table.from_pylist([{**blank, **line} for line in lines])
    pq.write_table(table, home / "lines.parquet")
    parquet = replace(recipe, manifest=str(home / "lines.parquet"))
    report = synthesize(parquet)
    assert (report["lines"], report["already_done"], report["errors"]) == (5, 4, 1)
    report = synthesize(replace(parquet, retry_errors=True))
    assert (report["already_done"], report["errors"]) == (2, 2)
    lines[0]["seed"] = 8
    pq.write_table(pa.Table.from_pylist([{**blank, **line} for line in lines]), parquet.manifest)
    assert synthesize(parquet)["already_done"] == 4
    assert publish(publish_recipe).version == 2
    with pytest.raises(ValueError, match=r"has speech of models:/valle/1\S*, not of models:/v"):
        synthesize(parquet)

    manifest = pq.read_table(home / "spoken/manifest").to_pylist()
    rows = {row["id"]: row for row in manifest}
    assert len(manifest) == len(rows) == 5
    assert rows["b"]["error"] is None and "nothing to say" in rows["c"]["error"]
    assert "espeak has no voice named 'xx'" in rows["e"]["error"]
    prompt = audio.read((home / "voices/ann.wav").read_bytes(), max_seconds=30)
    waves = []
    for number, sentence in enumerate(("Hello there.", "Good bye.")):
        synthesis = Synthesis(max_seconds=1.0, seed=8 + number)
        waves.append(synthesizer.synthesize(sentence, prompt, synthesis).wave)
    samples, _ = soundfile.read(home / "spoken" / rows["a"]["audio"], dtype="int16")
    expected, _ = soundfile.read(io.BytesIO(encode_audio(join_waves(waves), "wav")), dtype="int16")
    assert np.abs(samples.astype(int) - expected).max() <= 1
    assert rows["a"]["seconds"] == pytest.approx(len(samples) / 24_000, abs=1e-3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "x"}, "line 2: needs text and prompt"),
        ({"text": "x", "prompt": 3}, "line 2: needs text and prompt"),
        ({"text": "x", "prompt": "p", "id": "../x"}, "line 2: id '../x': letters, digits"),
        ({"text": "a", "prompt": "p"}, "is there twice"),
        ([1], "line 2: array, a JSON object is needed"),
        ({"text": "x", "prompt": "p", "seed": "one"}, "line 2: seed 'one' is no whole number"),
        ({"text": "x", "prompt": "p", "seed": -1}, "line 2: seed -1 is no whole number"),
        ({"text": "x", "prompt": "p", "language": 5}, "line 2: language 5 is no string"),
    ],
)
def test_read_lines_invalid_line_raises(home: Path, line: object, reason: str) -> None:
    path = home / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"text": "a", "prompt": "p"}, line])))
    with pytest.raises(ValueError, match=reason):
        read_lines(SynthesizeRecipe(manifest=str(path), out="out"))


def test_read_lines_invalid_json_names_the_line(home: Path) -> None:
    path = home / "lines.jsonl"
    path.write_text('{"text": "a", "prompt": "p"}\n\n{"text": "b"\n')
    reason = "manifest: line 3: not JSON"
    with pytest.raises(ValueError, match=reason):
        read_lines(SynthesizeRecipe(manifest=str(path), out="out"))


def test_rows_of_earlier_versions_are_of_the_pinned_model() -> None:
    """So that a synthesis that was begun before names held the content goes on."""
    version, folder = "models:/valle/3#m-" + "a" * 32 + "/1a2b3c4d", "/data/nano#" + "b" * 64
    for former in (version, "models:/valle/3"):
        assert registry.is_same(former, version)
    for former in (folder, "/data/nano", "/moved/nano#" + "b" * 64):
        assert registry.is_same(former, folder)
    for former in (folder, "models:/valle/30", version.replace("a", "c")):
        assert not registry.is_same(former, version)
    for former in (version, "/data/nano2", "/data/nano#" + "c" * 64):
        assert not registry.is_same(former, folder)


def test_a_prompt_that_may_not_be_read_is_an_error_of_its_lines(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole store that refuses ends the run."""

    def refuse(uri: str) -> bytes:
        raise PermissionError(errno.EACCES, "no", uri)

    shard = SynthesizeShard.__new__(SynthesizeShard)
    shard._recipe = SynthesizeRecipe(manifest="m", out="out", recordings=str(home))
    shard._retrier, shard._prompts = Retrier(0), {}
    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"prompt: no permission for .*ann\.wav"):
        shard._prompt("ann.wav")
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    with pytest.raises(StorageError):
        shard._prompt("ann.wav")
