"""Each pass beside its flop floor and beside a bare forward plus activation backward of the same batches.

The counts are the plan's (msif_core/work.py), without attention's products. The floor is a count over the machine's
matrix rate, which is measured in the same rounds.

    python -m benchmarks.floor [--quick] [--out runs/bench] [--device cuda] [--dtype bfloat16] [--tokens 512]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import inputs, machine, tables
from msif_core import models, scoring, tracking
from msif_core.batching import Sequences, batches
from msif_core.curvature import fit
from msif_core.curvature.filters import Damped
from msif_core.directions import Directions
from msif_core.forward import forward
from msif_core.losses import target_loss
from msif_core.sketch import Sketcher
from msif_core.work import Work

REPEATS = 5
BATCH_TOKENS = 2048
BUDGET = 16.0
"""Gigabytes of statistics held together: every map in one pass."""
SKETCH: Any = SimpleNamespace(dimensions=32_000, whitening="eigen", seed=0)
SHARE = 0.25
"""Of the eigendirections, what sketches keep by default."""
BARE, RATE, ONCE = "bare forward + backward", "matrix product", "once: "
Pass = tuple[Callable[[Sequences], object], float]
"""What to call with sequences, and the operations that a sequence needs at least."""


class Passes:
    """Every pass at one size."""

    def __init__(self, size: inputs.Size, device: str, dtype: torch.dtype, batch_tokens: int, curvature: Any) -> None:
        self.size = size
        model = models.freeze(size.model(device, dtype), tf32=tf32())
        maps = tracking.tracked_maps(model, curvature)
        self.sequences = size.data()
        factors: Any = inputs.random_factors(maps, device)
        kept = {m.name: Directions.even(m, SHARE) for m in maps}
        whole, part = (Sketcher(maps, factors, Damped(0.1), SKETCH, "causal_lm", of) for of in (None, kept))
        queries = {m.name: torch.randn(size.queries, *m.shape, device=device) for m in maps}
        one = {name: v[:1] for name, v in queries.items()}
        common: dict[str, Any] = {"task": "causal_lm", "seed": 0, "batch_tokens": batch_tokens}

        def bare(sequences: Sequences) -> None:
            with model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()):
                for batch in batches(sequences, batch_tokens, device):
                    with torch.enable_grad():
                        target_loss("causal_lm")(forward(model, batch), batch).backward()

        def score(filtered: dict[str, torch.Tensor]) -> Callable[[Sequences], object]:
            return lambda sequences: scoring.score_sequences(
                model, maps, dict(filtered), sequences, batch_tokens, task="causal_lm"
            )

        work = Work(model, maps, size.tokens)
        bare_flops, formed = work.linear(), work.linear() + work.gradients()
        self.tracked, rotated = work.tracked, formed + work.rotation()
        self.passes: dict[str, Pass] = {
            BARE: (bare, bare_flops),
            "covariances": (
                lambda data: fit.covariance_sums(model, maps, data, **common), bare_flops + work.covariance(),
            ),
            "eigenvalues": (lambda data: fit.eigenvalue_sums(model, maps, factors, data, **common), rotated),
            "sketch": (
                lambda data: part.documents(model, data, batch_tokens, BUDGET),
                bare_flops + work.rotation(SHARE) + work.gradients(SHARE**2) + 4.0 * SHARE**2 * work.tracked,
            ),
            "sketch of all directions": (
                lambda data: whole.documents(model, data, batch_tokens, BUDGET), rotated + 4.0 * work.tracked,
            ),
            "exact scores, 1 query": (score(one), formed),
            f"exact scores, {size.queries} queries": (score(queries), formed + 2.0 * work.tracked * size.queries),
        }  # fmt: skip

    def call(self, name: str, sequences: Sequences | None = None) -> Callable[[], object]:
        """A pass over `sequences`, all of them by default."""
        run, data = self.passes[name][0], self.sequences if sequences is None else sequences
        return lambda: run(data)


def tf32() -> bool:
    """Whether this run multiplies in TF32."""
    return torch.get_float32_matmul_precision() == "high"


def measure(label: str, passes: Passes, repeats: int, device: str, dtype: torch.dtype) -> tables.Table:
    """Time the passes and the matrix product in turns: one row a pass."""
    product, operations = machine.matrix_product(device, dtype)
    timed: dict[str, Callable[[], object]] = {RATE: lambda: [product() for _ in range(3)]}
    timed |= {name: passes.call(name) for name in passes.passes}
    timed |= {ONCE + name: passes.call(name, passes.sequences.take([])) for name in passes.passes}
    times = machine.interleaved(timed, repeats, device)
    medians = machine.medians(times)
    rate, best = 3 * operations / medians[RATE], 3 * operations / min(times[RATE])
    took = {name: medians[name] - medians[ONCE + name] for name in passes.passes}
    rows: list[list[tables.Cell]] = []
    for name, (_, flops) in passes.passes.items():
        total = flops * passes.size.sequences
        achieved = total / took[name]
        ratios = [rate / achieved, took[name] / took[BARE], achieved / 1e12, achieved / rate]
        rows.append([name, took[name], medians[ONCE + name], total / rate, *ratios])
    size = passes.size
    notes = [
        f"{size.sequences} sequences of {size.tokens} tokens, {str(dtype).removeprefix('torch.')}; matrix rate "
        f"{rate / 1e12:.3g} TFLOP/s (at best {best / 1e12:.3g}); medians of {repeats} interleaved rounds. "
        "`once` is what the pass takes without a sequence (a sketch's weights are formed): it is paid "
        "once a part or shard, not counted in `seconds`. Statistics are "
        f"{'TF32' if tf32() else 'float32'} products, whatever the model's dtype."
    ]
    columns = ["pass", "seconds", "once, s", "floor, s", "times the floor", "times the bare pass", "TFLOP/s",
               "share of the matrix rate"]  # fmt: skip
    return tables.Table(f"Floor: {passes.tracked / 1e6:.1f} M tracked parameters ({label})", columns, rows, notes)


def blocks(size: inputs.Size, device: str, dtype: torch.dtype, batch_tokens: int) -> tables.Table:
    """The passes with curvature in blocks, timed in turns, as multiples of their time with whole maps."""
    variants = {
        "whole maps": inputs.curvature("none"),
        "by projection (the default)": inputs.curvature(),
        "by head": inputs.curvature("head"),
        "by projection, block_size of the hidden width": inputs.curvature(block_size=size.hidden),
        "by head, block_size of half the hidden width": inputs.curvature("head", size.hidden // 2),
    }
    names = ("covariances", "eigenvalues", "sketch")
    passes = {v: Passes(size, device, dtype, batch_tokens, settings) for v, settings in variants.items()}
    timed = {f"{v}/{name}": passes[v].call(name) for v in variants for name in names}
    took = machine.medians(machine.interleaved(timed, REPEATS, device))
    whole = next(iter(variants))
    rows: list[list[tables.Cell]] = []
    for v in variants:
        times = [took[f"{v}/{name}"] / took[f"{whole}/{name}"] for name in names]
        counts = [passes[v].passes[name][1] / passes[whole].passes[name][1] for name in names]
        rows.append([v, *times, *counts])
    columns = ["curvature", *names, *(f"operations of {name}" for name in names)]
    note = "Relative to whole maps, what is paid once included."
    return tables.Table(f"Blocks of the curvature: width {size.hidden}", columns, rows, [note])


def profile(passes: Passes, device: str) -> tables.Table:
    """Where the time of the heaviest passes goes: share of each operator's own time."""
    activity = torch.profiler.ProfilerActivity
    rows: list[list[tables.Cell]] = []
    for name in ("eigenvalues", "sketch", f"exact scores, {passes.size.queries} queries"):
        with torch.profiler.profile(activities=[activity.CPU if device == "cpu" else activity.CUDA]) as run:
            passes.call(name)()
        key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        events = sorted(run.key_averages(), key=lambda e: -getattr(e, key))
        total = sum(getattr(e, key) for e in events)
        shares = [f"{kernel(e.key)} {getattr(e, key) / total:.0%}" for e in events[:6]]
        rows.append([name, ", ".join(shares)])
    return tables.Table(f"Profile: {passes.tracked / 1e6:.1f} M tracked parameters", ["pass", "operators"], rows)


def kernel(name: str) -> str:
    """An operator's or a GPU kernel's name without namespaces and template arguments."""
    return re.sub(r"^void |\w+::", "", name).split("<")[0].split("(")[0][:60]


def main() -> None:
    """Measure every size, save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="products in TF32, where the device has it")
    parser.add_argument("--size", choices=inputs.SIZES, help="one size alone, without the table of blocks")
    parser.add_argument("--tokens", type=int, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, help="sequences at each size")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    options = parser.parse_args()
    changes = {key: value for key in ("tokens", "sequences") if (value := getattr(options, key))}
    dtype = getattr(torch, options.dtype)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    small, sizes = inputs.SIZES["3 M"], {label: inputs.SIZES[label] for label in ("10 M", "100 M")}
    if options.quick:
        (small,) = (sizes := inputs.QUICK).values()
    found = []
    if options.size:
        sizes = {options.size: inputs.SIZES[options.size]}
    else:
        blocked = replace(small, **{"sequences": 16, **changes}, queries=1)
        found.append(blocks(blocked, options.device, dtype, options.batch_tokens))
    for label, size in sizes.items():
        passes = Passes(replace(size, **changes), options.device, dtype, options.batch_tokens, inputs.curvature())
        found += [measure(label, passes, REPEATS, options.device, dtype), profile(passes, options.device)]
        tables.save(options.out / "floor.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
