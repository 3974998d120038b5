"""Each pass beside its flop floor: `python -m benchmarks.floor`.

Prints, from one run, the machine's matrix rate, a bare forward plus activation backward of the same batches,
and each pass: measured seconds, counted flops over the matrix rate, and the ratio (medians of interleaved
repeats). The counts are those of the method: forward and activation backward 4 N T a sequence (the head
included), covariances 2 T (d_in^2 + d_out^2) / 2 as symmetric updates are counted full here, rotations the
cheaper of tokens and gradients, outer products 2 T d_in d_out, scores 2 d_in d_out a query.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from msif_core import models, scoring
from msif_core.batching import Sequences, batches, sequence_fingerprint
from msif_core.capture import capture
from msif_core.config import CurvatureSettings, SketchSettings
from msif_core.curvature import fit
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped
from msif_core.losses import target_loss
from msif_core.sketch import Sketcher

HIDDEN, LAYERS, VOCABULARY, TOKENS, COUNT, REPEATS, QUERIES = 256, 4, 2048, 64, 128, 5, 64
BATCH_TOKENS = 2048


def matrix_rate() -> float:
    """Best float32 matrix product rate of this machine, flops a second."""
    x = torch.randn(2048, 2048)
    best = min(seconds(lambda: x @ x) for _ in range(8))
    return 2 * 2048**3 / best


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    config = transformers.GPTNeoXConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=4 * HIDDEN,
        vocab_size=VOCABULARY, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = models.freeze(transformers.GPTNeoXForCausalLM(config))
    maps = models.tracked_maps(model, CurvatureSettings())
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCABULARY, TOKENS).astype(np.int32) for _ in range(COUNT)]
    sequences = Sequences(
        ids, ids, [sequence_fingerprint(row, row) for row in ids], [str(i) for i in range(COUNT)], np.arange(COUNT)
    )
    factors = {
        m.name: MapFactors(
            torch.linalg.qr(torch.randn(m.d_in, m.d_in))[0],
            torch.linalg.qr(torch.randn(m.groups, m.shape[1], m.shape[1]))[0],
            torch.rand(m.shape),
        )
        for m in maps
    }
    sketcher = Sketcher(maps, factors, Damped(0.1), SketchSettings(), "causal_lm")
    V = {m.name: torch.randn(QUERIES, *m.shape) for m in maps}
    one = {name: v[:1] for name, v in V.items()}
    task = {"task": "causal_lm"}

    tracked = sum(m.size for m in maps)
    model_flops = 4 * (tracked + HIDDEN * VOCABULARY) * TOKENS
    squares = sum(m.d_in**2 + m.groups * m.shape[1] ** 2 for m in maps)
    rotation = sum(
        2 * min(TOKENS * (m.d_in**2 + m.groups * m.shape[1] ** 2), m.size * (m.d_in + m.shape[1])) for m in maps
    )
    outer = 2 * TOKENS * tracked
    passes: dict[str, tuple[Callable[[], object], float]] = {
        "bare forward + backward": (
            lambda: [capture(model, [], b, target_loss("causal_lm"), print) for b in batches(sequences, BATCH_TOKENS)],
            model_flops,
        ),
        "covariances": (
            lambda: fit.covariance_sums(model, maps, sequences, seed=0, batch_tokens=BATCH_TOKENS, **task),
            model_flops + 2 * TOKENS * squares,
        ),
        "eigenvalues": (
            lambda: fit.eigenvalue_sums(model, maps, factors, sequences, seed=0, batch_tokens=BATCH_TOKENS, **task),
            model_flops + rotation + outer,
        ),
        "sketch": (
            lambda: sketcher.documents(model, sequences, BATCH_TOKENS, 8.0),
            model_flops + rotation + outer + 4 * tracked,
        ),
        "exact scores, 1 query": (
            lambda: scoring.score_sequences(model, maps, one, sequences, BATCH_TOKENS, **task),
            model_flops + outer,
        ),
        f"exact scores, {QUERIES} queries": (
            lambda: scoring.score_sequences(model, maps, V, sequences, BATCH_TOKENS, **task),
            model_flops + outer + 2 * tracked * QUERIES,
        ),
    }
    rate = matrix_rate()
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(REPEATS + 1):
        for name, (run, _flops) in passes.items():
            times[name].append(seconds(run))
    table = Table("pass", "seconds", "floor", "ratio to floor", "ratio to bare", title=f"{tracked / 1e6:.2f} M tracked")
    bare = statistics.median(times["bare forward + backward"][1:])
    for name, (_run, flops) in passes.items():
        measured, floor = statistics.median(times[name][1:]), flops * COUNT / rate
        table.add_row(name, f"{measured:.3f}", f"{floor:.3f}", f"{measured / floor:.2f}", f"{measured / bare:.2f}")
    Console().print(f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s float32, {COUNT} x {TOKENS} tokens")
    Console().print(table)


if __name__ == "__main__":
    main()
