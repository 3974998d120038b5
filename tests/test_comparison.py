"""Methods side by side: queries without a hit, questions it does not take, stages of two tasks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from flows.plain_console import PlainConsole
from flows.show_results import print_comparison
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.evaluation.comparison import _mean_and_error, compare
from msif_core.pipeline import Pipeline
from tests.tiny_project import WORDS, asked, write_project, write_records


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    found = Pipeline.from_config(write_project(tmp_path_factory.mktemp("comparison")))
    found.run()
    return found


def asking(pipeline: Pipeline, folder: Path, *queries: dict[str, Any]) -> Pipeline:
    """The same project with other held-out queries; what they need of it is built."""
    path = write_records(folder / "queries.jsonl", list(queries))
    found = Pipeline(Config.model_validate({**pipeline.config.model_dump(), "queries": path}))
    for shard in found.recall_shards():
        found.exact_shard(shard)
    return found


def held_out(pipeline: Pipeline) -> list[dict[str, Any]]:
    return asked(pipeline.config.workspace.parent / "config.yaml")


def by_method(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result["methods"]}


def test_the_error_is_that_of_the_mean_of_a_few_queries_and_none_of_one() -> None:
    """Over many draws the squared error is the mean's variance, here 1/3."""
    drawn = np.random.default_rng(0).normal(size=(4000, 3))
    squares = [_mean_and_error(row)[1] ** 2 for row in drawn]  # type: ignore[operator]
    assert np.mean(squares) == pytest.approx(1 / 3, rel=0.05)
    assert _mean_and_error(np.array([0.7, np.nan])) == (0.7, None)
    assert _mean_and_error(np.array([np.nan])) == (None, None)


def test_one_query_is_shown_without_an_error(pipeline: Pipeline, tmp_path: Path) -> None:
    result = compare(asking(pipeline, tmp_path, held_out(pipeline)[0]), 0.02)
    assert by_method(result)["multi-stage influence"]["loss_change_error"] is None
    console = PlainConsole(file=io.StringIO(), width=200)
    print_comparison(result, console)
    assert "±" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_query_that_shares_no_word_counts_for_the_other_methods(pipeline: Pipeline, tmp_path: Path) -> None:
    strange = {"id": "strange", "prompt": "Qux?", "completion": "Zot", "gold_doc_ids": ["d00"]}
    first = by_method(compare(asking(pipeline, tmp_path, *held_out(pipeline)), 0.02))
    compared = compare(asking(pipeline, tmp_path, *held_out(pipeline), strange), 0.02)
    both = by_method(compared)
    for column in ("loss_change", "loss_change_error"):
        assert both["BM25"][column] == pytest.approx(first["BM25"][column])
        assert both["multi-stage influence"][column] != first["multi-stage influence"][column]
    assert compared["no_tail_patch"] is None
    alone = by_method(compare(asking(pipeline, tmp_path, strange), 0.02))
    assert alone["BM25"]["loss_change"] is None
    assert alone["BM25"]["mrr"] == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"contrast": "An oak."},
            r"queries.jsonl, query 'q': the comparison takes neither contrasts nor sets; remove it",
        ),
        ({"set": "s"}, r"queries.jsonl, query 's': the comparison takes neither contrasts nor sets; remove it"),
        (
            {"gold_doc_ids": ["d00", "e1", "e2", "e3", "e4"]},
            r"queries.jsonl, query 'q': stage 'pretrain' has no document of 4 gold_doc_ids, the first: "
            r"\['e1', 'e2', 'e3'\]; correct the ids, or add the documents",
        ),
        ({"gold_doc_ids": []}, r"queries.jsonl: no query has gold_doc_ids; give some the ids of the documents that"),
    ],
)
def test_what_it_does_not_take_is_refused_at_the_start(
    pipeline: Pipeline, tmp_path: Path, query: dict[str, Any], message: str
) -> None:
    path = write_records(
        tmp_path / "queries.jsonl", [{"id": "q", "prompt": "Why?", "completion": "A.", "gold_doc_ids": ["d00"]} | query]
    )
    changed = Pipeline(Config.model_validate({**pipeline.config.model_dump(), "queries": path}))
    with pytest.raises(InputError, match=message):
        compare(changed, 0.02)  # before it looks for scores, which are not there


def test_without_held_out_queries_there_is_nothing_to_compare(pipeline: Pipeline) -> None:
    none = Pipeline(Config.model_validate({**pipeline.config.model_dump(), "index": {"recall_queries": 0}}))
    with pytest.raises(InputError, match=r"set `queries` to a jsonl file, and index\.recall_queries above 0"):
        compare(none, 0.02)


def test_documents_of_another_task_than_the_last_stage_have_no_tail_patch(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    settings = json.loads(path.read_text())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pretrain", num_labels=2)
    model.save_pretrained(tmp_path / "labelled")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "pretrain").save_pretrained(tmp_path / "labelled")
    texts = [
        {"id": w, "text": f"{w}: a thing", "label": i % 2, "gold_doc_ids": [f"d{i:02d}"]} for i, w in enumerate(WORDS)
    ]
    labelled = write_records(tmp_path / "labelled.jsonl", texts)
    settings["stages"][1] |= {"model": str(tmp_path / "labelled"), "documents": labelled, "task": "classification"}
    pipeline = Pipeline(Config.model_validate({**settings, "queries": labelled}))
    pipeline.run()
    result = compare(pipeline, 0.02)
    assert result["no_tail_patch"] == "the attributed stage is a causal_lm, the last one a classification"
    assert all(row["loss_change"] is None for row in result["methods"])
    assert by_method(result)["multi-stage influence"]["mrr"] > 0
