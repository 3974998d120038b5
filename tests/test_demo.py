"""The demo's stages, trained from nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msif_core.config import Config
from msif_core.demo import summary, train_stages
from msif_core.errors import InputError
from msif_core.training import Architecture

WORDS = ("kite", "oak", "loom", "brook", "anvil", "heron")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    documents = [{"id": f"d{i}", "text": f"{word}: a thing called {word}."} for i, word in enumerate(WORDS)]
    lessons = [{"id": f"f{i}", "prompt": f"What is {w}?\n", "completion": f"A {w}."} for i, w in enumerate(WORDS[:4])]
    asked = [
        {"id": "q0", "prompt": "What is anvil?\n", "completion": "An anvil.", "gold_doc_ids": ["d4"]},
        {"id": "q1", "prompt": "What is quartz?\n", "completion": "A quartz.", "gold_doc_ids": []},
    ]
    recipe = {"learning_rate": 5e-3, "epochs": 4, "batch_size": 3}
    return Config.model_validate({
        "workspace": str(tmp_path / "run"),
        "queries": write(tmp_path / "queries.jsonl", asked),
        "corpus": {"max_length": 24},
        "stages": [
            {"name": "pretrain", "model": str(tmp_path / "pretrain"), "training": recipe,
             "documents": write(tmp_path / "documents.jsonl", documents)},
            {"name": "finetune", "model": str(tmp_path / "finetune"), "training": recipe,
             "documents": write(tmp_path / "lessons.jsonl", lessons)},
        ],
    })  # fmt: skip


def test_stages_are_trained_in_order_and_kept(config: Config) -> None:
    size = Architecture(hidden=16, layers=1, heads=2, positions=24)
    steps: list[tuple[str, int, int]] = []
    built = train_stages(config, lambda *step: steps.append(step), size, vocabulary=280)
    assert [path.name for path in built] == ["pretrain", "finetune"]
    assert steps[0] == ("pretrain", 1, 8)
    assert steps[-1] == ("finetune", 8, 8)
    rows = summary(config)
    assert [row["sequences"] for row in rows] == [6, 4]
    assert all(row["last_loss"] < row["first_loss"] for row in rows)

    steps.clear()
    assert train_stages(config, lambda *step: steps.append(step), size, vocabulary=280) == built
    assert steps == [("pretrain", 1, 1), ("finetune", 1, 1)]


def test_a_stage_without_a_recipe_is_named(config: Config) -> None:
    bare = config.stages[0].model_copy(update={"training": None})
    with pytest.raises(InputError, match="stage pretrain: no `training` recipe"):
        train_stages(config.model_copy(update={"stages": (bare, config.stages[1])}))
