"""Placement on clusters of several nodes: runs the tests of `isolated/placement.py`.

Those that join a cluster at an address run in a pytest process each, because a process cannot join
a second one: Ray keeps its authentication mode, and Ray Data its references to objects, for the
life of the process. Those that start clusters inside the process share one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ISOLATED = Path(__file__).parent / "isolated" / "placement.py"
BODIES = dict(
    re.findall(r"^def (test_\w+)(.*?)(?=^@|\Z)", ISOLATED.read_text(), re.MULTILINE | re.DOTALL)
)
EMBEDDED = [name for name, body in BODIES.items() if "clusters.embedded_cluster(" in body]
PROCESSES = [*([name] for name in BODIES if name not in EMBEDDED), EMBEDDED]


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", PROCESSES, ids=["+".join(names) for names in PROCESSES])
def test_placement(names: list[str]) -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"{ISOLATED}::{name}" for name in names)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=850, env=environment)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    counts = re.findall(r"(\d+) (?:passed|skipped)", run.stdout)
    assert sum(map(int, counts)) == len(names), run.stdout[-2000:]
