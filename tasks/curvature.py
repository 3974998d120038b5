"""The EK-FAC fit: two passes over the parts of the sample, eigenbases in between, a sum at the end."""

from pathlib import Path

from prefect import task

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, IO, run_step


@task(task_run_name="covariance-{stage}-{part:05d}", tags=[ACCELERATOR], **IO)
def covariance_part(config: Config, stage: str, part: int, wait: bool) -> list[Path] | None:
    """Covariance sums of one part."""
    return run_step(config, "covariance_part", stage, part, wait=wait)


@task(task_run_name="eigenbases-{stage}-{part:05d}", tags=[ACCELERATOR], **IO)
def eigenbasis_part(config: Config, stage: str, part: int, wait: bool) -> list[Path] | None:
    """Eigenbases of one part's share of the summed covariances."""
    return run_step(config, "eigenbasis_part", stage, part, wait=wait)


@task(task_run_name="eigenvalues-{stage}-{part:05d}", tags=[ACCELERATOR], **IO)
def eigenvalue_part(config: Config, stage: str, part: int, wait: bool) -> list[Path] | None:
    """Squared rotated gradients of one part."""
    return run_step(config, "eigenvalue_part", stage, part, wait=wait)


@task(task_run_name="factors-{stage}", **IO)
def combine_eigenvalues(config: Config, stage: str) -> Path:
    """Finish the stage's factors."""
    return Pipeline(config).combine_eigenvalues(stage)
