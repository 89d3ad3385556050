"""Measurements on a device: seconds, peak memory, synchronisations, kernels."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(device: torch.device, work: Callable[[], object], repeats: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, the device's work included."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of `peak_gigabytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gigabytes(device: torch.device) -> float | None:
    """Peak memory of tensors since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def allow_tf32(matmul: bool, convolution: bool) -> None:
    """Permits or forbids TF32 in float32 matrix products and in convolutions."""
    torch.set_float32_matmul_precision("high" if matmul else "highest")
    torch.backends.cudnn.allow_tf32 = convolution


def count_syncs(device: torch.device, work: Callable[[], object]) -> int | None:
    """How often `work` makes the host wait for the device; None on a CPU.

    PyTorch's sync debug mode warns at every implicit wait; `torch.cuda.synchronize` does not count.
    """
    if device.type != "cuda":
        work()
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@dataclass(frozen=True)
class Launches:
    """Launches of a piece of work."""

    kernels: int
    """Kernels and copies on the device; on a CPU, operators of ATen."""

    busy_seconds: float
    """Sum of their durations."""

    graphs: int
    """Launches of CUDA graphs."""


def profile_launches(device: torch.device, work: Callable[[], object]) -> Launches:
    """Counts the launches of `work` with PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        synchronize(device)
    events = list(profile.events() or [])
    graphs = sum(event.name == "cudaGraphLaunch" for event in events)
    if device.type == "cuda":
        events = [e for e in events if e.device_type == DeviceType.CUDA]
    else:
        events = [e for e in events if e.name.startswith("aten::")]
    return Launches(len(events), sum(e.time_range.elapsed_us() for e in events) / 1e6, graphs)
