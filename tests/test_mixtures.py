"""Mixtures of experts through the whole product: fit, index, answer, and what an answer is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msif_core import torchrun
from msif_core.config import ComputeSettings
from msif_core.pipeline import Pipeline
from msif_core.report import charts
from tests.mixture_project import put_mixtures
from tests.tiny_project import column, documents

RANKS = ComputeSettings(ranks=2)
QUERY = {"id": "q", "prompt": "What is kite?\n", "completion": "A kite."}


@pytest.mark.filterwarnings("ignore:stage pretrain", "ignore:stage finetune")
def test_an_answer_by_experts_is_exact_and_adds_up(project: Path) -> None:
    pipeline = put_mixtures(project)
    pipeline.run()
    found = pipeline.attribute([QUERY])
    pipeline.publish_catalog()
    best = found.table.to_pylist()[0]
    documents_asked = [row for row in documents() if row["id"] == best["document_id"]]
    scores = pipeline.score([QUERY], documents_asked)
    assert best["score"] == pytest.approx(float(scores[0, 0]), rel=1e-4)

    names = column(pipeline, "select distinct map from layers", "map")
    maps = {m.name: m for m in pipeline.maps("pretrain")}
    assert {name for name in names if maps[name].expert}, "experts have their part in the score"
    split = column(pipeline, f"select score from layers where document_id = '{best['document_id']}'", "score")
    assert sum(split) == pytest.approx(best["score"], rel=1e-3)
    for side in ("document", "query"):
        where = f"document_id = '{best['document_id']}' and side = '{side}'"
        tokens = column(pipeline, f"select score from tokens where {where}", "score")
        assert sum(tokens) == pytest.approx(best["score"], rel=1e-3)

    pieces = charts.split_name(names[0])
    assert pieces[0] in (0, 1)
    kinds = {charts.split_name(name)[1] for name in names}
    assert "mlp.experts.gate_up_proj" in kinds


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore:stage pretrain", "ignore:stage finetune")
def test_ranks_sum_a_mixture_as_one_process(project: Path) -> None:
    """FSDP gathers the experts' parameters with their layer's; a rank whose tokens miss an expert adds zeros."""
    one = put_mixtures(project)
    two = Pipeline(one.config.model_copy(update={"workspace": project.parent / "two", "compute": RANKS}))
    for pipeline in (one, two):
        pipeline.tokenize("pretrain")
    (found,), (expected,) = (
        torchrun.run_step(two.config, "covariance_part", "pretrain", 0),
        one.covariance_part("pretrain", 0),
    )
    sums, whole = load_file(found), load_file(expected)
    assert set(sums) == set(whole)
    assert any(".experts." in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
