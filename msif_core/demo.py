"""Make a configuration's stages from nothing, in order: what `msif demo` starts with.

A small byte-pair tokenizer is trained on the first stage's documents and shared by all; the first stage's
GPT-NeoX is trained from random weights, each later one from the checkpoint before it, all parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msif_core import corpus, records, storage
from msif_core.config import Config, Stage
from msif_core.errors import InputError
from msif_core.training import Architecture, new_model, train_stage, train_tokenizer

VOCABULARY = 2048
ARCHITECTURE = Architecture(hidden=96, layers=4, heads=4, positions=256)

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


def train_stages(
    config: Config,
    progress: Progress = _silent,
    architecture: Architecture = ARCHITECTURE,
    vocabulary: int = VOCABULARY,
) -> list[Path]:
    """Train each stage into the folder that its `model` names; finished checkpoints are kept.

    Args:
        config: every stage needs a `training` recipe and a local folder as `model`.
        progress: called with (stage's name, steps done, steps in all).
        architecture: size of the first stage's model.
        vocabulary: size of the tokenizer.

    Returns:
        The checkpoints' folders, in the order of the stages.

    Raises:
        InputError: a stage has no recipe, or its documents are malformed.
    """
    tokenizer: Any = None
    built: list[Path] = []
    for stage in config.stages:
        if stage.training is None:
            raise InputError(f"stage {stage.name}: no `training` recipe; add one to train it")
        documents = read(config, stage)
        if tokenizer is None:
            tokenizer = train_tokenizer((records.text_of(record) for record in documents), vocabulary)
        window = config.corpus.max_length or architecture.positions
        sequences, _ = corpus.encode_list(documents, tokenizer, window, stage.task, config.corpus.start)
        init = built[-1] if built else new_model(tokenizer, architecture, stage.training.seed)
        name = stage.name

        def report(done: int, total: int, name: str = name) -> None:
            progress(name, done, total)

        built.append(train_stage(init, sequences, Path(stage.model), stage.training, tokenizer, report))
    return built


def read(config: Config, stage: Stage) -> list[records.Record]:
    """The stage's checked records."""
    return list(records.read_records(stage.documents, records.Skipped(), config.corpus.skip_bad_records))


def summary(config: Config) -> list[dict[str, Any]]:
    """One row a stage: steps, sum of learning rates, loss per token over its first and last steps."""
    rows = []
    for stage in config.stages:
        record = storage.read_json(Path(stage.model) / "training.json")
        losses = record["losses"]
        tail = max(1, len(losses) // 20)
        rows.append({
            "stage": stage.name, "sequences": record["sequences"], "steps": record["steps"],
            "learning_rate_sum": record["learning_rate_sum"],
            "first_loss": sum(losses[:tail]) / tail, "last_loss": sum(losses[-tail:]) / tail,
        })  # fmt: skip
    return rows
