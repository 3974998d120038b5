from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msif_core.attribution import Attribution, Heatmap
from msif_core.errors import InputError
from msif_core.report import charts
from tests.workspace_fixture import MAPS, write_workspace


@pytest.fixture(scope="module")
def attribution(tmp_path_factory: pytest.TempPathFactory) -> Attribution:
    root = write_workspace(tmp_path_factory.mktemp("report"))
    return Attribution.open(root / "attributions" / "20260101-000000-aaaaaa")


@pytest.fixture(scope="module")
def page(attribution: Attribution, tmp_path_factory: pytest.TempPathFactory) -> str:
    return attribution.to_html(tmp_path_factory.mktemp("page") / "new" / "page.html").read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects ids, links and tags, and checks that elements nest."""

    VOID = frozenset({"meta", "wbr", "input", "rect", "line", "path", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value or "" for key, value in attrs if key in ("href", "src")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, tag
        assert self.stack.pop() == tag


def test_scores_and_table(attribution: Attribution) -> None:
    assert attribution.scores.shape == (3, len(attribution.document_ids))
    assert attribution.scores.dtype == np.float32
    assert np.isfinite(attribution.scores).sum(axis=1).tolist() == [8, 8, 0]
    row = attribution.table.slice(0, 1).to_pylist()[0]
    column = attribution.document_ids.index(row["document_id"])
    assert attribution.scores[attribution.query_ids.index(row["query_id"]), column] == np.float32(row["score"])


def test_heatmap_sums_to_the_score(attribution: Attribution) -> None:
    for row in attribution.table.to_pylist():
        heat = attribution.heatmap(row["query_id"], row["document_id"])
        assert len(heat.tokens) == len(heat.scores) == 30
        assert heat.scores.sum() == pytest.approx(row["best_score"], rel=1e-4)
    assert "&lt;script&gt;" in heat._repr_html_()
    shown = Heatmap(["for", "against"], np.asarray([2.0, -1.0], np.float32))._repr_html_()
    assert shown.index("underline") > shown.index("for"), "what speaks against is marked by more than its colour"
    assert shown.count("underline") == 1
    with pytest.raises(InputError, match="stored no document tokens of query 'q-000', document 'absent'"):
        attribution.heatmap("q-000", "absent")


def test_documents_come_with_text_and_metadata(attribution: Attribution) -> None:
    assert all(document.text for document in attribution.documents.values())
    assert {d.fields.get("license") for d in attribution.documents.values()} <= {"WN", None}
    assert attribution.documents.keys() == set(attribution.document_ids)


def test_repr_html(attribution: Attribution) -> None:
    shown = attribution._repr_html_()
    assert shown.count("<tr>") == 1 + 2 * (3 + 2)
    assert "3 queries, 16 ranked documents" in shown
    assert repr(attribution) == "Attribution(20260101-000000-aaaaaa: 3 queries, 16 ranked documents)"


def test_a_run_of_an_older_version_is_shown(tmp_path: Path) -> None:
    folder = write_workspace(tmp_path) / "attributions" / "20260101-000000-aaaaaa"
    (folder / "candidates.parquet").unlink()
    for name, new in (("queries", ["generated", "contrast", "members"]), ("influences", ["n_random"])):
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(new), path)
    text = Attribution.open(folder).to_html(tmp_path / "page.html").read_text()
    assert "of 40 random documents" in text
    assert not re.search(r"\bNone\b", text)


def test_the_table_is_read_without_a_copy(attribution: Attribution) -> None:
    influences = attribution.table

    def address(column: pa.ChunkedArray) -> int:
        return int(column.chunk(column.num_chunks - 1).buffers()[1].address)

    frame = influences.to_pandas(types_mapper=pandas.ArrowDtype)
    assert address(frame["score"].array.__arrow_array__()) == address(influences["score"])
    found = duckdb.sql("SELECT count(*), max(score) FROM influences").fetchall()
    assert found == [(influences.num_rows, max(influences["score"].to_pylist()))]


def test_polars_takes_the_table(attribution: Attribution) -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    column = attribution.table["score"].chunk(0)
    taken = polars.from_arrow(column).to_arrow()
    assert taken.buffers()[1].address == column.buffers()[1].address, "without a copy"
    assert polars.from_arrow(attribution.table).height == attribution.table.num_rows


def test_a_page_of_some_queries(attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page stays small enough to open: the first of many queries, or the ones that are named."""
    name = attribution.query_ids[1]
    page = attribution.to_html(tmp_path / "one.html", [name]).read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["q2"]
    assert "This page shows 1 of the run’s 3 queries" in page
    assert "<b>red water</b>" not in page
    monkeypatch.setattr("msif_core.attribution.PAGE_QUERIES", 2)
    page = attribution.to_html(tmp_path / "two.html").read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["q1", "q2"]
    with pytest.raises(InputError, match="has no query 'absent'"):
        attribution.to_html(tmp_path / "none.html", ["absent"])


def test_not_an_attribution(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete attribution"):
        Attribution.open(tmp_path)


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links), checker.links
    assert not re.search(r"https?://|@import|url\(", page)
    assert checker.tags.count("script") == 1, "text from documents is escaped"
    assert "<b>red water</b>" not in page


def test_page_shows_every_part(page: str, attribution: Attribution) -> None:
    assert page.count('<section id="q') == 3
    assert page.count('<li class="document proponent"') == 12
    assert page.count('<li class="document opponent"') == 4
    assert page.count("<svg") == 3
    for text in (
        "No candidate document lowers this query’s loss", "+ 1 near-duplicate<",
        "which of its tokens carry the score", "which tokens carry the score", "The completion it is compared with",
        "The model’s own answer, explained", "rather than", "A wild duck.", "Strongest:",
        "Contributions by layer and kind of map", "exact top ten", "95.0% ±1.0",
        "0.1 × mean eigenvalue", "0.01 to 0.03",
        "<code>f1</code>", "<code>g2</code>",
        "proponent</b> more training on this document lowers", "mlp.<wbr>dense_<wbr>4h_<wbr>to_<wbr>h",
        "random documents", "<p>The gradient index finds more than chance.</p>",
        '<th scope="row">exact top ten</th><th scope="row">words</th><td>50.0% ±1.0</td>',
    ):  # fmt: skip
        assert text in page, text
    for row in attribution.table.to_pylist():
        assert row["document_id"] in page
        assert charts.number(row["score"]) in page


def test_page_without_corpus_samples_tokens_or_recall(tmp_path: Path) -> None:
    import json
    import shutil

    root = write_workspace(tmp_path)
    shutil.rmtree(root / "corpus")
    folder = root / "attributions" / "20260101-000000-aaaaaa"
    for name in ("samples", "tokens", "layers"):
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    influences = pq.read_table(folder / "influences.parquet")
    nan = pa.array([float("nan")] * influences.num_rows, pa.float32())
    column = influences.schema.get_field_index("percentile")
    pq.write_table(influences.set_column(column, influences.schema.field(column), nan), folder / "influences.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "recall": {}}))
    text = Attribution.open(folder).to_html(tmp_path / "page.html").read_text()
    assert not re.search(r"\bnan\b", text)
    assert "was not measured" in text
    poor = {**manifest, "recall": {**manifest["recall"], "verdict": "chance", "told": "No more than chance."}}
    (folder / "manifest.json").write_text(json.dumps(poor))
    page = Attribution.open(folder).to_html(tmp_path / "page.html").read_text()
    assert "<strong>No more than chance.</strong>" in page
    assert "was not measured" not in page
    assert "0 random documents" not in text


def test_numbers() -> None:
    cases = [
        (1.5, "+1.50"),
        (-0.01234, "−0.0123"),
        (123.4, "+123"),
        (999.9, "+1,000"),
        (-6866.1, "−6,866"),
        (3e8, "+3.00e8"),
        (1e-9, "+1.00e-9"),
        (float("nan"), "–"),
        (0.0, "+0.00"),
    ]
    assert [charts.number(value) for value, _ in cases] == [text.replace("-", "−") for _, text in cases]


def test_levels_are_symmetric_and_near_zero_is_plain() -> None:
    assert [charts.level(v, 1.0) for v in (-1, -0.5, -0.05, 0, 0.05, 0.5, 1)] == ["n5", "n2", "", "", "", "p2", "p5"]
    assert charts.level(1.0, 0.0) == ""
    spans = str(charts.token_spans(Heatmap(["a", "<b>", "c"], np.asarray([0.0, 2.0, -2.0], np.float32))))
    assert spans == 'a<i class="p5" title="+2.00">&lt;b&gt;</i><i class="n5" title="−2.00">c</i>'


def test_grid_sums_and_orders_layers() -> None:
    names = [*MAPS, "h.10.attn.c_attn", "lm_head"]
    found = charts.grid(names, [1.0] * len(names))
    assert found.layers == ["0", "1", "2", "10", "other"]
    assert sum(found.sums) == len(names)
    assert found.kinds == sorted(found.kinds)
    assert found.cells[0][found.kinds.index("lm_head")] is None
    assert charts.split_name("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")


def test_distribution_places_scores_in_order() -> None:
    sample = np.random.default_rng(0).normal(0, 1, 200).astype(np.float32)
    plot = charts.distribution(sample, np.asarray([5.0, 900.0, -3.0], np.float32), np.asarray([4.0], np.float32))
    assert plot is not None
    assert 0 < plot.opponents[0] < plot.zero < plot.proponents[0] < plot.proponents[1] < charts.WIDTH
    positions = [x for x, _ in plot.ticks]
    assert "0" in [label for _, label in plot.ticks]
    assert min(np.diff(positions)) > 40
    assert charts.distribution(*[np.zeros(0, np.float32)] * 3) is None
