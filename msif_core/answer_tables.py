"""The stored answer's tables: one Parquet file of an attribution's folder each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import storage

INFLUENCES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()),
    ("sequence_id", pa.int64()), ("rank", pa.int32()), ("score", pa.float32()), ("best_score", pa.float32()),
    ("percentile", pa.float32()), ("side", pa.string()), ("candidate_source", pa.string()),
    ("duplicate_group", pa.int32()), ("n_random", pa.int32()),
])  # fmt: skip
LAYERS = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("map", pa.string()),
    ("score", pa.float32()),
])  # fmt: skip
TOKENS = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("position", pa.int32()),
    ("token", pa.string()), ("score", pa.float32()), ("side", pa.string()),
])  # fmt: skip
SAMPLES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float32()),
])  # fmt: skip
CANDIDATES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float32()),
    ("candidate_source", pa.string()),
])  # fmt: skip
QUERIES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("prompt", pa.string()), ("completion", pa.string()),
    ("loss", pa.float32()), ("metadata", pa.string()), ("generated", pa.bool_()), ("contrast", pa.string()),
    ("members", pa.list_(pa.string())),
])  # fmt: skip
SCHEMAS = {
    "influences.parquet": INFLUENCES, "layers.parquet": LAYERS, "tokens.parquet": TOKENS,
    "samples.parquet": SAMPLES, "queries.parquet": QUERIES, "candidates.parquet": CANDIDATES,
}  # fmt: skip


class Tables:
    """Rows of one run's tables, gathered query by query and written together."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMAS}

    def add(self, name: str, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows of `name`.parquet, each without its run_id."""
        self._rows[f"{name}.parquet"] += [(self.run_id, *row) for row in rows]

    def write(self, folder: Path) -> None:
        """Write every table below `folder`, each whole or not at all."""
        for name, schema in SCHEMAS.items():
            columns = list(zip(*self._rows[name], strict=True)) or [()] * len(schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            with storage.atomic_path(folder / name) as temporary:
                pq.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary, compression="zstd")
