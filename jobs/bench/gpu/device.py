"""P0, the device: matrix rates, copy bandwidth and launch cost, the denominators of all shares."""

import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import torch

from valle.jobs.bench.gpu import compiling, device_timing

if TYPE_CHECKING:
    from valle.jobs.bench.gpu.record import PhaseContext

PACKAGES = ("torch", "triton", "numpy", "pyarrow", "safetensors", "deepspeed", "encodec", "ninja")

DATA_SHEET_TFLOPS: Final = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "B200": 2250, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
}  # fmt: skip
"""Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name; within a family the
longer names come first."""


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a device."""

    name: str
    bf16_flops: float
    """Floating-point operations per second of a large bf16 matrix product."""
    tf32_flops: float
    fp32_flops: float
    copy_bytes_per_second: float
    """Bytes read plus bytes written per second by a device-to-device copy."""
    launch_seconds: float
    """Host time of a kernel launch through PyTorch's dispatcher."""

    @property
    def data_sheet_flops(self) -> float | None:
        """bf16 operations per second by the data sheet, None for a device not listed; measured
        rates are about four fifths of it."""
        for part, teraflops in DATA_SHEET_TFLOPS.items():
            if part in self.name:
                return teraflops * 1e12
        return None

    @classmethod
    def measure(cls, device: torch.device, quick: bool) -> "DeviceLimits":
        """Measures the limits, in about two seconds; `quick` or on a CPU, in a fraction of one."""
        small = quick or device.type == "cpu"
        size = 256 if small else 8192
        rates = {
            "bf16": _product(device, size, torch.bfloat16),
            "tf32": _product(device, size // 2, torch.float32, tf32=True),
            "fp32": _product(device, size // 2, torch.float32),
        }
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return cls(
            name,
            rates["bf16"],
            rates["tf32"],
            rates["fp32"],
            _copy(device, 2**22 if small else 2**31),
            _launch(device),
        )


def _product(device: torch.device, size: int, dtype: torch.dtype, tf32: bool = False) -> float:
    """Operations per second of a square matrix product, with random factors: zeros are faster."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    target = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        # the first calls choose and load kernels
        times = device_timing.time_calls(device, lambda: torch.mm(a, b, out=target), 13)[3:]
    finally:
        torch.set_float32_matmul_precision(before)
    return float(2 * size**3 / statistics.median(times))


def _copy(device: torch.device, n_bytes: int) -> float:
    source = torch.randint(255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = device_timing.time_calls(device, lambda: target.copy_(source), 13)[3:]
    return 2 * n_bytes / statistics.median(times)


def _launch(device: torch.device) -> float:
    value = torch.zeros(8, device=device)

    def launch_many() -> None:
        for _ in range(1000):
            value.add_(1)

    return statistics.median(device_timing.time_calls(device, launch_many, 5)) / 1000


def describe(device: torch.device) -> dict[str, Any]:
    """Versions of packages and drivers, and the toolchain of `torch.compile`."""
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "to_compile": compiling.describe_toolchain(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device_name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gigabytes": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
            "driver": _driver(),
        }
    return machine


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The version of NVIDIA's driver, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def run(context: "PhaseContext") -> None:
    """Records versions and limits, checks the order of the matrix rates, tries `torch.compile`."""
    limits, record = context.limits, context.record
    data_sheet = limits.data_sheet_flops
    record.measurement("machine", **describe(context.device))
    record.measurement(
        "constants",
        bf16_tflops=limits.bf16_flops / 1e12,
        tf32_tflops=limits.tf32_flops / 1e12,
        fp32_tflops=limits.fp32_flops / 1e12,
        copy_gigabytes_per_second=limits.copy_bytes_per_second / 1e9,
        launch_microseconds=limits.launch_seconds * 1e6,
        data_sheet_bf16_tflops=None if data_sheet is None else data_sheet / 1e12,
    )
    if not context.on_gpu:
        return
    if not context.quick:  # a product of width 256 takes as long as its launch in any precision
        record.check(
            "tensor cores are used: bf16 > TF32 > fp32",
            limits.bf16_flops > limits.tf32_flops > limits.fp32_flops,
        )
    record.attempt("torch.compile", lambda: _compile(context))


def _compile(context: "PhaseContext") -> None:
    """Records the time of a small compilation, or why `torch.compile` does not work here."""
    started = time.perf_counter()
    reason = compiling.unavailable_reason(context.device)
    if reason is None:
        elapsed = time.perf_counter() - started
        context.record.measurement("torch.compile, two lines", seconds=elapsed)
    else:
        context.record.skip("torch.compile", reason)
