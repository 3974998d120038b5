"""A synthetic workspace with the schemas of a real one, small and quick to write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import corpus, storage
from msif_core.answer_tables import SCHEMAS

MAPS = [
    f"gpt_neox.layers.{layer}.{kind}"
    for layer in range(3)
    for kind in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
WORDS = ["the", "moon", "orbit", "around", "body", "of", "water", "a", "disease", "cattle", "padding", "word"]
QUERIES = [
    ("q-000", "Define the word \"periselene\".", "Periapsis in orbit around the moon."),
    ("q-001", "What is <b>red water</b>?", "A disease of cattle."),
    ("q-002", "Say nothing.", ""),
]  # fmt: skip


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_corpus(root: Path, stage: str, n_documents: int, seed: int = 0) -> list[str]:
    """Write corpus/<stage> with one shard; returns the documents' ids."""
    rng = np.random.default_rng(seed)
    ids = [f"{stage[:2]}-{i:04d}" for i in range(n_documents)]
    tokens = [rng.integers(0, 99, rng.integers(4, 40)).astype(np.int32) for _ in ids]
    folder = root / "corpus" / stage
    _write(folder / "shard-00000.parquet", pa.table({
        "sequence_id": list(range(n_documents)),
        "document_id": ids,
        "window": [0] * n_documents,
        "input_ids": tokens,
        "labels": [[-100, *t[1:]] for t in tokens],
        "fingerprint": [storage.fingerprint(t.tolist()) for t in tokens],
    }, schema=corpus.SEQUENCES))  # fmt: skip
    _write(folder / "documents-00000.parquet", pa.table({
        "document_id": ids,
        "text": [" ".join(rng.choice(WORDS, len(t))) for t in tokens],
        "source": [("shakespeare", "wordnet", None)[i % 3] for i in range(n_documents)],
        "metadata": [json.dumps({"license": "WN", "year": 1900 + i} if i % 3 else {}) for i, _ in enumerate(ids)],
        "n_sequences": [1] * n_documents,
        "n_tokens": [len(t) for t in tokens],
        "shard": [0] * n_documents,
        "fingerprint": [storage.fingerprint(i) for i in ids],
    }, schema=corpus.DOCUMENTS))  # fmt: skip
    _write(
        folder / "quarantine-00000.parquet",
        pa.table({"document_id": ["bad-1"], "reason": ["the text is empty"]}, schema=corpus.QUARANTINE),
    )
    shard = {"sequences": "shard-00000.parquet", "documents": "documents-00000.parquet",
             "quarantine": "quarantine-00000.parquet"}  # fmt: skip
    shard |= {"n_sequences": n_documents, "n_documents": n_documents, "n_quarantined": 1}
    manifest = {"shards": [shard], "fingerprint": "c" * 16, "max_length": 128, "key": "k"}
    storage.write_json(folder / "manifest.json", manifest)
    return ids


def write_attribution(root: Path, run_id: str, documents: list[str], seed: int = 0) -> Path:
    """Write attributions/<run_id>: six proponents, two opponents for each query but the last."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[object, ...]]] = {name: [] for name in SCHEMAS}
    for query_id, prompt, completion in QUERIES:
        metadata = json.dumps({"source": "wordnet"})
        contrast = "A wild duck." if query_id == "q-001" else None
        asked = (prompt, completion, float(rng.uniform(5, 30)), metadata, query_id == "q-000", contrast, [])
        rows["queries.parquet"].append((run_id, query_id, *asked))
        for name in documents[10:50]:
            rows["samples.parquet"].append((run_id, query_id, name, float(rng.normal(0, 0.5))))
        if not completion:
            continue
        for i, name in enumerate(documents[:30]):
            values = (run_id, query_id, name, float(rng.normal(1, 1)), ("gradient", "bm25", "both")[i % 3])
            rows["candidates.parquet"].append(values)
        chosen = rng.choice(documents[:20], 8, replace=False)
        scores = np.concatenate([np.sort(rng.gamma(2, 2, 6))[::-1], [-1.5, -0.5]])
        for i, (name, score) in enumerate(zip(chosen, scores, strict=True)):
            side, rank = ("proponent", i + 1) if score > 0 else ("opponent", i - 5)
            found = ("gradient", "bm25", "both")[i % 3]
            values = (
                run_id,
                query_id,
                str(name),
                int(name[-4:]),
                rank,
                score,
                score,
                99.5,
                side,
                found,
                0 if i == 2 else i,
                39 if str(name) in documents[10:50] else 40,
            )
            rows["influences.parquet"].append(values)
            parts = rng.dirichlet(np.ones(len(MAPS))) * score
            rows["layers.parquet"] += [
                (run_id, query_id, str(name), m, float(p)) for m, p in zip(MAPS, parts, strict=True)
            ]
            noise = rng.normal(0, 1, 30)
            noise *= score / (noise.sum() or 1)
            for position, value in enumerate(noise):
                token = "<script>" if position == 5 else " " + str(rng.choice(WORDS))
                rows["tokens.parquet"].append((run_id, query_id, str(name), position, token, float(value), "document"))
            for side, words in (("query", completion), ("contrast", contrast or "")):
                for position, token in enumerate(words.split()):
                    part = score / 4 if side == "query" else -score / 8
                    values = (run_id, query_id, str(name), position, " " + token, part, side)
                    rows["tokens.parquet"].append(values)
    folder = root / "attributions" / run_id
    for name, schema in SCHEMAS.items():
        columns = list(zip(*rows[name], strict=True)) or [[] for _ in schema]
        _write(folder / name, pa.table(dict(zip(schema.names, map(list, columns), strict=True)), schema=schema))
    filters = {"kind": "damped", "damping": 0.1, "relative": True}
    stages = [{"name": name, "model": f"models/{name}", "filter": filters} for name in ("pretrain", "finetune")]
    storage.write_json(folder / "manifest.json", {
        "run_id": run_id, "created": f"2026-01-0{seed + 1}T00:00:00+00:00", "seconds": 2.5,
        "generation": "g2",
        "recall": RECALL, "factors": {"pretrain": "f1", "finetune": "f2"},
        "levels": {name: [[0.01, 0.03], [0.2]] for name in MAPS},
        "settings": {"attribute_to": "pretrain", "stages": stages}, "n_queries": 3, "n_rescored": 60,
    })  # fmt: skip
    return folder


RECALL = {
    "queries": 20, "sequences": 1000, "bytes_per_sequence": 4096, "answer_share": 0.02, "standing_out": 19,
    "estimate": {"correlation": [0.8, 0.9, 0.95], "slope": [0.7, 1.0, 1.25], "noise": [0.1, 0.2, 0.5]},
    "found": [
        {"source": source, "share": share, "taken": 1000 * share, "recall": recall, "recall_error": 0.01,
         "weight": 0.75, "weight_error": 0.02, "best": 1.0, "best_error": 0.0}
        for share, recalls in ((0.01, (0.8, 0.5, 0.85)), (0.02, (0.9, 0.6, 0.95)))
        for source, recall in zip(("gradient", "bm25", "both"), recalls, strict=True)
    ],
    "verdict": "better", "told": "The gradient index finds more than chance.",
}  # fmt: skip


def write_workspace(root: Path) -> Path:
    """Write a whole workspace: two stages, factors, two generations, one attribution."""
    documents = write_corpus(root, "pretrain", 60)
    write_corpus(root, "finetune", 12, seed=1)
    for i, stage in ((1, "pretrain"), (2, "finetune")):
        storage.write_json(root / "pins" / f"{stage}.json", {"recipe": "r", "factors": f"f{i}"})
        manifest = {"version": 1, "maps": {name: {} for name in MAPS}, "mean_targets": 20.5, "sequences": 60}
        storage.write_json(root / "factors" / f"f{i}" / "factors.json", manifest)
    for i, recall in ((1, {}), (2, RECALL)):
        storage.write_json(root / "generations" / f"g{i}" / "manifest.json", {
            "generation": f"g{i}", "content": f"content{i}", "created": f"2026-01-0{i}T00:00:00+00:00",
            "parent": "g1" if i == 2 else None,
            "corpus": "c" * 16, "factors": {"pretrain": "f1", "finetune": "f2"}, "n_sequences": 60,
            "index_bytes": 12345, "seconds": 3.5, "recall": recall, "settings": {"attribute_to": "pretrain"},
        })  # fmt: skip
    storage.write_text(root / "generations" / "CURRENT", "g2\n")
    write_attribution(root, "20260101-000000-aaaaaa", documents)
    return root
