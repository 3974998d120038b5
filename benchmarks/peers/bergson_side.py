"""bergson's side: EK-FAC fit, the steps to scores, and index building. Runs in its own environment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bergson.build import build, build_query
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.distributed import launch_distributed_run
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.score.score import score_dataset
from datasets import Dataset

from benchmarks.peers.protocol import Case, Step, serve

PROJECTION = 16
"""Side of each map's projected gradient in the index: the library's default for its projected pipelines."""


def prepare(case: Case) -> Mapping[str, Step]:
    """The steps of bergson."""
    settings, scratch = case.settings, case.scratch("bergson_side")
    for name in ("train", "query"):
        tokens = case.tokens(name)
        rows = {"input_ids": tokens.tolist(), "labels": tokens.tolist(), "length": [tokens.shape[1]] * len(tokens)}
        Dataset.from_dict(rows).save_to_disk(str(scratch / f"data-{name}"))

    def config(run: str, data: str = "train", projection: int = 0) -> IndexConfig:
        """A step's configuration; its folder is emptied, so that the step runs."""
        for path in (scratch / run, scratch / f"{run}.part"):
            shutil.rmtree(path, ignore_errors=True)
        made = IndexConfig(
            str(scratch / run), model=case.model, data=DataConfig(dataset=str(scratch / f"data-{data}")),
            precision="fp32", token_batch_size=settings["batch"] * case.tokens("train").shape[1], include_bias=True,
            loss_reduction="sum", projection_dim=projection, overwrite=True,
        )  # fmt: skip
        made.partial_run_path.mkdir(parents=True, exist_ok=True)
        return made

    def fit() -> None:
        approximate_hessians(config("kfac"), HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True))

    def scores() -> np.ndarray:
        query = config("query")
        build_query(query, QuerySetConfig(dataset=str(scratch / "data-query")), PreprocessConfig())
        applied = scratch / "applied"
        shutil.rmtree(applied, ignore_errors=True)
        launch_distributed_run(
            "apply_hessian", apply_worker,
            [
                EkfacConfig(str(scratch / "kfac"), str(scratch / "query"), str(applied), ev_correction=True,
                            apply_batch_size=settings["batch"]),
                InversionConfig(damping_factor=settings["damping"]),
            ],
            query.distributed,
        )  # fmt: skip
        score_dataset(config("scores"), ScoreConfig(query_path=str(applied)), PreprocessConfig())
        return (
            np.asarray(load_scores(Path(scratch / "scores"))[:], dtype=np.float32)
            .reshape(len(case.tokens("train")), -1)
            .T
        )

    def index(projection: int) -> None:
        build(config("index", projection=projection), PreprocessConfig())

    steps: dict[str, Any] = {
        "fit": fit, "scores": scores, "index": lambda: index(PROJECTION),
        "index, full gradients": lambda: index(0),
    }  # fmt: skip
    return steps


if __name__ == "__main__":
    serve(prepare)
