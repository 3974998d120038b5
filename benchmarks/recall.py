"""Recall of retrieval against bytes per sequence: `python -m benchmarks.recall CONFIG`, after `msif run CONFIG`.

For each whitening and number of dimensions the corpus is sketched once and coded with several bits; the exact top
10 and 100 of the held-out queries are looked for among the best 0.5% to 5% of the sequences.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from msif_core import corpus, index
from msif_core.config import Config
from msif_core.evaluation.recall import recall_at_k
from msif_core.pipeline import Pipeline

WHITENINGS = ("eigen", "kronecker", "none")
DIMENSIONS = (2048, 8192, 32_000)
BITS = (1, 4)
SHARES = (0.005, 0.01, 0.02, 0.05)
KS = (10, 100)
console = Console(width=150)
Row = dict[Any, Any]


def measure(config: Config) -> list[Row]:
    """One row a whitening, number of dimensions and bits: bytes of a code, recall by (k, share)."""
    pipeline = Pipeline(config)
    queries = pipeline.held_out()
    assert queries is not None, "set `queries` in the configuration"
    shards = pipeline.recall_shards()
    exact = np.concatenate([np.load(pipeline.exact_shard(shard))[0] for shard in shards], axis=1)
    parts = [corpus.read_shard(pipeline.shards(pipeline.target)[shard]) for shard in shards]
    ids = np.concatenate([part.sequence_ids for part in parts])
    rows: list[Row] = []
    for whitening, dimensions in product(WHITENINGS, DIMENSIONS):
        sketch = config.sketch.model_copy(update={"whitening": whitening, "dimensions": dimensions})
        other = Pipeline(config.model_copy(update={"sketch": sketch}))
        phi = np.concatenate([other.document_sketches(part) for part in parts])
        psi = other.query_sketches(queries)
        for bits in BITS:
            found, size = search(config, phi, psi, ids, bits)
            recall = {
                (k, share): recall_at_k(exact, ids, found[:, : max(k, int(len(ids) * share))], k)
                for k, share in product(KS, SHARES)
            }
            rows.append({"whitening": whitening, "dimensions": dimensions, "bits": bits, "bytes": size, **recall})
            print(rows[-1], file=sys.stderr)
    console.print(f"{len(ids):,} sequences, {len(queries)} queries, {pipeline.sketcher().total:,} gradient entries")
    return rows


def search(config: Config, phi: np.ndarray, psi: np.ndarray, ids: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """Ids of the best 5% for each query by codes of that many bits a dimension, and the bytes of a code."""
    settings = config.index.model_copy(update={"bits": bits, "kind": "rabitq"})
    with TemporaryDirectory() as folder:
        trained, shard = Path(folder, "trained.faiss"), Path(folder, "shard.faiss")
        index.train(phi[:512], settings, len(phi), trained)
        index.build_shard(trained, phi, ids, shard)
        opened = index.Index([shard], settings)
        return opened.search(psi, int(len(ids) * SHARES[-1]) + 1)[1], opened.bytes_per_vector


def print_rows(rows: list[Row]) -> None:
    table = Table("whitening", "dimensions", "bits", "bytes", *(f"@{k} of {s:.1%}" for k, s in product(KS, SHARES)))
    for row in rows:
        cells = [f"{row[k, s]:.2f}" for k, s in product(KS, SHARES)]
        table.add_row(row["whitening"], f"{row['dimensions']:,}", str(row["bits"]), f"{row['bytes']:,.0f}", *cells)
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Recall@10 with 2% re-scored against bytes per sequence, one line a whitening and number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.4))
    for whitening, bits in product(WHITENINGS, BITS):
        line = [(row["bytes"], row[10, 0.02]) for row in rows if (row["whitening"], row["bits"]) == (whitening, bits)]
        axis.plot(*zip(*line, strict=True), "o-" if bits == 1 else "s--", label=f"{whitening}, {bits} bit")
    axis.set(xscale="log", xlabel="bytes per sequence", ylabel="recall@10, 2% re-scored", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    config = Config.load(sys.argv[1])
    rows = measure(config)
    print_rows(rows)
    path = config.workspace / "recall.png"
    plot(rows, path)
    console.print(f"Plot: {path}")


if __name__ == "__main__":
    main()
