"""Steps of a whole project: memory budgets, stages without a common map, documents that break."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msif_core import catalog, corpus, models, scoring, storage
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from tests.tiny_project import asked, change, write_project


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = Config.load(write_project(tmp_path_factory.mktemp("project")))
    Pipeline(config).run()
    return config


def with_budget(config: Config, gigabytes: float) -> Pipeline:
    curvature = config.curvature.model_copy(update={"memory_budget_gb": gigabytes})
    return Pipeline(config.model_copy(update={"curvature": curvature}))


def test_queries_stream_through_a_small_budget(config: Config) -> None:
    queries = with_budget(config, 8.0).held_out()
    assert queries is not None
    roomy, tight = (with_budget(config, budget) for budget in (8.0, 2e-5))
    assert len(list(roomy.query_gradients(queries))) == 1
    blocks = [(rows.stop - rows.start, len(some)) for rows, some in tight.query_gradients(queries)]
    assert len(blocks) > len(queries) > max(rows for rows, _ in blocks)
    documents = [json.loads(line) for line in (config.workspace.parent / "documents.jsonl").read_text().splitlines()]
    asked = Path(config.queries or "")
    np.testing.assert_allclose(tight.score(asked, documents), roomy.score(asked, documents), rtol=1e-4, atol=1e-4)
    sketches = [pipeline.query_sketches(queries) for pipeline in (tight, roomy)]
    np.testing.assert_allclose(*sketches, rtol=1e-4, atol=1e-5)


def test_stages_without_a_shared_map_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(config)
    monkeypatch.setattr(Pipeline, "chain", lambda _: SimpleNamespace(filter_all=lambda _, **__: {}))
    with pytest.raises(InputError, match="nothing to score with"):
        pipeline.score([{"id": "q", "text": "a kite"}], [{"id": "d", "text": "an oak"}])


def test_scores_before_a_build_say_what_to_run(config: Config, tmp_path: Path) -> None:
    pipeline = Pipeline(config.model_copy(update={"workspace": tmp_path}))
    with pytest.raises(InputError, match="is not tokenized; run `msif run CONFIG` first"):
        pipeline.score([{"id": "q", "text": "a kite"}], [{"id": "d", "text": "an oak"}])


@pytest.mark.parametrize("rank", [None, 4])
def test_a_group_of_maps_that_all_drop_out_adds_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    """As of a new head, which the budget leaves in a group of its own."""
    roomy, tight = (with_budget(config, budget) for budget in (8.0, 2e-5))
    queries, chain = roomy.held_out(), roomy.chain()
    assert queries is not None
    documents = corpus.read_shard(roomy.shards("pretrain")[0]).take(range(4))
    dropped = {group[0].name for _, group in scoring.query_groups(tight.maps(tight.last), len(queries), 2e-5)}

    def filter_all(gradients: Any, **options: Any) -> Any:
        return {name: V for name, V in chain.filter_all(gradients, **options).items() if name not in dropped}

    def both(pipeline: Pipeline) -> Any:
        if rank is None:
            return pipeline.both_scores(queries, documents)
        return pipeline.cut_both_scores(queries, documents, rank)[0]

    monkeypatch.setattr(Pipeline, "chain", lambda _: SimpleNamespace(filter_all=filter_all))
    assert any(not filter_all(dict(some)) for _, some in tight.query_gradients(queries, rotated=False))
    np.testing.assert_allclose(both(tight), both(roomy), rtol=1e-4, atol=1e-4)
    dropped |= {m.name for m in roomy.maps("pretrain")}
    with pytest.raises(InputError, match="nothing to score with"):
        both(roomy)


def test_steps_without_a_pass_load_no_model(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, stage, loaded = Pipeline.from_config(project), "pretrain", []
    original = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **named: loaded.append(a) or original(*a, **named))
    pipeline.tokenize(stage)
    assert not loaded
    pipeline.covariance_part(stage, 0)
    passes = len(loaded)
    pipeline.eigenbasis_part(stage, 0)
    assert len(loaded) == passes > 0
    pipeline.eigenvalue_part(stage, 0)
    passes = len(loaded)
    pipeline.combine_eigenvalues(stage)
    assert pipeline.fitted(stage)
    assert len(loaded) == passes


def test_a_query_may_be_as_long_as_the_model_reads(project: Path) -> None:
    short = change(project, corpus={"max_length": 8})
    query = {"id": "q", "prompt": "What is kite?\n", "completion": "A kite, a kite."}
    (ids,) = short.read_queries([query]).sequences.input_ids
    assert 8 < len(ids) <= 24
    with pytest.raises(InputError, match="query 'q' does not fit one window of 24 tokens"):
        short.read_queries([{**query, "completion": "A kite. " * 9}])


def test_windows_longer_than_the_model_reads_are_refused(project: Path) -> None:
    with pytest.raises(InputError, match=r"corpus.max_length is 25, but the model of stage 'pretrain' has 24 position"):
        change(project, corpus={"max_length": 25}).tokenize("pretrain")


def test_other_windows_make_other_factors(project: Path) -> None:
    recipes = [change(project, corpus={"max_length": length}).recipe("pretrain") for length in (8, 9)]
    assert recipes[0] != recipes[1]


def test_a_device_that_is_not_there_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=r"compute\.device is cuda, but torch finds no CUDA here; set it to auto or cpu"
    ):
        _ = change(project, compute={"device": "cuda"}).device


def test_an_answer_has_one_document_at_least(config: Config) -> None:
    with pytest.raises(InputError, match="top_k is -3; ask for one document at least"):
        Pipeline(config).attribute([{"id": "q", "prompt": "What is kite?\n", "completion": "A kite."}], top_k=-3)


def test_damaged_factors_are_named_and_fitted_again(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    generation = pipeline.run()
    kept = ["query_id", "document_id", "score"]
    before = pipeline.attribute(asked(project)).table.select(kept)
    folder = pipeline.factors_folder("pretrain")
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink):
        damaged = sorted(folder.glob("*.eigenvalues.safetensors"))[0]
        damage(damaged)
        mend = rf"{re.escape(str(damaged))}: .*; delete the folder {re.escape(str(folder))} and run `msif run CONFIG`"
        with pytest.raises(InputError, match=mend):
            pipeline.attribute(asked(project))
        shutil.rmtree(folder)
        assert pipeline.run() == generation
        assert pipeline.attribute(asked(project)).table.select(kept).equals(before)


def test_a_document_that_breaks_is_quarantined_and_the_rest_goes_on(tmp_path: Path) -> None:
    config = Config.load(write_project(tmp_path))
    documents = tmp_path / "documents.jsonl"
    documents.write_text(documents.read_text() + json.dumps({"id": "broken", "text": "A kite of oak: ~~"}) + "\n")
    pipeline = Pipeline(config)
    tilde = pipeline.tokenizer("pretrain")("~")["input_ids"][0]
    weights = tmp_path / "pretrain" / "model.safetensors"
    tensors = load_file(weights)
    (name,) = (key for key in tensors if "embed_in" in key)
    tensors[name][tilde] = torch.nan
    save_file(tensors, weights, {"format": "pt"})

    pipeline = Pipeline(config)
    generation = storage.read_json(pipeline.run() / "manifest.json")
    assert generation["recall"]["found"][0]["recall"] > 0
    found = catalog.query(pipeline.workspace.root, "SELECT DISTINCT document_id, reason FROM quarantine")
    assert found.to_pylist() == [{"document_id": "broken", "reason": "the gradient is not finite"}]
    answer = pipeline.attribute([{"id": "q", "prompt": "", "completion": "A kite of oak: "}])
    assert "broken" not in answer.table["document_id"].to_pylist()
    assert np.isfinite(answer.table["score"].to_numpy()).all()

    documents.write_text("".join(documents.read_text().splitlines(keepends=True)[:-1]))
    pipeline.unpin()
    pipeline.run()
    assert catalog.query(pipeline.workspace.root, "SELECT * FROM quarantine").num_rows == 0
    prune(pipeline.workspace, keep=1, grace_seconds=0)
    assert not list(pipeline.workspace.root.rglob("quarantine-fit-*"))
