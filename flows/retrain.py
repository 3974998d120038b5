"""retrain: the ground truth that scores are held against."""

from pathlib import Path
from typing import Any

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from msif_core.config import Config
from msif_core.evaluation.retraining import Retraining
from tasks import retraining


@flow(name="retrain", flow_run_name="retrain {config.workspace}")
def retrain(config: Config) -> Path:
    """Train every stage on each random subset of the pool; trainings that have their file are kept."""
    runner: Any = ThreadPoolTaskRunner(max_workers=1)
    return train_subsets.with_options(task_runner=runner)(config)


@flow(name="train-subsets", flow_run_name="subsets {config.workspace}")
def train_subsets(config: Config) -> Path:
    """One task a subset and seed."""
    folder = retraining.prepare(config)
    retraining.retrain.map(unmapped(config), Retraining(config).subset_runs()).result()
    return folder
