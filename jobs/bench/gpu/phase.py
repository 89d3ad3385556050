"""One phase in a process of its own: `python -m valle.jobs.bench.gpu.phase P1 --result FILE ...`.

`jobs/bench/gpu/run.py` starts it. A phase that corrupts the CUDA context or hangs ends alone.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from valle.jobs.bench.gpu.device import DeviceLimits
from valle.jobs.bench.gpu.record import TINY, PhaseContext, Record
from valle.jobs.bench.gpu.schedule import PHASES, SIZES
from valle.model import config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the phase; returns 1 when it raised. The result file is written in either case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--deadline", type=float, required=True, help="Unix time")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--limits", default="", help="device limits that P0 measured, as JSON")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    record = Record(arguments.result, arguments.deadline)
    try:
        context = make_context(arguments, record)
        record.limits = asdict(context.limits)
        importlib.import_module(f"valle.jobs.bench.gpu.{PHASES[arguments.phase].module}").run(
            context
        )
    except Exception:
        record.error(arguments.phase)
        record.status = "failed"
    else:
        record.status = "done"
    record.write()
    print(f"{arguments.phase}: {record.status} at {time.strftime('%H:%M:%S')}", flush=True)
    return 0 if record.status == "done" else 1


def make_context(arguments: argparse.Namespace, record: Record) -> PhaseContext:
    """The context of the phase. Raises RuntimeError when the device does not exist."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "--device cuda: torch finds no CUDA device (`python3 -c 'import torch; "
                "print(torch.cuda.is_available())'`); --device cpu runs without one"
            )
        device = torch.device("cuda", 0)
    elif arguments.quick:
        torch.set_num_threads(1)  # tiny shapes: threads would only wait for each other
    # shares refer to one set of constants: those of P0, or of the first phase that runs
    if arguments.limits:
        limits = DeviceLimits(**json.loads(arguments.limits))
    else:
        limits = DeviceLimits.measure(device, arguments.quick)
    size = TINY if arguments.size == "tiny" else config.SIZES[arguments.size]
    return PhaseContext(
        device=device,
        config=replace(size, dropout=0.1),
        quick=arguments.quick,
        record=record,
        scratch=arguments.scratch,
        limits=limits,
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: NCCL, CUDA graphs and compilers' workers may take long to end or hang, in the
    # time of the next phase
    os._exit(status)
