"""The EK-FAC fit: two passes over the shards, each followed by a sum."""

from pathlib import Path

from prefect import task

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, IO, MODEL


@task(task_run_name="covariance-{stage}-{shard:05d}", tags=[ACCELERATOR], **IO)
def covariance_shard(config: Config, stage: str, shard: int) -> Path:
    """Covariance sums of one shard."""
    with MODEL:
        return Pipeline(config).covariance_shard(stage, shard)


@task(task_run_name="eigenbases-{stage}", **IO)
def combine_covariances(config: Config, stage: str) -> list[Path]:
    """Add the shards' sums and diagonalise them."""
    return Pipeline(config).combine_covariances(stage)


@task(task_run_name="eigenvalues-{stage}-{shard:05d}", tags=[ACCELERATOR], **IO)
def eigenvalue_shard(config: Config, stage: str, shard: int) -> Path:
    """Squared rotated gradients of one shard."""
    with MODEL:
        return Pipeline(config).eigenvalue_shard(stage, shard)


@task(task_run_name="factors-{stage}", **IO)
def combine_eigenvalues(config: Config, stage: str) -> Path:
    """Finish the stage's factors."""
    return Pipeline(config).combine_eigenvalues(stage)
