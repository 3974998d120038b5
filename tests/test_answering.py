"""The stored answer on a small trained project: questions of every kind, groups of queries, both token splits."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from msif_core import answering, catalog, corpus, scoring
from msif_core.attribution import Attribution
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.tiny_project import documents, write_project

ASK = "What is kite?\n"
QUERIES: list[dict[str, Any]] = [
    {"id": "plain", "prompt": ASK, "completion": "A kite.", "set": "both", "topic": "toys"},
    {"id": "other", "prompt": ASK, "completion": "An oak."},
    {"id": "versus", "prompt": ASK, "completion": "A kite.", "contrast": "An oak.", "set": ["both", "again"]},
    {"id": "alone", "prompt": "What is heron?\n"},
    {"id": "text", "text": "loom: a thing called loom, made of oak."},
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    found = Pipeline.from_config(write_project(tmp_path_factory.mktemp("answering")))
    found.run()
    return found


@pytest.fixture(scope="module")
def attribution(pipeline: Pipeline) -> Attribution:
    return pipeline.attribute(QUERIES, top_k=6)


@pytest.fixture(scope="module")
def exact(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """Exact scores of every document, by query, without the index."""
    scores = pipeline.score(QUERIES, documents())
    return dict(zip(["plain", "other", "versus", "alone", "text", "both", "again"], scores, strict=True))


def with_settings(pipeline: Pipeline, section: str, **changes: Any) -> Pipeline:
    config = pipeline.config
    changed = getattr(config, section).model_copy(update=changes)
    return Pipeline(Config.model_validate({**config.model_dump(), section: changed.model_dump()}))


def test_odd_metadata_of_a_query_is_kept_as_json(pipeline: Pipeline) -> None:
    odd = {"when": date(2020, 1, 2), "x": float("nan"), "topic": "toys"}
    found = pipeline.attribute([QUERIES[1] | odd], top_k=1)
    [metadata] = pq.read_table(found.folder / "queries.parquet")["metadata"].to_pylist()
    assert json.loads(metadata) == {"when": "2020-01-02", "x": None, "topic": "toys"}


# -- questions ----------------------------------------------------------------------------------------


def test_a_contrast_is_the_difference_of_its_two_queries(exact: dict[str, np.ndarray]) -> None:
    difference = exact["plain"] - exact["other"]
    np.testing.assert_allclose(exact["versus"], difference, atol=1e-5 * np.abs(difference).max())
    assert np.abs(difference).max() > 0.01 * np.abs(exact["plain"]).max(), "the two completions differ in influence"


def test_a_set_is_the_mean_of_its_members(exact: dict[str, np.ndarray]) -> None:
    scale = np.abs(exact["plain"]).max()
    np.testing.assert_allclose(exact["both"], (exact["plain"] + exact["versus"]) / 2, atol=1e-5 * scale)
    np.testing.assert_allclose(exact["again"], exact["versus"], atol=1e-5 * scale)


def test_stored_scores_are_the_exact_ones(attribution: Attribution, exact: dict[str, np.ndarray]) -> None:
    names = [row["id"] for row in documents()]
    assert attribution.query_ids == list(exact)
    for row in attribution.table.to_pylist():
        scores = exact[row["query_id"]]
        assert row["score"] == pytest.approx(
            scores[names.index(row["document_id"])], abs=1e-5 * float(np.abs(scores).max())
        )


def test_queries_are_stored_with_what_was_asked(attribution: Attribution) -> None:
    rows = {row["query_id"]: row for row in attribution.queries.to_pylist()}
    assert rows["versus"]["contrast"] == "An oak."
    assert rows["both"]["members"] == ["plain", "versus"]
    assert [name for name, row in rows.items() if row["generated"]] == ["alone"]
    assert json.loads(rows["plain"]["metadata"]) == {"topic": "toys"}
    assert rows["versus"]["loss"] == pytest.approx(rows["plain"]["loss"] - rows["other"]["loss"], rel=1e-5)
    assert rows["both"]["loss"] == pytest.approx((rows["plain"]["loss"] + rows["versus"]["loss"]) / 2, rel=1e-5)


def test_a_prompt_alone_is_explained_by_the_models_own_greedy_answer(pipeline: Pipeline) -> None:
    """The generated tokens are, one by one, the last model's most likely ones."""
    short = with_settings(pipeline, "completion", max_new_tokens=5)
    queries = short.read_queries([{"id": "a", "prompt": ASK}, {"id": "b", "prompt": "heron"}])
    model, tokenizer = pipeline.model("finetune"), pipeline.tokenizer("finetune")
    for ids, labels, completion in zip(
        queries.sequences.input_ids, queries.sequences.labels, queries.completions, strict=True
    ):
        start = int(np.flatnonzero(labels != -100)[0])
        assert 1 <= len(ids) - start <= 5
        for position in range(start, len(ids)):
            logits = model(torch.from_numpy(ids[None, :position]).long().to(pipeline.device)).logits[0, -1]
            assert int(logits.argmax()) == ids[position] == labels[position]
        assert completion == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert queries.generated == [True, True]


def test_a_long_prompt_loses_its_beginning(pipeline: Pipeline) -> None:
    (ids,) = pipeline.read_queries([{"id": "a", "prompt": "kite oak loom " * 30}]).sequences.input_ids
    assert len(ids) <= 24


def test_a_query_that_shares_no_word_has_an_empty_answer(pipeline: Pipeline) -> None:
    lexical = with_settings(pipeline, "retrieval", candidates="bm25", random_sample=0)
    found = lexical.attribute(
        [{"id": "strange", "prompt": "Qux?", "completion": "Zot"}, {"id": "t", "input_ids": [4, 5]}]
    )
    assert found.query_ids == ["strange", "t"]
    assert found.table.num_rows == 0
    assert "Qux?" in found.to_html(found.folder / "page.html").read_text()


# -- the answer ---------------------------------------------------------------------------------------


def test_groups_of_queries_give_the_answer_of_all_together(
    pipeline: Pipeline, attribution: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = with_settings(pipeline, "curvature", memory_budget_gb=1e-6)
    assert scoring.queries_within(narrow.maps(narrow.last), 1e-6) == 1
    assert len(list(narrow.query_gradients(narrow.read_queries(QUERIES[:1])))) > 1, "and the maps in groups too"
    assert [len(group) for group in answering.groups(narrow, narrow.read_queries(QUERIES))] == [1] * 7
    monkeypatch.setattr(answering, "TOGETHER", 3)
    assert [len(group) for group in answering.groups(pipeline, pipeline.read_queries(QUERIES))] == [3, 3, 1]
    monkeypatch.setattr("msif_core.answer_tables.HELD_ROWS", 100)
    alone = narrow.attribute(QUERIES, top_k=6)
    assert pq.ParquetFile(alone.folder / "tokens.parquet").num_row_groups > 3, "written as they came"
    for name in ("influences", "samples", "candidates", "layers", "tokens", "queries"):
        one, all_ = (pq.read_table(a.folder / f"{name}.parquet").drop(["run_id"]) for a in (alone, attribution))
        for column in one.column_names:
            values, expected = one[column].to_pylist(), all_[column].to_pylist()
            if column in ("score", "best_score"):
                np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
            else:
                assert values == expected, (name, column)


def test_both_token_splits_and_the_layers_add_up_to_the_score(attribution: Attribution) -> None:
    scale = float(np.nanmax(np.abs(attribution.scores)))
    sides: dict[tuple[str, str, str], float] = {}
    for row in attribution.tokens.to_pylist():
        key = (row["query_id"], row["document_id"], "document" if row["side"] == "document" else "query")
        sides[key] = sides.get(key, 0.0) + row["score"]
    for row in attribution.layers.to_pylist():
        key = (row["query_id"], row["document_id"], "layers")
        sides[key] = sides.get(key, 0.0) + row["score"]
    for row in attribution.table.to_pylist():
        for side in ("document", "query", "layers"):
            found = sides[row["query_id"], row["document_id"], side]
            assert found == pytest.approx(row["best_score"], abs=1e-5 * scale), (row, side)


def test_sides_of_the_query(attribution: Attribution, exact: dict[str, np.ndarray]) -> None:
    first = {row["query_id"]: row["document_id"] for row in attribution.table.to_pylist() if row["rank"] == 1}
    heat = attribution.heatmap("versus", first["versus"], "query")
    assert "".join(heat.tokens).startswith(ASK + "A kite.")
    assert "An oak." in "".join(attribution.heatmap("versus", first["versus"], "contrast").tokens)
    members = attribution.heatmap("both", first["both"], "member")
    assert members.tokens == ["plain", "versus"]
    column = [row["id"] for row in documents()].index(first["both"])
    expected = [exact[name][column] / 2 for name in members.tokens]
    np.testing.assert_allclose(members.scores, expected, atol=1e-5 * np.abs(exact["both"]).max())
    assert not attribution.has_heatmap("plain", first["plain"], "contrast")


def test_percentiles_leave_the_document_itself_out(attribution: Attribution, pipeline: Pipeline) -> None:
    samples: dict[str, dict[str, float]] = {}
    for row in attribution.samples.to_pylist():
        samples.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    assert {len(found) for found in samples.values()} == {pipeline.config.retrieval.random_sample}
    inside = 0
    for row in attribution.table.to_pylist():
        others = [s for name, s in samples[row["query_id"]].items() if name != row["document_id"]]
        inside += len(others) < 8
        assert row["n_random"] == len(others)
        assert row["percentile"] == pytest.approx(100 * np.mean(np.asarray(others) < row["score"]))
    assert inside, "some shown document is in the sample, else this shows nothing"


def test_sql_sees_the_question_and_the_sample(attribution: Attribution, pipeline: Pipeline) -> None:
    pipeline.publish_catalog()
    asked = f"SELECT query_id, generated, contrast, members FROM queries WHERE run_id = '{attribution.run_id}'"
    found = {row.pop("query_id"): row for row in catalog.query(pipeline.workspace.root, asked).to_pylist()}
    assert found["alone"] == {"generated": True, "contrast": None, "members": []}
    assert found["versus"] == {"generated": False, "contrast": "An oak.", "members": []}
    assert found["both"]["members"] == ["plain", "versus"]
    sizes = catalog.query(pipeline.workspace.root, "SELECT DISTINCT n_random FROM influences ORDER BY 1")
    assert sizes["n_random"].to_pylist() == [7, 8]


def test_a_query_without_a_finite_gradient_is_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = Pipeline.query_gradients

    def broken(self: Pipeline, queries: Any, **options: Any) -> Any:
        for rows, found in gradients(self, queries, **options):
            next(iter(found.values()))[1] = float("nan")
            yield rows, found

    monkeypatch.setattr(Pipeline, "query_gradients", broken)
    with pytest.raises(InputError, match=r"query 'other': its gradient is not finite"):
        pipeline.attribute(QUERIES[:2])
    assert all((run / "manifest.json").exists() for run in pipeline.workspace.attributions.iterdir())


def test_a_document_without_a_finite_score_is_not_ranked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build sets it aside, yet its words still find it."""
    scores_of = Pipeline.exact_scores

    def broken(self: Pipeline, filtered: Any, sequences: Any) -> np.ndarray:
        found = scores_of(self, filtered, sequences)
        found[:, [name == "d00" for name in sequences.document_ids]] = np.nan
        return found

    monkeypatch.setattr(Pipeline, "exact_scores", broken)
    found = pipeline.attribute([{"id": "q", "prompt": ASK, "completion": "A kite."}])
    assert "d00" not in found.document_ids
    assert np.isfinite(found.samples["score"].to_numpy()).all()


def test_a_document_shown_is_read_from_its_shard_alone(
    attribution: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Attribution(attribution.folder, attribution.table[:1], attribution.queries, attribution.manifest)
    read: list[Path] = []
    original = corpus.read_table
    monkeypatch.setattr(corpus, "read_table", lambda path, columns: read.append(path) or original(path, columns))
    (shown,) = one.documents.values()
    assert len(read) == 1
    assert shown.text in [row["text"] for row in documents()]


def test_folder_holds_the_tables_and_nothing_else(attribution: Attribution) -> None:
    names = {path.name for path in Path(attribution.folder).iterdir()}
    assert names == {"candidates.parquet", "influences.parquet", "layers.parquet", "manifest.json", "queries.parquet",
                     "samples.parquet", "tokens.parquet"}  # fmt: skip
