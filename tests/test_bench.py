"""Every benchmark on tiny models: its code runs, and its report has the rows that it promises."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers.endpoints import SharedEndpoint
from helpers.recordings import speech
from helpers.tiny_bundles import pack_bundle

from valle.jobs.bench import chapter, engine, nar, prepare, scaling, serve, soak, timing
from valle.model.codec.encodec import Encodec
from valle.platform import audio
from valle.serve.app_args import AppArgs

DEPLOYMENTS = {"AR", "NAR", "Codec", "Ingress"}


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_codec: Encodec, tiny_codec_folder: Path
) -> Path:
    return pack_bundle(tmp_path_factory.mktemp("bench"), tiny_codec_folder, tiny_codec.identity)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two starter voices, as vowels."""
    folder = tmp_path_factory.mktemp("voices")
    for seed, name in enumerate(soak.VOICES):
        (folder / f"{name}.wav").write_bytes(audio.wav_bytes(speech(1.5, seed)))
    return folder


@pytest.fixture(scope="module")
def shared_url(shared_endpoint: SharedEndpoint, bundle: Path, voices: Path) -> Iterator[str]:
    """One endpoint for all benchmarks; it takes a text of any length that they send."""
    args = AppArgs(model=str(bundle), voices=str(voices), max_replicas=1, max_characters=100_000)
    yield shared_endpoint.get("benchmarks", args, lambda home: None).url
    shared_endpoint.close()


@pytest.fixture
def run(
    shared_url: str,
    bundle: Path,
    voices: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Runs a benchmark's `main` on the shared endpoint instead of one of its own; returns what it
    prints."""
    (home / "data").mkdir()
    (home / "data/voices").symlink_to(voices)

    @contextmanager
    def share(args: AppArgs, port: int) -> Iterator[str]:
        assert args.model.partition("#")[0] == str(bundle) and Path(args.voices).samefile(voices)
        yield shared_url

    def run_main(module: Any, *arguments: str) -> list[Any]:
        monkeypatch.setattr(module, "endpoint", share)
        module.main(["--model", str(bundle), *arguments])
        return read_reports(capsys.readouterr().out)

    return run_main


def read_reports(output: str) -> list[Any]:
    """The JSON objects that a benchmark has printed, between lines of Ray's workers."""
    texts = re.findall(r"^\{$.*?^\}$", output, re.MULTILINE | re.DOTALL)
    return [json.loads(text) for text in texts]


def test_engine_reports_a_row_per_variant(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--frames", "6", "--streams", "2", "--rounds", "1", "--precisions", "bf16"]
    plot = tmp_path / "engine.png"
    engine.main(["--model", str(bundle), *options, "--plot", str(plot)])
    (report,) = read_reports(capsys.readouterr().out)
    names = ("engine", "guided", "bf16", "guided bf16")
    assert set(report["variants"]) == {
        "uncached", "cached", *(f"{name}, {streams}" for name in names for streams in (1, 2))
    }  # fmt: skip
    for row in report["variants"].values():
        assert row["frames_per_second"] > 0 and row["speedup_over_uncached"] > 0
    assert report["variants"]["engine, 1"]["speedup_over_one_stream"] == 1
    assert report["frames"] == 6 and report["limit_frames_per_second"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nar_reports_a_row_per_variant(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--frames", "40", "--sentences", "2", "--rounds", "1", "--guided-levels", "2"]
    nar.main(["--model", str(bundle), *options])
    (report,) = read_reports(capsys.readouterr().out)
    assert len(report) == 3 + 2 * 3 + 1 and "in chunks, 2 guided" in report
    assert report[nar.REFERENCE]["speedup_over_plain"] == 1
    assert all(row["real_time_factor"] > 0 for row in report.values())


def test_time_interleaved_alternates_the_variants() -> None:
    calls: list[str] = []
    variants = {name: partial(calls.append, name) for name in "ab"}
    seconds = timing.time_interleaved(variants, 3, "test")
    assert calls == ["a", "b"] * 3 and {len(values) for values in seconds.values()} == {3}
    assert timing.median_ratio([4, 9, 2], [2, 3, 2]) == 2


@pytest.mark.ray
def test_prepare_reports_the_speedup_per_number_of_workers(
    ray_cluster: None,
    tmp_path: Path,
    tiny_codec_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", generator.normal(0, 0.1, 24_000), 24_000)
        (tmp_path / f"{number}.txt").write_text("hello there")
    prepare.main(
        [
            "--codec", str(tiny_codec_folder), "--recordings", str(tmp_path), "--count", "4",
            "--rounds", "2", "--workers", "2",
        ]
    )  # fmt: skip
    (report,) = read_reports(capsys.readouterr().out)
    assert (report["recordings"], report["speech_seconds"]) == (4, 4.0)
    assert set(report["speedup"]) == {"1 worker(s)", "2 worker(s)"}
    assert all(len(row["rounds"]) == 2 and row["median"] > 0 for row in report["speedup"].values())


@pytest.mark.ray
def test_serve_compares_the_endpoint_with_the_baselines(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deployed: list[AppArgs] = []
    monkeypatch.setattr(serve, "deploy", deployed.append)
    plot = tmp_path / "serve.png"
    (report,) = run(
        serve, "--clients", "1", "2", "--requests", "1", "--rounds", "1", "--first-chunks", "8",
        "--baseline-replicas", "1", "--plot", str(plot),
    )  # fmt: skip
    rows = {(row["variant"], row["clients"]): row for row in report["rows"]}
    assert set(rows) == {(variant, clients) for variant in serve.VARIANTS for clients in (1, 2)}
    for row in rows.values():
        assert row["speech_per_second"] > 0 and row["speech_per_cpu_second"] > 0
        assert 0 < row["first_audio_p50"] <= row["first_audio_p95"]
    assert rows["one at a time", 2]["speedup_over_unbatched"] == 1
    assert len(report["served_over_bare_engine"]) == 3
    assert [args.first_chunk for args in deployed] == [8]
    assert set(report["first_chunk_sweep"]["8"]) == {"1", "2"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
def test_chapter_reports_delivery_memory_and_word_errors(run: Any, tmp_path: Path) -> None:
    wav = tmp_path / "chapter.wav"
    (report,) = run(chapter, "--characters", "200", "--out", str(wav))
    assert 100 < report["characters"] <= 200
    assert report["chunks"] >= 2 and 0 < report["chunks_in_time"] <= 1
    assert report["words"] > 10 and report["word_errors"] > 0
    memory = report["megabytes_first_median_last"]
    assert {name.split()[0] for name in memory} == DEPLOYMENTS
    seconds = soundfile.info(wav).duration
    assert report["minutes_of_speech"] == pytest.approx(seconds / 60, abs=0.006)


@pytest.mark.ray
def test_scaling_reports_phases_and_replicas(run: Any) -> None:
    options = ("--before", "0.5", "--seconds", "1", "--after", "0.5")
    (report,) = run(scaling, "--clients", "4", *options)
    assert [phase["clients"] for phase in report["phases"]] == [1, 4, 1]
    assert all(phase["responses"] > 0 for phase in report["phases"])
    started = [phase["started_at"] for phase in report["phases"]]
    assert started == sorted(started)
    changes = report["replica_changes"]
    assert set(changes) == DEPLOYMENTS
    assert all(values[-1][1] == 1 for values in changes.values())


@pytest.mark.ray
def test_soak_checks_every_answer_and_recovers_from_a_kill(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the shared endpoint: its AR replica is killed."""
    monkeypatch.setattr(soak, "BURST_EVERY", 30)
    short_kill = partial(soak.kill_replica, before=1, after=60, enough=2)
    monkeypatch.setattr(soak, "kill_replica", short_kill)
    report, kill = run(soak, "--requests", "40", "--warm-up", "4", "--clients", "4")
    assert report["failures"] == 0 and report["first_failures"] == []
    counts = report["counts"]
    assert {"valid", "cancelled", "invalid"} <= set(counts)
    assert counts["in a burst"] == soak.BURST and 0 < counts["refused in a burst"] < soak.BURST
    assert {name.split()[0] for name in report["megabytes"]} == DEPLOYMENTS
    assert {len(samples) for samples in report["megabytes"].values()} == {2}
    recovery = kill["replica_killed"]
    assert recovery["succeeded_before"] > 0 and recovery["succeeded_after"] >= 2
    assert recovery["recovery_seconds"] > 0
