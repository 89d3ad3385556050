"""Jobs submitted to a running cluster: its workers run the submitted code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from helpers import clusters

from valle.platform.cluster import CODE_ROOT


def checkout(target: Path, version: str) -> Path:
    """A copy of the tracked files with one line changed."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=CODE_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in files.stdout.splitlines():
        source = CODE_ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / name, follow_symlinks=False)
    line = target / "valle/__init__.py"
    text = line.read_text()
    assert '__version__ = "0.1.0"' in text
    line.write_text(text.replace('__version__ = "0.1.0"', f'__version__ = "{version}"'))
    return target


def submit(address: str, code: Path, home: Path, *command: str) -> str:
    """`ray job submit --working-dir . -- python ...`; returns its output."""
    environment = {"env_vars": {"VALLE_HOME": str(home), "VALLE_CACHE": str(home / "cache")}}
    process = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"),
            "job",
            "submit",
            f"--address={address}",
            "--working-dir=.",
            f"--runtime-env-json={json.dumps(environment)}",
            "--",
            sys.executable,
            *command,
        ],
        cwd=code,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | clusters.NO_AUTH,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]
    return process.stdout


@pytest.mark.ray
def test_submit_second_checkout_runs_its_own_code(
    tmp_path: Path, home: Path, tiny_codec_folder: Path
) -> None:
    """Checkpoints record the version of the checkout that each job was submitted from."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = home / "speech" / f"s{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 14_000 + 500 * number), 24_000)
        path.with_suffix(".txt").write_text("one two three")
    sections = {
        "prepare": {
            "out": "tokens",
            "sources": [{"path": "speech"}],
            "codec": str(tiny_codec_folder),
            "utterances_per_shard": 12,
        },
        "train": {
            "data": "tokens",
            "run": "submitted",
            "models": ["ar"],
            "steps": {"ar": 4},
            "model": {"size": "mini", "width": 16, "n_heads": 2, "n_layers": 1},
            "batching": {"max_tokens": 400},
            "workers": 1,
            "samples": 0,
            "checkpoint_every": 4,
            "codec": str(tiny_codec_folder),
            "validation_utterances": 2,
        },
    }
    recipe = home / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(sections))
    first = checkout(tmp_path / "first", "1.1.1")
    second = checkout(tmp_path / "second", "2.2.2")
    with clusters.job_server() as address:
        report = submit(address, first, home, "jobs/prepare.py", "--recipe", str(recipe))
        assert '"prepared": 24' in report
        for code, version in ((first, "1.1.1"), (second, "2.2.2")):
            run = f"run={version}"
            submit(address, code, home, "jobs/train.py", "--recipe", str(recipe), run)
            config = home / f"runs/{version}-ar/step_00000004/config.json"
            assert json.loads(config.read_text())["code_version"] == version
