"""Every configuration in deployments/configs as shipped; of the hub's models, small ones of their architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml

from benchmarks import speeches
from msif_core.config import Config
from msif_core.evaluation.retraining import Retraining
from msif_core.pipeline import Pipeline
from msif_core.training import train_tokenizer
from tests.tiny_project import documents, write_records

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "deployments" / "configs").glob("*.yaml"))
OF_THE_HUB = [path for path in SHIPPED if "training:" not in path.read_text()]
GROUND_TRUTHS = [path for path in SHIPPED if "retraining:" in path.read_text()]


def by_name(path: Path) -> str:
    return path.stem


def test_the_demo_reads_what_is_in_the_repository() -> None:
    config = Config.load(ROOT / "deployments" / "configs" / "demo.yaml")
    for source in (config.queries, *(stage.documents for stage in config.stages)):
        assert list(ROOT.glob(str(source))), source


def small_model(name: str, tokenizer: Any) -> Any:
    """Of the architecture of a checkpoint on the hub."""
    torch.manual_seed(len(name))
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if "bloom" in name:
        bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **size)
        return transformers.BloomForCausalLM(bloom)
    neox = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, max_position_embeddings=2048,
        **size,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(neox)


def small(path: Path, folder: Path) -> Config:
    """The configuration with its models and documents replaced, and nothing else but the workspace."""
    settings = yaml.safe_load(path.read_text())
    texts = [str(row["text"]) for row in documents()]
    tokenizer = train_tokenizer(texts, 300)
    lessons: list[dict[str, Any]] = [{"prompt": text[:9], "completion": text[9:]} for text in texts[:20]]
    for stage, rows in zip(settings["stages"], (documents(), lessons), strict=True):
        model = folder / stage["name"]
        small_model(stage["model"], tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)
        source = folder / f"{stage['name']}-documents"
        source.mkdir()
        write_records(source / "train.jsonl", [{"id": str(i)} | row for i, row in enumerate(rows)])
        stage["model"] = str(model)
        stage["documents"] = (
            stage["documents"] | {"dataset": str(source)}
            if isinstance(stage["documents"], dict)
            else f"{source}/*.jsonl"
        )
    settings["workspace"] = str(folder / "workspace")
    (folder / "config.yaml").write_text(json.dumps(settings))
    return Config.load(folder / "config.yaml")


@pytest.mark.parametrize("path", OF_THE_HUB, ids=by_name)
def test_a_configuration_of_the_hubs_models_builds_and_answers(path: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(small(path, tmp_path))
    pipeline.run()
    found = pipeline.attribute([{"id": "q", "prompt": "kite: a", "completion": " thing called kite."}])
    rows = pq.read_table(found.folder / "influences.parquet").to_pylist()
    assert len(rows) >= 10
    assert all(np.isfinite(row["score"]) and row["score"] != 0 for row in rows)


@pytest.mark.drill
@pytest.mark.parametrize("path", GROUND_TRUTHS, ids=by_name)
def test_a_ground_truth_trains_and_reads_its_queries(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeches, "FOLDER", tmp_path / "speeches")
    speeches.main()
    moved = path.read_text().replace("runs/", f"{tmp_path}/")
    retraining = Retraining(Config.model_validate(yaml.safe_load(moved)))
    retraining.prepare()
    run, ids = retraining.subset_runs()[0], retraining.queries.ids
    retraining.train(run)
    assert len(ids) >= 80
    for stage in retraining.config.stages:
        assert np.isfinite(retraining.read_run(run, stage.name, ids)).all()
