"""Recall with curvature in blocks: `python -m benchmarks.recall_blocks CONFIG`, after `msif run` or `msif demo`.

The stages' checkpoints are fitted and indexed again with other blocks, in a workspace of their own: how much of its
own exact top ten each index finds, and how much of the exact top ten with whole maps the blocks' one keeps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from msif_core.config import Config
from msif_core.evaluation.recall import recall_at_k
from msif_core.pipeline import Pipeline

WORKSPACE = Path("runs/recall-blocks")
SHARES = ("0.005", "0.01", "0.02", "0.05")


def variants(hidden: int) -> dict[str, dict[str, Any]]:
    """Curvature settings by name; whole maps come first."""
    return {
        "whole maps": {"qkv_split": "none"},
        "by projection (the default)": {"qkv_split": "projection"},
        "by head": {"qkv_split": "head"},
        "by projection, block_size of the hidden width": {"qkv_split": "projection", "block_size": hidden},
        "by head, block_size of half of it": {"qkv_split": "head", "block_size": hidden // 2},
    }


def exact_scores(pipeline: Pipeline) -> np.ndarray:
    """The held-out queries' exact scores of the sequences that measure recall: [Q, N]."""
    return np.concatenate([np.load(pipeline.exact_shard(shard))[0] for shard in pipeline.recall_shards()], axis=1)


def main() -> None:
    """Fit, index and measure every variant; print the table."""
    config = Config.load(sys.argv[1])
    hidden = Pipeline(config).model(config.stages[0].name).config.hidden_size
    rows: list[list[tables.Cell]] = []
    exact: list[np.ndarray] = []
    for name, settings in variants(hidden).items():
        curvature = config.curvature.model_copy(update=settings)
        pipeline = Pipeline(config.model_copy(update={"workspace": WORKSPACE, "curvature": curvature}))
        pipeline.run()
        measured = pipeline.measure_recall()
        exact.append(exact_scores(pipeline))
        best = np.argsort(-exact[-1], axis=1, kind="stable")[:, :10]
        kept = recall_at_k(exact[0], np.arange(exact[0].shape[1]), best, 10)
        rows.append([name, *(measured["recall_at_10"][share] for share in SHARES), float(kept)])
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ["curvature", *(f"recall@10 of {float(share):.1%}" for share in SHARES), "top ten of whole maps kept"]
    note = (
        f"{measured['queries']} held-out queries, {measured['sequences']:,} sequences of "
        f"{measured['bytes_per_sequence']:.0f} bytes."
    )
    print(tables.Table("Recall with curvature in blocks", columns, rows, [note]).markdown())


if __name__ == "__main__":
    main()
