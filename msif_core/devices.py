"""How fast a device multiplies matrices: measured here, or from its data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from msif_core.capture import precision
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.work import EIGH_FLOPS

UTILISATION = 0.4
"""Share of the peak rate that is assumed of a device that is not measured."""

GPU_EIGENBASES = 5e12
"""Operations a second of a float64 eigendecomposition on a GPU: an H100's, 4,096 wide (wider ones 7e12)."""

OUTER_SHARE = 0.5
"""Rate of a per-sequence outer product, as a share of a square product's (docs/performance.md)."""

MODEL_SHARE = 0.75
"""Rate of a model's forward and backward, as a share of a square product's (docs/performance.md)."""

PEAKS = {"a100": (312e12, 156e12, 19.5e12), "h100": (989e12, 494e12, 67e12), "h200": (989e12, 494e12, 67e12)}
"""Operations a second of a matrix product in 16 bits, in TF32 and in float32 (data sheets, no sparsity)."""


@dataclass(frozen=True)
class Rates:
    """Operations a second: of the model, of the statistics, of queries' filters in float32, of float64 eigenbases."""

    device: str
    model: float
    statistics: float
    filters: float
    eigenbases: float

    @property
    def accelerator(self) -> bool:
        """Whether steps run in an accelerator's own memory."""
        return not self.device.startswith("cpu")

    def seconds(self, model: float, products: float, outer: float = 0.0, filters: float = 0.0) -> float:
        """Of operations of the model, of matrix products, of per-sequence outer products, and of filters."""
        return model / self.model + (products + outer / OUTER_SHARE) / self.statistics + filters / self.filters


def rates(config: Config, device: str, widest: int) -> Rates:
    """Of a device by name, or measured on this machine; eigenbases are `widest` at most."""
    if device == "measure":
        name = config.compute.device
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        filters, eigenbases = _measure(name, torch.float32), _measure_eigh(name, widest)
        with precision(config.compute.tf32):
            model = MODEL_SHARE * _measure(name, getattr(torch, config.compute.dtype))
            return Rates(name, model, _measure(name, torch.float32), filters, eigenbases)
    if device not in PEAKS:
        raise InputError(f"device {device!r} is not known: measure, {', '.join(sorted(PEAKS))}")
    half, tf32, whole = (UTILISATION * peak for peak in PEAKS[device])
    single = tf32 if config.compute.tf32 else whole
    model = half if config.compute.dtype in ("bfloat16", "float16") else single
    return Rates(f"{device} at {UTILISATION:.0%} of its peak", model, single, whole, GPU_EIGENBASES)


def _measure(device: str, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product."""
    n = 4096 if device.startswith("cuda") else 768
    x = torch.randn(n, n).to(device, dtype)
    return 2.0 * n**3 / _best(lambda: (x @ x)[0, 0].item())


def _measure_eigh(device: str, widest: int) -> float:
    n = min(widest, 4096 if device.startswith("cuda") else 1024)
    x = torch.randn(n, n, dtype=torch.float64).to(device)
    return EIGH_FLOPS * n**3 / _best(lambda: torch.linalg.eigh(x + x.mT).eigenvalues[0].item(), 2)


def _best(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
