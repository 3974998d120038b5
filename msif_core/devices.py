"""How fast a device multiplies and diagonalises matrices: measured here, or from its data sheet."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from msif_core.capture import precision
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.work import EIGH_FLOPS

UTILISATION = 0.4
"""Share of the peak rate that is assumed of a device that is not measured."""

GPU_EIGENBASES = {4096: EIGH_FLOPS * 4096**3 / 5e12}
"""Seconds of a float64 eigendecomposition on an H100, by its width (wider ones take a third less than its cube)."""

WIDEST_TRIED, WIDTHS_TRIED = {"cpu": 1536, "cuda": 4096}, 3
"""Width of the largest eigendecomposition that is measured, a second or so; and of how many widths one is."""

OUTER_SHARE = 0.5
"""Rate of a per-sequence outer product, as a share of a square product's (docs/performance.md)."""

MODEL_SHARE = 0.75
"""Rate of a model's forward and backward, as a share of a square product's (docs/performance.md)."""

PEAKS = {"a100": (312e12, 156e12, 19.5e12), "h100": (989e12, 494e12, 67e12), "h200": (989e12, 494e12, 67e12)}
"""Operations a second of a matrix product in 16 bits, in TF32 and in float32 (data sheets, no sparsity)."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of the model, of the statistics and of queries' filters in float32.

    `eigenbases` are seconds of one float64 eigendecomposition, by the width of its matrix.
    """

    device: str
    model: float
    statistics: float
    filters: float
    eigenbases: Mapping[int, float]

    @property
    def accelerator(self) -> bool:
        """Whether steps run in an accelerator's own memory."""
        return not self.device.startswith("cpu")

    def seconds(self, model: float, products: float, outer: float = 0.0, filters: float = 0.0) -> float:
        """Of operations of the model, of matrix products, of per-sequence outer products, and of filters."""
        return model / self.model + (products + outer / OUTER_SHARE) / self.statistics + filters / self.filters

    def diagonalising(self, widths: Mapping[int, int]) -> float:
        """Seconds of so many eigendecompositions of each width, by the next width whose time is known: as its cube."""
        known = sorted(self.eigenbases)
        found = 0.0
        for width, count in widths.items():
            near = next((n for n in known if n >= width), known[-1])
            found += count * self.eigenbases[near] * (width / near) ** 3
        return found


def rates(config: Config, device: str, widths: Mapping[int, int]) -> Rates:
    """Of a device by name, or measured on this machine; `widths` are those of the eigenbases, and how many."""
    if device == "measure":
        name = config.compute.device
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        filters, eigenbases = _measure(name, torch.float32), _measure_eigenbases(name, widths)
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
    return 2.0 * n**3 / min(_times(lambda: (x @ x)[0, 0].item(), 5))


def _measure_eigenbases(device: str, widths: Mapping[int, int]) -> dict[int, float]:
    """Seconds of one eigendecomposition, of the widths that take the most together.

    An operation takes longer in a narrow matrix, so that each width has its own rate.
    """
    most = WIDEST_TRIED["cuda" if device.startswith("cuda") else "cpu"]
    costs: Counter[int] = Counter()
    for width, count in widths.items():
        costs[min(width, most)] += count * width**3
    found = {}
    for n, _ in costs.most_common(WIDTHS_TRIED):
        found[n] = statistics.median(_times(partial(_diagonalise, n, device), 3))
    return found


def _diagonalise(n: int, device: str) -> None:
    x = torch.randn(n, n, dtype=torch.float64).to(device)
    torch.linalg.eigh(x + x.mT).eigenvalues[0].item()


def _times(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call but the first, in which the libraries load."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times[1:]
