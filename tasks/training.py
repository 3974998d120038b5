"""The demo's stages, trained from nothing."""

from collections.abc import Callable
from pathlib import Path

from prefect import task

from msif_core import demo
from msif_core.config import Config
from tasks import ACCELERATOR, progress


@task(task_run_name="train-stages", tags=[ACCELERATOR])
def train_stages(config: Config) -> list[Path]:
    """Train the tokenizer and each stage; finished checkpoints are kept."""
    steps: dict[str, Callable[[int, int], None]] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in steps:
            steps[stage] = progress.step(f"train {stage}")
        steps[stage](done, total)

    return demo.train_stages(config, report)
