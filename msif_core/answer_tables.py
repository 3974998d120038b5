"""The stored answer's tables: one Parquet file of an attribution's folder each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
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


HELD_ROWS = 50_000
"""Rows of a table that are held before they are written: a thousand queries have millions of tokens."""


class Tables(AbstractContextManager["Tables"]):
    """Writes one run's tables as their rows come; the files appear, all whole, when the context ends well."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self._stack = ExitStack()
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._held: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMAS}

    def __enter__(self) -> Tables:
        for name, schema in SCHEMAS.items():
            path = self._stack.enter_context(storage.atomic_path(self.folder / name))
            self._writers[name] = self._stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for name in SCHEMAS:
                self._write(name)
        self._stack.__exit__(kind, error, trace)
        if error is not None:
            with suppress(OSError):  # it holds what somebody else put there
                self.folder.rmdir()

    def add(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows of `table`.parquet, each without its run_id."""
        name = f"{table}.parquet"
        self._held[name] += [(self.run_id, *row) for row in rows]
        if len(self._held[name]) >= HELD_ROWS:
            self._write(name)

    def _write(self, name: str) -> None:
        if rows := self._held[name]:
            columns = zip(zip(*rows, strict=True), SCHEMAS[name], strict=True)
            arrays = [pa.array(column, field.type) for column, field in columns]
            self._writers[name].write_batch(pa.record_batch(arrays, schema=SCHEMAS[name]))
            self._held[name] = []
