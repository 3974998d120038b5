"""A small workspace of two trained stages and a published index, built once from the shipped texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msif_core.config import Config
from msif_core.demo import train_stages
from msif_core.pipeline import Pipeline
from msif_core.training import Architecture

DATA = Path(__file__).parent.parent / "data"
DIMENSIONS = 20_480
"""2,560 bytes a sequence at one bit, the size that the query-time target is stated for."""


def build(folder: Path, quick: bool, candidates: int = 500) -> Pipeline:
    """Train (every third document; every twentieth if quick), fit, index and publish; what stands is kept."""
    step = 20 if quick else 3
    stages: list[dict[str, Any]] = []
    for name, recipe in (
        ("pretrain", {"learning_rate": 8e-3, "batch_size": 32}),
        ("finetune", {"learning_rate": 1e-3, "batch_size": 16, "epochs": 2}),
    ):
        documents = folder / f"{name}.jsonl"
        if not documents.exists():
            lines = [line for path in sorted((DATA / name).glob("*.jsonl")) for line in path.open(encoding="utf-8")]
            folder.mkdir(parents=True, exist_ok=True)
            documents.write_text("".join(lines[::step]), encoding="utf-8")
        stages.append(
            {"name": name, "model": str(folder / "models" / name), "documents": str(documents), "training": recipe}
        )
    config = Config.model_validate({
        "workspace": folder, "stages": stages, "queries": str(DATA / "queries.jsonl"),
        "corpus": {"max_length": 128, "shard_sequences": 64 if quick else 256}, "curvature": {"max_sequences": 1024},
        "sketch": {"dimensions": DIMENSIONS}, "index": {"kind": "rabitq"},
        "retrieval": {"rerank_min": candidates, "rerank_max": candidates, "candidates": "gradient"},
    })  # fmt: skip
    train_stages(config, architecture=Architecture(hidden=48 if quick else 96, layers=2 if quick else 4, heads=4))
    pipeline = Pipeline(config)
    pipeline.run()
    return pipeline
