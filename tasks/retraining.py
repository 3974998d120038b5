"""Ground truth: one task a training."""

from pathlib import Path
from typing import Any

from prefect import task

from msif_core.config import Config
from msif_core.evaluation.retraining import Retraining, Run
from tasks import ACCELERATOR, IO, MODEL


@task(task_run_name="prepare-retraining", **IO)
def prepare(config: Config) -> Path:
    """Write the pool, the masks and the tokenizer that all trainings share."""
    return Retraining(config).prepare()


@task(task_run_name="retrain-{run.name}", tags=[ACCELERATOR], **IO)
def retrain(config: Config, run: Run) -> Path:
    """Train all stages on one subset and write the queries' losses."""
    with MODEL:
        return Retraining(config).train(run)


@task(task_run_name="retrain-whole-pool", tags=[ACCELERATOR], **IO)
def reference(config: Config) -> dict[str, Any]:
    """Train the models whose scores are judged; returns their configuration."""
    with MODEL:
        return Retraining(config).reference().model_dump(mode="json")
