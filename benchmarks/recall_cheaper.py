"""What cheaper curvature and arithmetic do to rankings: `python -m benchmarks.recall_cheaper CONFIG [NAME ...]`.

After `msif run` or `msif demo`. The stages' checkpoints are fitted and indexed again with every setting (or those
named), in a workspace of their own: how much of its own exact top ten each index finds, and how close its exact scores
are to the configuration's own. TF32 is emulated where the machine has none.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import tables
from benchmarks.emulation import TF32
from msif_core.config import Config
from msif_core.evaluation.recall import recall_at_k
from msif_core.pipeline import Pipeline

WORKSPACE = Path("runs/recall-cheaper")
SHARES = (0.005, 0.01, 0.02, 0.05)


def settings(hidden: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Changes by name: blocks from the largest down, then arithmetic."""
    return {
        "query-key-value whole": {"curvature": {"qkv_split": "none"}},
        "by head": {"curvature": {"qkv_split": "head"}},
        "block_size of the hidden width": {"curvature": {"block_size": hidden}},
        "by head, block_size of half of it": {"curvature": {"qkv_split": "head", "block_size": hidden // 2}},
        "TF32": {"compute": {"tf32": True}},
        "bfloat16 model": {"compute": {"dtype": "bfloat16"}},
        "bfloat16 model, TF32": {"compute": {"dtype": "bfloat16", "tf32": True}},
    }


def built(config: Config, changes: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """The measured recall with changed settings, and the held-out queries' exact scores [Q, N]."""
    updated = {part: getattr(config, part).model_copy(update=values) for part, values in changes.items()}
    pipeline = Pipeline(config.model_copy(update={"workspace": WORKSPACE, **updated}))
    emulated = config.compute.device == "cpu" or not torch.cuda.is_available()
    with TF32() if emulated and pipeline.config.compute.tf32 else nullcontext():
        pipeline.run()
    scores = [np.load(pipeline.exact_shard(shard))[0] for shard in pipeline.recall_shards()]
    return pipeline.measure_recall(), np.concatenate(scores, axis=1)


def row(name: str, recall: dict[str, Any], exact: np.ndarray, reference: np.ndarray) -> list[tables.Cell]:
    """Recall by share, how much of the reference's exact top ten is in that of `exact`, and their mean correlation."""
    best = np.argsort(-exact, axis=1, kind="stable")[:, :10]
    kept = recall_at_k(reference, np.arange(reference.shape[1]), best, 10)
    correlation = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(reference, exact, strict=True)])
    return [name, *(gradient_row(recall, share)["recall"] for share in SHARES), float(kept), float(correlation)]


def gradient_row(recall: dict[str, Any], share: float) -> dict[str, Any]:
    """What the gradient index finds at the share that is nearest to `share`."""
    rows = [row for row in recall["found"] if row["source"] == "gradient"]
    return min(rows, key=lambda row: abs(float(row["share"]) - share))


def main() -> None:
    """Fit, index and measure every setting; print the table."""
    config = Config.load(sys.argv[1])
    tried = settings(Pipeline(config).model(config.stages[0].name).config.hidden_size)
    recall, reference = built(config, {})
    rows = [row("as configured", recall, reference, reference)]
    for name in sys.argv[2:] or tried:
        rows.append(row(name, *built(config, tried[name]), reference))
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ["", *(f"recall@10 of {share:.1%}" for share in SHARES), "exact top ten kept", "correlation"]
    note = (
        f"{recall['queries']} held-out queries, {recall['sequences']:,} sequences of "
        f"{recall['bytes_per_sequence']:.0f} bytes. Top ten kept and correlation (a mean over queries) are of exact "
        "scores, beside those as configured."
    )
    print(tables.Table("Recall with cheaper curvature and arithmetic", columns, rows, [note]).markdown())


if __name__ == "__main__":
    main()
