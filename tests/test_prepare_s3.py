"""`prepare` from S3 to S3, through an outage: nothing is lost, and nothing is a reject."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from helpers.s3_outages import FailingProxy, failing_proxy, s3_server
from test_prepare import put, sound

from valle.platform import settings, storage
from valle.platform.dataset import TokenDataset

NAMES = ("s/a b.wav", "s/ü#1?.wav", "t/100%.wav", "t/a+b.wav", "t/e.wav", "u/f.wav")


def start(folder: Path, bucket: str, codec: Path, retry_seconds: float) -> subprocess.Popen[str]:
    """The command, with a cluster of its own."""
    section = {
        "out": f"{bucket}/out tokens", "sources": [{"path": f"{bucket}/my corpus"}],
        "codec": str(codec), "utterances_per_shard": 2, "workers": 1,
        "storage_retry_seconds": retry_seconds, "placement": {"accelerator": "cpu"},
    }  # fmt: skip
    (folder / "s3.yaml").write_text(yaml.safe_dump({"prepare": section}))
    return subprocess.Popen(
        [sys.executable, "-m", "valle.jobs.prepare", "--recipe", str(folder / "s3.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fill(folder: Path, bucket: str) -> None:
    for number, name in enumerate(NAMES):
        put(folder / "local" / name, sound(0.7, seed=number))
        for path in (folder / "local" / name, (folder / "local" / name).with_suffix(".txt")):
            uri = f"{bucket}/my corpus/{path.relative_to(folder / 'local')}"
            storage.write_bytes(uri, path.read_bytes())


def fail_once_it_works(proxy: FailingProxy, seconds: float) -> None:
    """The outage begins when the first recording is read by a worker."""
    state = {"end": float("inf")}

    def fails(method: str, path: str) -> bool:
        if state["end"] == float("inf") and method == "GET" and path.endswith(".wav"):
            state["end"] = time.monotonic() + seconds
        return state["end"] != float("inf") and time.monotonic() < state["end"]

    proxy.fails = fails


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory(prefix="valle-ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield folder


def check_outage(home: Path, monkeypatch: pytest.MonkeyPatch, codec: Path, seconds: float) -> None:
    with s3_server(monkeypatch, "valle") as bucket:
        fill(home, bucket)
        server = dict(settings.storage_variables())["AWS_ENDPOINT_URL"]
        with failing_proxy(monkeypatch, server) as proxy:
            fail_once_it_works(proxy, seconds)
            output, errors = start(home, bucket, codec, 120).communicate(timeout=400)
            assert proxy.failures
        report = json.loads(output[output.index("{") :])
        assert (report["prepared"], report["rejected"]) == (6, {}), errors
        if seconds > 20:  # the S3 client itself outlasts a few seconds
            assert report["storage_retries"] > 0
        assert list(storage.list_files(f"{bucket}/out tokens/rejects")) == []
        assert len(TokenDataset(f"{bucket}/out tokens", home / "cache")) == 6


@pytest.mark.ray
def test_prepare_survives_two_seconds_of_503(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_codec_folder: Path, ray_folder: str
) -> None:
    check_outage(home, monkeypatch, tiny_codec_folder, 2)


@pytest.mark.ray
@pytest.mark.faults
def test_prepare_survives_thirty_seconds_of_503(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_codec_folder: Path, ray_folder: str
) -> None:
    check_outage(home, monkeypatch, tiny_codec_folder, 30)


@pytest.mark.ray
@pytest.mark.faults
def test_prepare_stops_when_storage_stays_away(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_codec_folder: Path, ray_folder: str
) -> None:
    """It ends with an error and records no reject; the next run does all."""
    with s3_server(monkeypatch, "valle") as bucket:
        fill(home, bucket)
        server = dict(settings.storage_variables())["AWS_ENDPOINT_URL"]
        with failing_proxy(monkeypatch, server) as proxy:
            fail_once_it_works(proxy, 10_000)
            job = start(home, bucket, tiny_codec_folder, 3)
            output, errors = job.communicate(timeout=400)
            assert job.returncode == 1
            assert "error: storage failed" in errors and "run the job again" in errors
        assert list(storage.list_files(f"{bucket}/out tokens/rejects")) == []
        output, errors = start(home, bucket, tiny_codec_folder, 60).communicate(timeout=400)
        report = json.loads(output[output.index("{") :])
        assert (report["prepared"], report["rejected"]) == (6, {}), errors
