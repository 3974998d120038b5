"""Documents to sequence shards."""

from pathlib import Path

from prefect import get_run_logger, task

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import IO, progress


@task(task_run_name="tokenize-{stage}", **IO)
def tokenize(config: Config, stage: str) -> Path:
    """Write a stage's documents as shards of token sequences."""
    report = progress.step(f"tokenize {stage}")
    report(0, 1)
    pipeline = Pipeline(config, lambda _step, done, total: report(done, total))
    path = pipeline.tokenize(stage)
    report(1, 1)
    skipped = pipeline.corpus_manifest(stage)["skipped"]
    if skipped["count"]:
        get_run_logger().warning("%s: %d records skipped, the first: %s", stage, skipped["count"], skipped["first"])
    return path
