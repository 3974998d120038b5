"""The demo's stages, trained from nothing."""

from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from msif_core import demo
from msif_core.config import Config
from tasks import ACCELERATOR


@task(task_run_name="train-stages", tags=[ACCELERATOR])
def train_stages(config: Config) -> list[Path]:
    """Train the tokenizer and each stage; finished checkpoints are kept."""
    artifact = cast(UUID, create_progress_artifact(progress=0.0, key="training", description="Optimizer steps"))
    shown = 0

    def report(_stage: str, done: int, total: int) -> None:
        nonlocal shown
        if (percent := 100 * done // total) // 10 != shown // 10:
            shown = percent
            update_progress_artifact(artifact_id=artifact, progress=float(percent))

    return demo.train_stages(config, report)
