"""Retraining ground truth on a tiny project: seeded, resumable, the same bits twice."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import accuracy
from msif_core import catalog
from msif_core.config import Config, Filter
from msif_core.curvature.filters import Damped
from msif_core.errors import InputError
from msif_core.evaluation import judgement
from msif_core.evaluation.lds import datamodeling
from msif_core.evaluation.methods import Pool, all_methods
from msif_core.evaluation.retraining import Retraining, Run
from msif_core.pipeline import Pipeline
from msif_core.scoring import query_gradients, score_sequences
from tests.tiny_project import write_records

WORDS = ["kite", "oak", "loom", "brook", "anvil", "heron"]


def project(folder: Path, **retraining: object) -> Config:
    documents = [{"id": f"d{i}", "text": f"{WORDS[i % 6]}: a thing of kind {i}."} for i in range(24)]
    ask = [{"id": f"q{i}", "prompt": f"What is {w}?\n", "completion": f"A {w}."} for i, w in enumerate(WORDS)]
    training = {"learning_rate": 1e-2, "epochs": 1, "batch_size": 4}
    stages = [
        {
            "name": name,
            "model": "unused",
            "documents": write_records(folder / f"{name}.jsonl", rows),
            "training": training,
        }
        for name, rows in (("pretrain", documents), ("finetune", [dict(row) for row in ask[:4]]))
    ]
    gold = [{**row, "gold_doc_ids": [f"d{22 + i}"]} for i, row in enumerate(ask[4:])]
    size = {
        "vocabulary": 300,
        "hidden": 8,
        "layers": 1,
        "heads": 1,
        "pool": 12,
        "subsets": 3,
        "repeats": 2,
        "left_out": 3,
        "left_out_queries": 2,
    }
    return Config.model_validate({
        "workspace": str(folder / "workspace"), "queries": write_records(folder / "queries.jsonl", gold),
        "stages": stages, "corpus": {"max_length": 24}, "retraining": {**size, **retraining},
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Retraining:
    found = Retraining(project(tmp_path_factory.mktemp("retraining")))
    found.prepare()
    for run in found.subset_runs():
        found.train(run)
    return found


def rows(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in pq.read_table(path).to_pylist()]


def test_the_pool_holds_the_gold_documents_and_subsets_their_share(trained: Retraining) -> None:
    assert len(trained.pool_ids) == 12
    assert {"d22", "d23"} <= set(trained.pool_ids)
    masks = np.stack([trained.mask(i) for i in range(50)])
    assert (masks.sum(axis=1) == 6).all()
    assert 0.2 < masks.mean(axis=0).min() <= masks.mean(axis=0).max() < 0.8
    assert len(np.unique(masks, axis=0)) > 45
    table = pq.read_table(trained.folder / "masks.parquet").to_pylist()
    assert {r["document_id"] for r in table if r["subset"] == 1} == trained.kept_documents(Run("", "subset", 1, 0))


def test_each_training_records_every_querys_loss_after_each_stage(trained: Retraining) -> None:
    runs = trained.subset_runs()
    assert [(run.subset, run.seed) for run in runs] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    found = rows(trained.losses_file(runs[1]))
    assert {(r["stage"], r["query_id"]) for r in found} == {
        (s, q) for s in ("pretrain", "finetune") for q in ("q4", "q5")
    }
    assert {r["stage"]: (r["n_documents"], r["steps"]) for r in found} == {"pretrain": (6, 2), "finetune": (4, 1)}


def test_a_training_is_kept_and_done_again_gives_the_same_bits(trained: Retraining) -> None:
    run = trained.subset_runs()[0]
    path = trained.losses_file(run)
    before, stamp = rows(path), path.stat().st_mtime_ns
    trained.train(run)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(b"damaged")
    assert trained.missing(trained.subset_runs()) == [run]
    Retraining(trained.config).train(run)
    assert rows(path) == before


def test_the_subset_decides_the_pretraining_and_the_seed_the_start(trained: Retraining) -> None:
    names = ["q4", "q5"]
    losses = trained.read_losses("finetune", names)
    assert losses.masks.shape == (3, 12)
    assert losses.values.shape == (3, 2)
    assert losses.first.shape == losses.second.shape == (2, 2)
    assert len(np.unique(np.concatenate([losses.values, losses.second]), axis=0)) == 5
    offset = (losses.second - losses.first).mean(axis=0)
    np.testing.assert_allclose(losses.values[:2], (losses.first + losses.second - offset) / 2)
    np.testing.assert_array_equal(losses.values[2], trained.read_run(trained.subset_runs()[2], "finetune", names))


def test_the_reference_is_the_subset_training_on_the_whole_pool(trained: Retraining) -> None:
    """Leaving nothing out and training with checkpoints in between are the same training."""
    whole = Run("another-start", "left_out", -1, 1)
    trained.train(whole)
    config = trained.reference(1)
    from msif_core.models import load_model
    from msif_core.training import sequence_losses

    assert len(Path(str(config.stage("pretrain").documents)).read_text().splitlines()) == 12
    queries = trained.queries
    for stage in config.stages:
        sums, _ = sequence_losses(load_model(stage.model), queries.sequences)
        np.testing.assert_allclose(sums, trained.read_run(whole, stage.name, queries.ids), rtol=1e-6)
    missing = Run("missing", "left_out", -1, 0, ("d22",))
    assert "d22" not in trained.kept_documents(missing)
    assert len(trained.kept_documents(missing)) == 11


def test_more_subsets_continue_the_same_ground_truth(trained: Retraining) -> None:
    more = trained.config.model_copy(update={"retraining": trained.settings.model_copy(update={"subsets": 9})})
    other = trained.config.model_copy(update={"retraining": trained.settings.model_copy(update={"fraction": 0.25})})
    assert Retraining(more).key == trained.key != Retraining(other).key


@pytest.fixture(scope="module")
def judged(trained: Retraining) -> dict[str, object]:
    scores = judgement.read_scores(judgement.score_methods(trained))
    for run in judgement.left_out_runs(trained, scores):
        trained.train(run)
    return judgement.judge(trained, scores)


def test_every_method_scores_every_document(trained: Retraining, judged: dict[str, object]) -> None:
    path = judgement.score_methods(trained)
    scores = judgement.read_scores(path)
    assert len(scores) == 12
    assert all(table.shape == (2, 12) and np.isfinite(table).all() for table in scores.values())
    pipeline = Pipeline(trained.reference())
    expected = pipeline.score(Path(str(trained.config.queries)), trained.pool)
    np.testing.assert_allclose(scores["multi-stage, damped"], expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    sequences, last = trained.sequences(trained.config.stages[0]), pipeline.last
    asked = trained.queries.sequences
    dot = query_gradients(pipeline.model(last), pipeline.maps(last), asked, 4096, task="causal_lm")
    plain = score_sequences(
        pipeline.model("pretrain"), pipeline.maps("pretrain"), dot, sequences, 4096, task="causal_lm"
    )
    np.testing.assert_allclose(scores["gradient dot product"], plain, rtol=1e-3, atol=1e-6 * np.abs(plain).max())
    assert (np.abs(scores["gradient cosine"]) <= 1 + 1e-6).all()
    for method in ("TF-IDF", "BM25"):
        best = scores[method].argmax(axis=1)
        assert [trained.pool[i]["text"].split(":")[0] for i in best] == ["anvil", "heron"]


def test_the_configured_filters_have_a_row_of_their_own(trained: Retraining, judged: dict[str, object]) -> None:
    """Absolute damping at one stage and an unrolled filter at the other: as the pipeline scores."""
    filters = (Filter(damping=1e-3, relative=False, per_token_mean=True), Filter(kind="unrolled", tau=3))
    config = trained.reference()
    stages = tuple(s.model_copy(update={"filter": f}) for s, f in zip(config.stages, filters, strict=True))
    config = config.model_copy(update={"stages": stages})
    pool = Pool(config, trained.queries)
    order = [pool.documents.index(name) for name in trained.pool_ids]
    expected = Pipeline(config).score(Path(str(trained.config.queries)), trained.pool)
    found = all_methods(pool)["multi-stage, as configured"][:, order]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def test_the_table_tells_every_measure_and_sql_reads_it(trained: Retraining, judged: dict[str, object]) -> None:
    told = {(m["method"], m["metric"], m["queries"]): m for m in judged["metrics"]}  # type: ignore[attr-defined]
    for metric in ("lds", "mrr", "tail_patch"):
        assert len({key[0] for key in told if key[1] == metric} - {"noise ceiling"}) == 12
    assert {key[0] for key in told if key[1] == "left_out"} == {*judgement.LEFT_OUT_METHODS, "random"}
    assert (trained.folder / "lds.png").read_bytes().startswith(b"\x89PNG")
    names = ["q4", "q5"]
    losses = trained.read_losses("finetune", names)
    scores = judgement.read_scores(judgement.score_methods(trained))["TF-IDF"]
    expected = datamodeling(scores, losses.masks, losses.values)
    assert told["TF-IDF", "lds", "all"]["value"] == pytest.approx(expected.mean())
    catalog.publish(trained.workspace.root)
    best = "SELECT value FROM metrics WHERE method = 'TF-IDF' AND metric = 'lds' AND queries = 'all'"
    assert catalog.query(trained.workspace.root, best)["value"].to_pylist() == [pytest.approx(expected.mean())]
    counted = catalog.query(trained.workspace.root, "SELECT DISTINCT subset, seed FROM retrained_losses").to_pylist()
    trainings = {(run.subset, run.seed) for run in trained.subset_runs()} | {(-1, 0)}  # and those that left some out
    assert trainings <= {(row["subset"], row["seed"]) for row in counted}


def test_the_benchmarks_sums_over_subsets_give_the_same_scores(trained: Retraining, judged: dict[str, object]) -> None:
    subsets = accuracy.open_subsets(trained)
    alone = accuracy.open_alone(subsets, trained)
    scores = judgement.read_scores(judgement.score_methods(trained))
    found = {
        "multi-stage, damped": subsets.lds({"pretrain": Damped(0.1), "finetune": Damped(0.1)}),
        "EK-FAC, pre-trained model": subsets.lds({"pretrain": Damped(0.1)}, "pretrain"),
        "EK-FAC, fine-tuned model": alone.lds({"pretrain": Damped(0.1)}),
    }
    for method, values in found.items():
        np.testing.assert_allclose(
            values, datamodeling(scores[method], subsets.losses.masks, subsets.losses.values), err_msg=method
        )


def test_leaving_out_means_without_exactly_the_top(trained: Retraining, judged: dict[str, object]) -> None:
    scores = judgement.read_scores(judgement.score_methods(trained))
    table = pq.read_table(trained.folder / "left_out.parquet").to_pylist()
    row = next(r for r in table if r["method"] == "TF-IDF" and r["query_id"] == "q5")
    order = np.argsort(-scores["TF-IDF"][1], kind="stable")[:3]
    assert set(row["document_ids"]) == {trained.pool_ids[i] for i in order}
    run = next(r for r in judgement.left_out_runs(trained, scores) if r.name == row["run"])
    assert trained.kept_documents(run) == set(trained.pool_ids) - set(row["document_ids"])
    change = judgement.left_out_changes(trained, "finetune", ["q4", "q5"])["TF-IDF"][1]
    whole = trained.read_run(Run("whole", "left_out", -1, 0), "finetune", ["q4", "q5"])
    assert change == pytest.approx(trained.read_run(run, "finetune", ["q4", "q5"])[1] - whole[1])
    assert change != 0


def test_a_pool_may_hold_what_json_has_no_word_for(tmp_path: Path) -> None:
    config = project(tmp_path)
    rows = [{"id": f"d{i}", "text": f"{WORDS[i % 6]}: a thing.", "day": date(1900 + i, 1, 1)} for i in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pretrain.parquet")
    stage = config.stages[0].model_copy(update={"documents": str(tmp_path / "pretrain.parquet")})
    retraining = Retraining(config.model_copy(update={"stages": (stage, config.stages[1])}))
    retraining.prepare()
    assert "1922-01-01" in (retraining.folder / "pool.jsonl").read_text()


def test_what_is_missing_is_named(tmp_path: Path, trained: Retraining) -> None:
    config = trained.config
    with pytest.raises(InputError, match="set `queries`"):
        Retraining(config.model_copy(update={"queries": None}))
    bare = config.stages[0].model_copy(update={"training": None})
    with pytest.raises(InputError, match="stage pretrain: no `training` recipe"):
        Retraining(config.model_copy(update={"stages": (bare, config.stages[1])}))
    with pytest.raises(InputError, match=r"there are 24 documents; set retraining\.pool to 24 or less"):
        _ = Retraining(project(tmp_path, pool=100)).pool
    contrast = write_records(
        tmp_path / "contrast.jsonl", [{"id": "q", "prompt": "What?", "completion": " A.", "contrast": " B."}]
    )
    asked = Retraining(config.model_copy(update={"queries": contrast}))
    asked.prepare()
    with pytest.raises(InputError, match="query 'q': retraining takes neither contrasts nor sets"):
        _ = asked.queries
    with pytest.raises(InputError, match="0 subsets are trained"):
        Retraining(project(tmp_path)).read_losses("finetune", ["q4"])
    assert json.loads((trained.folder / "settings.json").read_text())["retraining"]["pool"] == 12
