"""A stored attribution: ranked documents with exact scores, and what they are made of."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from msif_core import corpus, storage
from msif_core.answer_tables import SCHEMAS
from msif_core.errors import InputError

FloatArray = npt.NDArray[np.float32]

HEADINGS = ("query", "side", "rank", "score", "percentile", "document", "source", "text")
"""Columns of an attribution in a notebook."""

PAGE_QUERIES = 100
"""Queries on a page where none are named: about 10 MB, which a browser still opens at once."""

SIDES = ("query", "contrast", "member")
"""The sides of a query in tokens.parquet."""


@dataclass(frozen=True)
class Document:
    """What the corpus knows of a ranked document."""

    document_id: str
    text: str = ""
    source: str = ""
    metadata: str = "{}"
    n_tokens: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The metadata, parsed."""
        return dict(json.loads(self.metadata or "{}"))


@dataclass(frozen=True, repr=False)
class Heatmap:
    """Tokens and the part of the score that each carries, float32 [T]."""

    tokens: list[str]
    scores: FloatArray

    def __repr__(self) -> str:
        return f"Heatmap({len(self.tokens)} tokens, sum {self.scores.sum():+.4g})"

    def _repr_html_(self) -> str:
        strongest = float(np.abs(self.scores).max(initial=0)) or 1.0
        spans = []
        for token, score in zip(self.tokens, self.scores, strict=True):
            colour = "0,114,178" if score > 0 else "213,94,0"
            # Never colour alone: what speaks against is underlined with dots, as on the page.
            against = ";text-decoration:underline dotted" if score < -0.05 * strongest else ""
            style = f"background:rgba({colour},{0.6 * abs(score) / strongest:.2f}){against}"
            spans.append(f'<span style="{style}" title="{score:+.4g}">{html.escape(token)}</span>')
        return f'<div style="white-space:pre-wrap;line-height:1.6">{"".join(spans)}</div>'


def _read(folder: Path, name: str) -> pa.Table:
    """A table of the run; what an older msif did not write is null."""
    schema = SCHEMAS[f"{name}.parquet"]
    path = folder / f"{name}.parquet"
    table = pq.read_table(path) if path.exists() else schema.empty_table()
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table


@dataclass(frozen=True, repr=False)
class Attribution:
    """The answer to a set of queries, read from its folder.

    `score > 0`: more training on the document lowers the query's loss (a proponent); `score < 0`: an
    opponent. `table` has a row per query and ranked document.
    """

    folder: Path
    table: pa.Table
    queries: pa.Table
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"Attribution({self.run_id}: {len(self.query_ids)} queries, {self.table.num_rows} ranked documents)"

    @classmethod
    def open(cls, folder: str | Path) -> Attribution:
        """Read a run's folder, attributions/<run_id>.

        Raises:
            InputError: the folder holds no complete attribution.
        """
        folder = Path(folder).resolve()
        if not (folder / "manifest.json").exists():
            raise InputError(f"{folder}: no complete attribution there (its manifest.json is missing)")
        influences, queries = (_read(folder, name) for name in ("influences", "queries"))
        return cls(folder, influences, queries, storage.read_json(folder / "manifest.json"))

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return str(self.manifest["run_id"])

    @cached_property
    def query_ids(self) -> list[str]:
        """Queries in their order: the rows of `scores`."""
        return list(self.queries["query_id"].to_pylist())

    @cached_property
    def document_ids(self) -> list[str]:
        """Documents that some query shows, sorted: the columns of `scores`."""
        return sorted(set(self.table["document_id"].to_pylist()))

    @cached_property
    def scores(self) -> FloatArray:
        """Exact scores, float32 [n_queries, n_documents]; NaN where a query does not show the document."""
        scores = np.full((len(self.query_ids), len(self.document_ids)), np.nan, dtype=np.float32)
        row = {name: i for i, name in enumerate(self.query_ids)}
        column = {name: i for i, name in enumerate(self.document_ids)}
        for query, document, score in zip(
            *(self.table[name].to_pylist() for name in ("query_id", "document_id", "score")), strict=True
        ):
            scores[row[query], column[document]] = score
        return scores

    @cached_property
    def samples(self) -> pa.Table:
        """Exact scores of random documents, the ground of the percentiles."""
        return _read(self.folder, "samples")

    @cached_property
    def candidates(self) -> pa.Table:
        """Exact scores of all that the retrievers proposed, the ranked documents among them."""
        return _read(self.folder, "candidates")

    @cached_property
    def layers(self) -> pa.Table:
        """Contributions of linear maps."""
        return _read(self.folder, "layers")

    @cached_property
    def tokens(self) -> pa.Table:
        """Contributions of tokens."""
        return _read(self.folder, "tokens")

    @cached_property
    def documents(self) -> dict[str, Document]:
        """Texts and metadata of the ranked documents; without them where the corpus is gone."""
        stage = self.manifest.get("settings", {}).get("attribute_to", "")
        found = {name: Document(name) for name in self.document_ids}
        root = self.folder.parents[1]
        versions = (root / self.manifest.get("corpus", ""), root / "corpus" / stage / "manifest.json")
        version = next((path for path in versions if path.is_file()), None)  # the run's own, or the newest
        if version is not None:
            columns = ["text", "source", "metadata", "n_tokens"]
            for name, row in corpus.rows_of_documents(version, self.document_ids, columns).items():
                found[name] = Document(**{k: v for k, v in row.items() if v is not None})
        return found

    @cached_property
    def _heatmaps(self) -> dict[tuple[str, str, str], Heatmap]:
        names = ("query_id", "document_id", "side", "position", "token", "score")
        rows: dict[tuple[str, str, str], list[tuple[int, str, float]]] = defaultdict(list)
        for query, document, side, *rest in zip(*(self.tokens[n].to_pylist() for n in names), strict=True):
            rows[query, document, side].append(tuple(rest))
        maps = {}
        for key, cells in rows.items():
            cells.sort(key=lambda cell: cell[0])
            # A token that reads as nothing is part of the character that the one before it shows.
            starts = [i for i, (_, token, _) in enumerate(cells) if token or not i]
            scores = np.add.reduceat(np.asarray([score for _, _, score in cells], dtype=np.float32), starts)
            maps[key] = Heatmap([cells[i][1] for i in starts], scores)
        return maps

    def heatmap(self, query: str, document: str, side: str = "document") -> Heatmap:
        """Token scores of a document's strongest sequence, or of the query's side of the same score.

        The tokens of a character that takes several stand as one.

        Args:
            query: id of the query.
            document: id of a document that the query shows.
            side: "document"; "query", and "contrast" of a query with one: the tokens whose losses make the
                measurement; "member" of a set: the parts of its queries.

        Raises:
            InputError: the run did not store that pair.
        """
        if (query, document, side) not in self._heatmaps:
            raise InputError(f"run {self.run_id} stored no {side} tokens of query {query!r}, document {document!r}")
        return self._heatmaps[query, document, side]

    def has_heatmap(self, query: str, document: str, side: str = "document") -> bool:
        """Whether `heatmap` has that pair."""
        return (query, document, side) in self._heatmaps

    def to_html(self, path: str | Path, queries: Sequence[str] = ()) -> Path:
        """Write the attribution as one self-contained page; returns its path.

        Args:
            path: the file.
            queries: ids of the queries to show; without any, the first `PAGE_QUERIES`.

        Raises:
            InputError: the run has no query of such an id.
        """
        from msif_core.report import render

        path, known = Path(path), set(self.query_ids)
        if unknown := [name for name in queries if name not in known]:
            raise InputError(f"run {self.run_id} has no query {unknown[0]!r}")
        storage.write_text(path, render(self, queries or self.query_ids[:PAGE_QUERIES]))
        return path

    def _repr_html_(self) -> str:
        """The first documents of the first queries, for a notebook."""
        from msif_core.report.charts import number

        rows = self.table.filter(pc.field("rank") <= 3).slice(0, 30).to_pylist()
        cells = "".join(
            f"<tr><td>{html.escape(row['query_id'])}</td><td>{row['side']}</td><td>{row['rank']}</td>"
            f"<td>{number(row['score'])}</td><td>{row['percentile']:.1f}</td>"
            f"<td>{html.escape(row['document_id'])}</td>"
            f"<td>{html.escape(self.documents[row['document_id']].source)}</td>"
            f'<td style="text-align:left">{html.escape(self.documents[row["document_id"]].text[:120])}</td></tr>'
            for row in rows
        )
        head = "".join(f"<th>{name}</th>" for name in HEADINGS)
        count = f"{len(self.query_ids)} queries, {self.table.num_rows} ranked documents"
        return f"<p>Attribution {html.escape(self.run_id)}: {count}</p><table><tr>{head}</tr>{cells}</table>"
