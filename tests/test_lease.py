"""The right to write below a URI: refused to a second run, taken over from a killed one."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.s3_outages import s3_server

from valle.platform import lease, storage
from valle.platform.lease import LeaseError


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)


def test_lease_refuses_a_second_run_naming_the_first(tmp_path: Path) -> None:
    uri = str(tmp_path / "out/prepare.lease")
    with lease.lease(uri, "prepare") as held:
        with (
            pytest.raises(LeaseError, match=r"another run is writing there: prepare on .+ \(pro"),
            lease.lease(uri, "prepare"),
        ):
            raise AssertionError("two runs hold it")
        held.check()
    assert not storage.exists(uri)  # given back
    with lease.lease(uri, "prepare"):
        assert storage.exists(uri)
    assert list((tmp_path / "out").iterdir()) == []


def test_lease_of_a_dead_process_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 1000.0)
    uri = str(tmp_path / "x.lease")
    code = (
        "import os; from valle.platform import lease\n"
        f"with lease.lease({uri!r}, 'prepare'): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert json.loads(Path(uri).read_text())["job"] == "prepare"
    with lease.lease(uri, "prepare") as held:
        held.check()


def test_lease_of_another_machine_is_taken_over_when_it_is_stale(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.lease")
    with lease.lease(uri, "prepare"):
        holder = storage.read_json(uri)
    storage.write_json(uri, {**holder, "machine": "elsewhere", "pid": 1})
    with lease.lease(uri, "prepare") as held:
        held.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"owner": 1}', b"\xff"])
def test_lease_that_cannot_be_read_is_replaced(tmp_path: Path, content: bytes) -> None:
    uri = tmp_path / "x.lease"
    uri.write_bytes(content)
    with lease.lease(str(uri), "prepare") as held:
        held.check()


def test_lease_that_another_takes_is_noticed(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.lease")
    with lease.lease(uri, "prepare") as held:
        storage.write_json(uri, {**storage.read_json(uri), "owner": "another"})
        held._thread.join(10)
        with pytest.raises(LeaseError, match="taken over by prepare on"):
            held.check()
    assert storage.exists(uri)  # the other's


def _race(uri: str, runs: int = 6) -> tuple[list[str], list[str]]:
    """Outcomes of runs that start at the same time: holders and refusals."""
    holders, refusals, start, done = [], [], threading.Barrier(runs), threading.Event()

    def run(name: str) -> None:
        start.wait()
        try:
            with lease.lease(uri, name):
                holders.append(name)
                done.wait(30)
        except LeaseError as error:
            refusals.append(str(error))
            if len(refusals) == runs - 1:
                done.set()

    threads = [threading.Thread(target=run, args=[f"job{n}"]) for n in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return holders, refusals


def test_lease_of_six_that_start_together_one_holds(tmp_path: Path) -> None:
    holders, refusals = _race(str(tmp_path / "x.lease"))
    assert len(holders) == 1 and len(refusals) == 5
    assert all(holders[0] in refusal for refusal in refusals)


@pytest.mark.ray
def test_lease_on_s3_is_held_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditional PUT decides among those that start together."""
    with s3_server(monkeypatch, "valle") as bucket:
        holders, refusals = _race(f"{bucket}/a b/x.lease", 3)
        assert len(holders) == 1 and len(refusals) == 2
        with lease.lease(f"{bucket}/a b/x.lease", "next") as held:
            held.check()
