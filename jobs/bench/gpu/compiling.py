"""`torch.compile` on this machine: whether it works, and that what is called compiled is.

Dynamo runs a function eagerly, with a warning only, once it has compiled it for eight shapes or
models; and inductor leaves CUDA graphs out, with a line in the log only. `strict` makes an error of
the first and counts what shows the second.
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
"""What a compilation of a 12-layer model is given: by itself, and where a case before it left its
kernels in inductor's cache."""

SHALLOW_COMPILE_SECONDS = 20.0
"""Of a model of two layers."""


@dataclass
class CompileCounters:
    """What the compiler has done since `strict` began."""

    cudagraph_replays: int = 0
    """Launches of CUDA graphs."""

    @property
    def graphs(self) -> int:
        """Graphs that dynamo traced: one a function, and one more each time it had to do it again
        or to break a function up."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def cudagraph_skips(self) -> int:
        """How often inductor compiled without the CUDA graph it was asked for."""
        return int(counters["inductor"]["cudagraph_skips"])


@contextmanager
def strict(raises: bool = True) -> Iterator[CompileCounters]:
    """A compiler that remembers nothing, and raises where a function is compiled for the ninth time
    instead of running it eagerly; unless it is told not to, where results matter and speed does
    not."""
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
    """Why `torch.compile` does not work here, by compiling a function of two lines; None where it
    does. The traceback is printed."""
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
    """A fused kernel."""
    shifted = torch.sin(values) + 1
    return shifted * values


def describe_toolchain() -> str:
    """What is known to be needed, and what of it was found: for people to whom it failed."""
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
