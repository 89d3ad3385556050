"""Collects the wheels for a bare machine with a GPU: `make gpu-wheels`.

The machine has Python 3.12, torch, numpy, safetensors and pyarrow, no network, and accepts 64 MiB:
the tracked files of this repository and these wheels. Versions are those of constraints.txt.
encodec and deepspeed are published as source and built to pure wheels here; nothing is installed.
The list includes the dependencies of its wheels that torch does not bring.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".whl"
LIMIT = 64 * 2**20
"""Most bytes of tree and wheels together."""

SOURCE_ONLY: Final = ("encodec", "deepspeed")
"""Published as source only."""

WHEELS: Final = (
    "annotated-types", "cachetools", "dacite", "einops", "filelock", "hjson", "jaxtyping",
    "msgpack", "packaging", "psutil", "py-cpuinfo", "pydantic", "pydantic-core", "tqdm",
    "typing-extensions", "typing-inspection", "wadler-lindig",
)  # fmt: skip
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PYTHON_VERSION = "3.12"


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, downloads and lists the wheels; returns 1 when tree and wheels are too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder, emptied (%(default)s)")
    folder = parser.parse_args(argv).out
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # pure wheels of what is published as source, then binary wheels for the machine's Python
    pins = pinned_versions((ROOT / "constraints.txt").read_text())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(folder), *requirements(SOURCE_ONLY, pins)],
        check=True,
    )
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run(
        [
            *pip,
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation",
            "cp",
            "--python-version",
            PYTHON_VERSION,
            *platforms,
            "-d",
            str(folder),
            *requirements(WHEELS, pins),
        ],
        check=True,
    )
    wheels = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    return print_sizes(wheels, tracked_bytes())


def pinned_versions(constraints: str) -> dict[str, str]:
    """Exact versions by normalised package name, from lines such as `name==1.2`."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def requirements(names: Sequence[str], pins: dict[str, str]) -> list[str]:
    """Requirements with exact versions. Raises ValueError for a package without one."""
    missing = [name for name in names if name not in pins]
    if missing:
        raise ValueError(f"constraints.txt: no version of {', '.join(missing)}; pin it there")
    return [f"{name}=={pins[name]}" for name in names]


def tracked_bytes() -> int:
    """Bytes of all files that git tracks."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return sum((ROOT / name).lstat().st_size for name in names if name and (ROOT / name).exists())


def print_sizes(wheels: dict[str, int], tree: int) -> int:
    """Prints sizes; returns 1 when they are above the limit, else 0."""
    for name, size in wheels.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = tree + sum(wheels.values())
    print(f"{sum(wheels.values()) / 2**20:7.2f} MiB  {len(wheels)} wheels")
    print(f"{tree / 2**20:7.2f} MiB  tracked files")
    print(f"{total / 2**20:7.2f} MiB  together, of {LIMIT / 2**20:.0f}")
    if total > LIMIT:
        print("too large: carry less, or track less (release/, docs/*.png)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
