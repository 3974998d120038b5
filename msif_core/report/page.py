"""From an attribution to the values that the page's template shows."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from msif_core.attribution import SIDES, Attribution, Document
from msif_core.report import charts, retrieval

TEMPLATES = Path(__file__).parent
SNIPPET = 180


@dataclass(frozen=True)
class Heat:
    """One side's parts of a score: tokens as coloured spans, and the strongest of them in words."""

    side: str
    spans: Markup
    strongest: list[tuple[str, float]]
    parts: list[tuple[str, float]]


@dataclass(frozen=True)
class RankedDocument:
    """One row of a query's ranking, its near-duplicates folded under it."""

    row: dict[str, Any]
    document: Document
    width: float
    tokens: Heat | None
    query_side: list[Heat]
    grid: charts.Grid
    duplicates: list[RankedDocument] = field(default_factory=list)

    @property
    def snippet(self) -> str:
        """The text's beginning on one line."""
        text = " ".join(self.document.text.split())
        return text if len(text) <= SNIPPET else text[:SNIPPET].rsplit(" ", 1)[0] + " …"


@dataclass(frozen=True)
class Source:
    """A source's part of a query's support."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class QueryView:
    """One query with its ranking and plots."""

    number: int
    row: dict[str, Any]
    members: list[tuple[int | None, str]]
    proponents: list[RankedDocument]
    opponents: list[RankedDocument]
    n_ranked: tuple[int, int]
    n_candidates: int
    grid: charts.Grid
    distribution: charts.Distribution | None
    n_sample: int
    sources: list[Source]

    @property
    def label(self) -> str:
        """The prompt on one line; a set's name."""
        if self.members:
            return f"Set {self.row['query_id']} ({len(self.members)} queries)"
        return on_one_line(self.row["prompt"]) or str(self.row["query_id"])

    @property
    def best(self) -> RankedDocument | None:
        """The strongest proponent."""
        return self.proponents[0] if self.proponents else None


def on_one_line(prompt: str) -> str:
    """A prompt without the headings of an instruction template."""
    lines = [line for line in prompt.splitlines() if not line.lstrip().startswith("###")]
    return " ".join(" ".join(lines).split())


def render(attribution: Attribution, shown: Sequence[str]) -> str:
    """The page of the queries `shown`, by their ids: one HTML string without outside assets."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": charts.number,
        "level": charts.level,
        "breakable": breakable,
        "thousands": "{:,}".format,
    }
    manifest = attribution.manifest
    settings, recall = manifest.get("settings", {}), manifest.get("recall") or {}
    return environment.get_template("page.html.j2").render(
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        run_id=attribution.run_id,
        manifest=manifest,
        settings=settings,
        stages=settings.get("stages", []),
        attributed=settings.get("attribute_to", ""),
        measured=retrieval.sentences(recall),
        found=retrieval.table(recall, wide=True),
        levels=level_ranges(manifest),
        stored=json.dumps(settings, indent=1),
        queries=query_views(attribution, shown),
        n_queries=len(attribution.query_ids),
        chart_width=charts.WIDTH,
        chart_height=charts.HEIGHT,
    )


def breakable(name: str) -> Markup:
    """A map's name that may be broken after a dot or an underscore."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def level_ranges(manifest: dict[str, Any]) -> dict[str, str]:
    """For each stage, the smallest and largest damping (or tau) that its blocks used."""
    settings = manifest.get("settings", {})
    names = [stage["name"] for stage in settings.get("stages", [])]
    names = names[names.index(settings["attribute_to"]) :] if settings.get("attribute_to") in names else []
    used: dict[str, list[float]] = {name: [] for name in names}
    for stages in (manifest.get("levels") or {}).values():
        for name, blocks in zip(names, stages, strict=False):
            used[name] += blocks
    return {name: f"{min(values):.3g} to {max(values):.3g}" for name, values in used.items() if values}


def query_views(attribution: Attribution, shown: Sequence[str]) -> list[QueryView]:
    """The queries `shown`, in the run's order; a set links to those of its members that are among them."""
    tables = (attribution.table, attribution.layers, attribution.samples, attribution.candidates)
    parts = [_by_query(table, shown) for table in tables]
    numbers = {name: number for number, name in enumerate(attribution.query_ids, 1) if name in set(shown)}
    return [
        _query_view(attribution, numbers, row, *(part.get(row["query_id"], []) for part in parts))
        for row in attribution.queries.to_pylist()
        if row["query_id"] in numbers
    ]


def _by_query(table: pa.Table, shown: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    rows = defaultdict(list)
    for row in table.filter(pc.field("query_id").isin(list(shown))).to_pylist():
        rows[row["query_id"]].append(row)
    return rows


def _query_view(
    attribution: Attribution,
    numbers: dict[str, int],
    row: dict[str, Any],
    influences: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    candidates: list[dict[str, Any]],
) -> QueryView:
    maps: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for cell in layers:
        maps[cell["document_id"]].append((cell["map"], cell["score"]))
    influences = sorted(influences, key=lambda r: (r["side"] != "proponent", r["rank"]))
    strongest = max((abs(r["score"]) for r in influences), default=0.0) or 1.0
    shown = []
    for influence in influences:
        name = influence["document_id"]
        shown.append(
            RankedDocument(
                influence,
                attribution.documents[name],
                100 * abs(influence["score"]) / strongest,
                _heat(attribution, row["query_id"], name, "document"),
                [h for side in SIDES if (h := _heat(attribution, row["query_id"], name, side)) is not None],
                charts.grid([m for m, _ in maps[name]], [s for _, s in maps[name]]),
            )
        )
    proponents, opponents = ([d for d in shown if d.row["side"] == side] for side in ("proponent", "opponent"))
    support = [pair for d in proponents for pair in maps[d.row["document_id"]]]
    sample = np.asarray([s["score"] for s in samples], dtype=np.float32)
    scores, found = (np.asarray([r["score"] for r in rows], dtype=np.float32) for rows in (influences, candidates))
    return QueryView(
        numbers[row["query_id"]],
        row,
        [(numbers.get(name), name) for name in row["members"] or []],
        _folded(proponents),
        _folded(opponents),
        (len(proponents), len(opponents)),
        len(candidates),
        charts.grid([m for m, _ in support], [s for _, s in support]),
        charts.distribution(sample, scores, found),
        len(sample),
        _sources(proponents),
    )


def _folded(ranked: list[RankedDocument]) -> list[RankedDocument]:
    """The ranking with each near-duplicate moved under the first of its group."""
    first: dict[int, RankedDocument] = {}
    kept: list[RankedDocument] = []
    for d in ranked:
        head = first.setdefault(d.row["duplicate_group"], d)
        (kept if head is d else head.duplicates).append(d)
    return kept


def _heat(attribution: Attribution, query: str, document: str, side: str) -> Heat | None:
    if not attribution.has_heatmap(query, document, side):
        return None
    heat = attribution.heatmap(query, document, side)
    parts = list(zip(heat.tokens, map(float, heat.scores), strict=True)) if side == "member" else []
    return Heat(side, charts.token_spans(heat), charts.strongest_tokens(heat), parts)


def _sources(proponents: list[RankedDocument]) -> list[Source]:
    total = sum(d.row["score"] for d in proponents)
    scores: dict[str, list[float]] = defaultdict(list)
    for d in proponents:
        scores[d.document.source or "no source given"].append(d.row["score"])
    found = [Source(name, len(values), sum(values) / total) for name, values in scores.items()]
    return sorted(found, key=lambda source: -source.share)
