"""A project of two trained one-layer stages over forty-eight short documents: what the command line is tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msif_core import catalog, storage
from msif_core.config import Config
from msif_core.demo import train_stages
from msif_core.pipeline import Pipeline
from msif_core.training import Architecture

WORDS = ["kite", "oak", "loom", "brook", "anvil", "heron", "fern", "gull", "plum", "reed", "sage", "thorn"]
ARCHITECTURE = Architecture(hidden=16, layers=1, heads=2, positions=24)


def write_records(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def documents() -> list[dict[str, object]]:
    pairs = [(a, b) for a in WORDS for b in WORDS[:4]]
    return [{"id": f"d{i:02d}", "text": f"{a}: a thing called {a}, made of {b}."} for i, (a, b) in enumerate(pairs)]


def write_project(folder: Path) -> Path:
    """Train both stages into `folder` and return the configuration's path."""
    write_records(folder / "documents.jsonl", documents())
    ask = [{"id": f"q-{word}", "prompt": f"What is {word}?\n", "completion": f"A {word}."} for word in WORDS]
    write_records(folder / "lessons.jsonl", [dict(row) for row in ask[:8]])
    asked = [{**row, "gold_doc_ids": [f"d{4 * i:02d}"]} for i, row in enumerate(ask) if i >= 8]
    queries = write_records(folder / "queries.jsonl", asked)
    recipe = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8}
    stages = [
        {"name": name, "model": str(folder / name), "documents": str(folder / texts), "training": recipe}
        for name, texts in (("pretrain", "documents.jsonl"), ("finetune", "lessons.jsonl"))
    ]
    path = folder / "config.yaml"
    settings = {
        "workspace": str(folder / "workspace"), "queries": queries, "stages": stages,
        "corpus": {"max_length": 24, "shard_sequences": 24}, "sketch": {"dimensions": 512},
        "retrieval": {"top_k": 5, "rerank_min": 10, "random_sample": 8}, "compute": {"workers": 2},
    }  # fmt: skip
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    train_stages(Config.load(path), architecture=ARCHITECTURE, vocabulary=300)
    return path


def change(config: Path, **sections: dict[str, Any]) -> Pipeline:
    """The configuration with some settings changed."""
    settings = json.loads(config.read_text())
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    config.write_text(json.dumps(settings))
    return Pipeline.from_config(config)


def rewrite(config: Path, count: int = 48, **texts: str) -> None:
    """The first `count` documents, with other texts for those named."""
    rows = [{**row, "text": texts.pop(str(row["id"]), row["text"])} for row in documents()[:count]]
    write_records(config.parent / "documents.jsonl", rows + [{"id": k, "text": v} for k, v in texts.items()])


def manifest(folder: Path) -> dict[str, Any]:
    return dict(storage.read_json(folder / "manifest.json"))


def asked(config: Path) -> list[dict[str, Any]]:
    path = Path(json.loads(config.read_text())["queries"])
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(pipeline: Pipeline, statement: str, name: str) -> list[Any]:
    """One column of what SQL over the workspace answers."""
    return list(catalog.query(pipeline.workspace.root, statement)[name].to_pylist())
