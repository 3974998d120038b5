"""The machine that a benchmark ran on, its matrix rate, and how passes are timed against each other."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu", "pyarrow", "duckdb")
RATE_SIZE = 2048
"""Side of the square matrices whose product measures the matrix rate (8192 on an accelerator)."""


def describe(device: str = "cpu") -> dict[str, str]:
    """Processor, cores, threads, memory, load and library versions, as shown above every table."""
    found = {"processor": _processor(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    if device != "cpu":
        found["accelerator"] = torch.cuda.get_device_name()
    load = Path("/proc/loadavg")
    if load.exists():
        found["load average at the start"] = load.read_text().split()[0]
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Model name, core count and widest vector extension, where the system tells."""
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vectors = next((v for v in ("avx512f", "avx2", "asimd") if v in fields.get("Flags", "").split()), "")
    return f"{fields.get('Model name', platform.machine())}, {fields.get('CPU(s)', '?')} cores, {vectors}".strip(", ")


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall seconds of one call, work on an accelerator included."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(
    passes: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each pass in `repeats` rounds of all of them, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            took = seconds(run, device)
            if turn:
                times[name].append(took)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each pass."""
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_product(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], float]:
    """One square matrix product, and the operations in it: the machine's matrix rate, timed beside the passes."""
    n = RATE_SIZE if device == "cpu" else 4 * RATE_SIZE
    x = torch.randn(n, n, device=device, dtype=dtype)
    return (lambda: x @ x), 2.0 * n**3


def peak_bytes(device: str = "cpu") -> int:
    """Largest resident size of this process so far, or what torch held of the accelerator's memory at most.

    (ru_maxrss would count what the parent held at the fork.)
    """
    return memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def reset_peak(device: str = "cpu") -> None:
    """Start a new peak from what is held now, where the system can."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def memory(field: str) -> int:
    """A size from /proc/self/status in bytes, 0 where the system has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
