"""`torch.compile` on this machine: whether it works, and whether code is compiled in fact.

Two fallbacks are silent but for a log line. Dynamo runs a function eagerly once it has compiled it
for eight shapes or models; inductor compiles without CUDA graphs. `strict` turns the first into an
error and counts the second.
"""

import platform
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from valle.platform import settings

COLD_COMPILE_SECONDS, WARM_COMPILE_SECONDS = 60.0, 30.0
"""Time allowed for compiling a 12-layer model, first with an empty inductor cache and then with the
kernels of an earlier case in it."""

SHALLOW_COMPILE_SECONDS = 20.0
"""Time allowed for compiling a model of two layers."""


@dataclass
class CompileCounters:
    """Counters of the compiler since the beginning of `strict`."""

    cudagraph_replays: int = 0
    """Launches of CUDA graphs."""

    @property
    def graphs(self) -> int:
        """Graphs traced by dynamo: one per function, and one more for each recompilation and each
        graph break."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def cudagraph_skips(self) -> int:
        """How often inductor compiled without a CUDA graph although it was asked for one."""
        return int(counters["inductor"]["cudagraph_skips"])


@contextmanager
def strict(raises: bool = True) -> Iterator[CompileCounters]:
    """Resets the compiler and its counters, and makes a ninth compilation of a function an error.

    With `raises=False` such a function runs eagerly, for tests of results instead of speed.
    """
    torch._dynamo.reset()
    counters.clear()
    compile_counters = CompileCounters()
    replay: Callable[[Any], None] = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        compile_counters.cudagraph_replays += 1
        replay(graph)

    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=raises),
        patch.object(torch.cuda.CUDAGraph, "replay", counted),
    ):
        yield compile_counters


def unavailable_reason(device: torch.device) -> str | None:
    """Compiles a function of two lines; returns why that fails, or None. Prints the traceback."""
    values = torch.arange(64.0, device=device)
    try:
        with strict():
            result = torch.compile(_wave, dynamic=True)(values)
        torch.testing.assert_close(result, _wave(values))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first} ({describe_toolchain()})"
        return f"torch.compile does not work here: {reason}"
    return None


def _wave(values: torch.Tensor) -> torch.Tensor:
    """Pointwise operations, which the compiler fuses into one kernel."""
    shifted = torch.sin(values) + 1
    return shifted * values


def describe_toolchain() -> str:
    """The compiler, headers and Python that inductor finds: for the message of a failure."""
    compiler = settings.child_environment().get("CC") or next(
        (path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None
    )
    schemes = {"posix_prefix", sysconfig.get_default_scheme()}
    folders = {sysconfig.get_path("include", scheme) for scheme in schemes}
    headers = [folder for folder in folders if (Path(folder) / "Python.h").is_file()]
    return (
        f"C compiler: {compiler or 'none on the PATH, and CC is not set'}; Python.h: "
        f"{headers[0] if headers else 'not in ' + ', '.join(sorted(folders))}; "
        f"Python {platform.python_version()} at {sys.executable}"
    )
