"""Passes over the ranks of torchrun: the shares of the sequences add up, and FSDP changes no result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from msif_core import models, sharded
from msif_core.config import Config, CurvatureSettings
from msif_core.curvature import fit
from msif_core.curvature.filters import Damped
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.conftest import make_model, make_sequences
from tests.tiny_project import write_project


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (6, 3), (1, 2)])
def test_shares_add_up_and_cut_the_same_batches(count: int, ranks: int) -> None:
    model = make_model("gpt_neox")
    maps = models.tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(count)
    options = {"task": "causal_lm", "seed": 3, "batch_tokens": 16}
    whole = fit.covariance_sums(model, maps, sequences, **options)  # type: ignore[arg-type]
    shares = [sharded.share(sequences, rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(ids) for ids in part.input_ids) for part, _ in shares}) == 1
    assert sorted(row for _, rows in shares for row in rows if row >= 0) == list(range(count))
    parts = [fit.covariance_sums(model, maps, part, **options) for part, _ in shares]  # type: ignore[arg-type]
    for name, expected in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), expected)


def test_a_step_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"workspace": tmp_path, "stages": [{"name": "a", "model": "m", "documents": "d"}], "compute": {"ranks": 2}}
    )
    with pytest.raises(InputError, match="publish_generation: not a step that sharded models run"):
        sharded.run_step(config, "publish_generation")


@pytest.mark.drill
def test_two_ranks_fit_sketch_and_score_as_one_process(tmp_path: Path) -> None:
    settings = json.loads(write_project(tmp_path).read_text())
    one = Config.model_validate(settings | {"workspace": str(tmp_path / "one")})
    two = Config.model_validate(settings | {"workspace": str(tmp_path / "two"), "compute": {"ranks": 2}})
    Pipeline(one).run()
    pipeline = Pipeline(two)
    for stage in (stage.name for stage in two.stages):
        pipeline.tokenize(stage)
        for step, finish in (
            ("covariance_part", pipeline.combine_covariances), ("eigenvalue_part", pipeline.combine_eigenvalues),
        ):  # fmt: skip
            for part in range(len(pipeline.fit_parts(stage))):
                sharded.run_step(two, step, stage, part)
            finish(stage)
    filter_ = Damped(0.1)
    for stage in (stage.name for stage in one.stages):
        a, b = Pipeline(one).factors(stage), pipeline.factors(stage)
        for name in a.maps:
            V = torch.randn(a[name].eigenvalues.shape, generator=torch.Generator().manual_seed(0))
            expected, found = (x[name].apply(V, filter_.passing) for x in (a, b))
            assert float((found - expected).norm() / expected.norm()) < 1e-3, name
    exact = [np.load(sharded.run_step(two, "exact_shard", 0)), np.load(Pipeline(one).exact_shard(0))]
    assert exact[0].shape == exact[1].shape
    assert float(np.corrcoef(exact[0].ravel(), exact[1].ravel())[0, 1]) > 0.9999
    np.testing.assert_allclose(exact[0], exact[1], atol=2e-3 * float(np.abs(exact[1]).max()))
    sharded.run_step(two, "train_index")
    shard = sharded.run_step(two, "index_shard", 0)
    assert shard.stat().st_size == Pipeline(one).index_shard(0).stat().st_size
