"""Documents to sequence shards."""

from pathlib import Path

from prefect import task

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import IO, progress


@task(task_run_name="tokenize-{stage}", **IO)
def tokenize(config: Config, stage: str) -> Path:
    """Write a stage's documents as shards of token sequences."""
    report = progress.step(f"tokenize {stage}")
    report(0, 1)
    path = Pipeline(config, lambda _step, done, total: report(done, total)).tokenize(stage)
    report(1, 1)
    return path
