"""Placement on clusters of several nodes: runs the tests of `isolated/placement.py`.

Each runs in a pytest process of its own, because a process cannot join a second cluster: Ray keeps
its authentication mode, and Ray Data its references to objects, for the life of the process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ISOLATED = Path(__file__).parent / "isolated" / "placement.py"
NAMES = re.findall(r"^def (test_\w+)", ISOLATED.read_text(), re.MULTILINE)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_placement(name: str) -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, f"{ISOLATED}::{name}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=850, env=environment)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "1 passed" in run.stdout or "1 skipped" in run.stdout, run.stdout[-2000:]
