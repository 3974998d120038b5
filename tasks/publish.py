"""The catalog that SQL reads."""

from pathlib import Path

from prefect import task

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import IO


@task(task_run_name="publish-catalog", **IO)
def publish_catalog(config: Config) -> Path:
    """Build a new DuckDB catalog and move the pointer to it."""
    return Pipeline(config).publish_catalog()
