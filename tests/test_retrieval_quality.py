"""What retrieval finds: every measure beside a slow one, planted indexes, and what a build writes of it."""

from __future__ import annotations

import io
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tasks.index
import tasks.progress
from flows.plain_console import PlainConsole
from flows.show_results import print_recall
from msif_core import catalog, corpus, storage
from msif_core.config import Config
from msif_core.evaluation import retrieval_quality as quality
from msif_core.evaluation.retrieval_quality import against_exact, counts, judge, measure, ranks
from msif_core.index import Index
from msif_core.lexical import LexicalIndex
from msif_core.pipeline import Pipeline
from msif_core.report import retrieval
from tests.tiny_project import change, manifest, write_project

INF = float("inf")


def drawn(queries: int, sequences: int, seed: int = 0) -> Any:
    """Exact scores with heavy tails, [Q, N]."""
    return np.random.default_rng(seed).standard_t(2, (queries, sequences))


def best_first(scores: Any) -> list[int]:
    return sorted(range(len(scores)), key=lambda n: -scores[n])


def slowly_taken(row: int, source: str, count: int, documents: Any, gradient: Any, words: Any) -> set[int]:
    """Sequences that a source takes for one query, with Python's own sort and sets."""
    by_index = {n for n in best_first(gradient[row])[:count] if gradient[row, n] > -INF}
    by_words = [n for n in best_first(words[row]) if words[row, n] > -INF]
    if source == "both":
        found = set(list(dict.fromkeys(documents[n] for n in by_words))[:count]) | {documents[n] for n in by_index}
        return {n for n, document in enumerate(documents) if document in found}
    return by_index if source == "gradient" else set(by_words[:count])


def slowly_measured(exact: Any, taken: list[set[int]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {"recall": [], "weight": [], "best": []}
    for scores, found in zip(exact, taken, strict=True):
        top = best_first(scores)[:10]
        values["recall"].append(len(found & set(top)) / len(top))
        values["best"].append(float(any(scores[n] == max(scores) for n in found)))
        bound = np.quantile(scores, 0.99)
        heavy = [n for n, score in enumerate(scores) if score >= bound and score > 0]
        if heavy:
            values["weight"].append(sum(scores[n] for n in found & set(heavy)) / sum(scores[n] for n in heavy))
    return values


@pytest.mark.parametrize("tied", [False, True])
def test_every_measure_is_the_slow_one(tied: bool) -> None:
    rng = np.random.default_rng(3)
    documents = np.sort(rng.integers(0, 90, 241))
    exact, gradient = drawn(6, 241), drawn(6, 241, seed=1)
    gradient[0] += 3 * exact[0]
    gradient[1, 5:] = -INF  # fewer than are asked for
    words = rng.random((6, 90))[:, documents]
    words[:, documents > 50] = -INF
    words[2] = -INF
    if tied:
        exact, gradient = np.round(exact), np.round(gradient)
        words = np.where(np.isfinite(words), np.ceil(3 * words), words)
    exact[3] = -np.abs(exact[3]) - 1  # no influence stands out
    exact[4] = np.where(np.arange(241) < 237, -np.abs(exact[4]), np.abs(exact[4]) + 1)  # four are positive
    found = measure(exact, documents, gradient, words)
    assert [row["source"] for row in found["found"]] == ["gradient", "bm25", "both"] * 3
    assert found["standing_out"] == 5
    for row in found["found"]:
        count = round(row["share"] * 241)
        taken = [slowly_taken(q, row["source"], count, documents, gradient, words) for q in range(6)]
        assert row["taken"] == pytest.approx(np.mean([len(names) for names in taken]))
        for name, values in slowly_measured(exact, taken).items():
            assert row[name] == pytest.approx(np.mean(values)), (row, name)
            assert row[f"{name}_error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_shares_are_those_that_are_taken() -> None:
    assert counts(241, quality.SHARES) == [10, 12, 24], "0.5%, 1% and 2% of 241 are all ten"
    assert counts(10_677, quality.SHARES) == [53, 107, 214, 534, 1068]
    assert counts(11, quality.SHARES) == [10]
    assert counts(10, quality.SHARES) == [], "taking all of them finds all of them"
    assert counts(241, [0.4, 1.0]) == [96]
    few = measure(drawn(3, 10), np.arange(10), drawn(3, 10), drawn(3, 10))
    assert few["found"] == []
    assert (few["verdict"], few["queries"], few["sequences"]) == ("unsure", 3, 10)
    assert few["told"] == "With 10 sequences scored exactly, nothing can be said of the gradient index."


def test_ties_go_to_the_first() -> None:
    np.testing.assert_array_equal(ranks(np.array([[1.0, 2, 2, -INF, 1]])), [[2, 0, 1, 4, 3]])


def test_duplicates_of_the_best_stand_out_too() -> None:
    """Five of 241 that share the highest score are more than a hundredth: nothing would be beyond the percentile."""
    exact = drawn(20, 241)
    exact[:, 100:105] = exact.max(axis=1, keepdims=True) + 1
    found = measure(exact, np.arange(241), exact)
    assert found["standing_out"] == 20
    assert found["found"][0]["weight"] == pytest.approx(1)


def test_scores_in_quarantine_are_left_out() -> None:
    exact, gradient, words = drawn(5, 300), drawn(5, 300, seed=1), drawn(5, 300, seed=2)
    whole = measure(exact, np.arange(300), gradient, words)
    bad = np.insert(np.insert(exact, 7, -INF, axis=1), 2, np.nan, axis=0)
    wide = [np.insert(np.insert(scores, 7, -INF, axis=1), 2, 0, axis=0) for scores in (gradient, words)]
    assert measure(bad, np.arange(301), *wide) == whole
    bad[0, 7] = 3  # scored with one query alone
    assert measure(bad, np.arange(301), *wide) == whole
    nothing = measure(np.full((2, 20), -INF), np.arange(20), drawn(2, 20))
    assert nothing["found"] == []
    assert (nothing["queries"], nothing["verdict"], nothing["estimate"]) == (0, "unsure", None)


def test_alone_and_together() -> None:
    only = measure(drawn(5, 300), np.arange(300), drawn(5, 300, seed=1))
    assert {row["source"] for row in only["found"]} == {"gradient"}
    one = measure(drawn(1, 300), np.arange(300), drawn(1, 300, seed=1))
    assert one["found"][0]["recall_error"] is None, "one query has no standard error"


def test_the_estimate_beside_exact_scores() -> None:
    """Against numpy's least squares and correlation, query by query."""
    exact = drawn(8, 500)
    estimate = 0.7 * exact + 2 * np.random.default_rng(5).normal(size=exact.shape) + 3
    estimate[:, :4] = -INF
    rows = []
    for guess, true in zip(estimate[:, 4:], exact[:, 4:], strict=True):
        slope, shift = np.polyfit(true, guess, 1)
        rows.append((np.corrcoef(guess, true)[0, 1], slope, (guess - slope * true - shift).std() / true.std()))
    found = against_exact(estimate, exact)
    assert found is not None
    assert list(found) == ["correlation", "slope", "noise"]
    np.testing.assert_allclose(list(found.values()), np.percentile(rows, [25, 50, 75], axis=0).T)
    same = against_exact(np.ones((1, 9)), np.arange(9.0)[None])
    assert same == {"correlation": [0.0] * 3, "slope": [0.0] * 3, "noise": [0.0] * 3}, "what is constant says nothing"
    assert against_exact(np.ones((1, 9)), np.ones((1, 9))) is None, "all exact scores are alike"
    assert against_exact(np.full((1, 9), -INF), np.arange(9.0)[None]) is None


@pytest.mark.parametrize("seed", range(5))
def test_an_index_that_is_random_says_so(seed: int) -> None:
    exact = drawn(60, 2000, seed)
    found = measure(exact, np.arange(2000), drawn(60, 2000, seed + 100), exact)
    assert found["verdict"] == "chance"
    assert found["told"].startswith(
        "The gradient index finds no more of the strongest documents than chance would on this model ("
    )
    assert found["told"].endswith(" chance 2%): candidates come from words alone, in effect.")
    assert abs(found["estimate"]["correlation"][1]) < 0.05
    without = measure(exact, np.arange(2000), drawn(60, 2000, seed + 100))
    assert "set retrieval.candidates to both" in without["told"]


def test_an_index_that_is_exact_finds_all() -> None:
    exact = drawn(60, 2000)
    found = measure(exact, np.arange(2000), exact, drawn(60, 2000, seed=1))
    assert found["verdict"] == "better"
    rows = [row for row in found["found"] if row["source"] == "gradient"]
    assert [row["taken"] for row in rows] == [10, 20, 40, 100, 200]
    assert all(row["recall"] == row["best"] == 1 and row["weight"] == pytest.approx(1) for row in rows[1:])
    for values, wanted in ((found["estimate"]["correlation"], 1), (found["estimate"]["noise"], 0)):
        np.testing.assert_allclose(values, wanted, atol=1e-9)


def test_what_is_told_of_a_weak_index_and_of_few_queries() -> None:
    def row(source: str, recall: float, share: float = 0.02) -> dict[str, Any]:
        return {
            "source": source, "share": share, "taken": 5000 * share, "recall": recall, "recall_error": 0.01,
            "best": 0.25,
        }  # fmt: skip

    numbers = "and the exact best of 25% of the queries, in the best 100 of 5,000 sequences; chance 2%"
    assert judge([row("gradient", 0.2), row("bm25", 0.6)], 60, 5000) == (
        "weak",
        "The gradient index finds more of the strongest documents than chance, but misses most of them: it finds 20% "
        f"of the exact top ten, {numbers}; words alone find more: 60%.",
    )
    assert judge([row("gradient", 0.7), row("bm25", 0.6)], 60, 5000) == (
        "better",
        f"The gradient index finds more of the strongest documents than chance: 70% of the exact top ten, {numbers}.",
    )
    assert judge([row("gradient", 0.045)], 60, 5000)[0] == "chance", "within three standard errors"
    assert judge([row("gradient", 0.045)], 6, 5000) == (
        "unsure",
        "6 held-out queries over 5,000 sequences are too few to tell the gradient index from chance: it finds 4% of "
        f"the exact top ten, {numbers}.",
    )
    assert judge([row("gradient", 1.0, 0.5)], 2, 20)[0] == "better"
    assert judge([row("gradient", 0.5, 0.5)], 60, 20)[0] == "unsure", "half of 20 are found by chance"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(Config.load(write_project(tmp_path_factory.mktemp("measured"))))
    pipeline.run()
    pipeline.publish_catalog()
    return pipeline


def test_estimates_are_those_of_a_search(built: Pipeline) -> None:
    queries = built.held_out()
    assert queries is not None
    psi, shards = built.query_sketches(queries), built.shards(built.target)
    ids = np.concatenate([corpus.read_shard(shard).sequence_ids for shard in reversed(shards)])
    found = Index([built.index_shard(shard) for shard in range(len(shards))], built.config.index)
    more = np.append(ids, ids.max() + 1)  # in quarantine, so that it has no code
    estimates = found.estimates(psi, more)
    assert np.isneginf(estimates[:, -1]).all()
    scores, retrieved = found.search(psi, 7)
    for row, value, names in zip(estimates, scores, retrieved, strict=True):
        np.testing.assert_array_equal(more[best_first(row)[:7]], names)
        np.testing.assert_array_equal(np.sort(row)[::-1][:7], value)


def test_scores_by_words_rank_as_the_search_does(built: Pipeline) -> None:
    lexical = LexicalIndex.load(built.build_lexical())
    texts = ["what is the heron made of", "no-such-word", ""]
    some = lexical.documents[::-1][3:]
    scores = lexical.scores(texts, some)
    assert scores.shape == (3, len(some))
    assert np.isneginf(scores[1:]).all()
    ranked = [name for name in lexical.search(texts, len(lexical.documents))[0] if name in some]
    assert ranked
    assert {some[n] for n in np.flatnonzero(np.isfinite(scores[0]))} == set(ranked)
    found = [scores[0, some.index(name)] for name in ranked]
    assert found == sorted(found, reverse=True)


def test_a_build_measures_what_an_answer_takes(built: Pipeline) -> None:
    recall = manifest(built.workspace.current_generation())["recall"]
    count, total = built.config.retrieval.taken(48), recall["sequences"]
    assert total == 48
    assert recall["answer_share"] == pytest.approx(min(1, count / 48))
    shares = {row["share"] for row in recall["found"]}
    assert shares == {c / 48 for c in counts(48, (*quality.SHARES, recall["answer_share"]))}
    rows = catalog.query(built.workspace.root, "select * from recall").to_pylist()
    assert rows == [{"generation": built.workspace.published(), "sequences": 48, **row} for row in recall["found"]]
    for name in ("generations_and_recall", "drift_of_recall"):
        assert catalog.query(built.workspace.root, name).num_rows
    told = catalog.query(built.workspace.root, "select verdict from generations")["verdict"].to_pylist()
    assert told == [recall["told"]]


def test_the_terminal_shows_a_table_and_the_verdict(built: Pipeline) -> None:
    shown = io.StringIO()
    print_recall(built.config, PlainConsole(file=shown, width=100, color_system=None))
    lines = shown.getvalue().splitlines()
    assert sum("gradients" in line for line in lines if line.startswith(" ")) == 4
    recall = manifest(built.workspace.current_generation())["recall"]
    assert recall["told"] in " ".join(" ".join(lines).split())
    assert retrieval.table({}, wide=True) == (["", ""], [])


def test_a_build_warns_of_an_index_no_better_than_chance(
    built: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks.index, "get_run_logger", lambda: logging.getLogger("run"))
    monkeypatch.setattr(tasks.progress, "whole", lambda _name: nullcontext())
    path = built.workspace.current_generation() / "manifest.json"
    stored = storage.read_json(path)
    for verdict, messages in (("better", []), ("unsure", []), ("chance", ["No more than chance."])):
        recall = {**stored["recall"], "verdict": verdict, "told": "No more than chance."}
        storage.write_json(path, {**stored, "recall": recall})
        tasks.index.publish_generation.fn(built.config)
        assert [record.message for record in caplog.records if record.name == "run"] == messages
    storage.write_json(path, stored)


def test_without_words_the_index_is_measured_alone(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    alone = change(path, retrieval={"candidates": "gradient"})
    recall = manifest(alone.run())["recall"]
    assert {row["source"] for row in recall["found"]} == {"gradient"}
