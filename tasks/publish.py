"""What others read of a build: the catalog that SQL reads, the summary in the UI."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact

from msif_core import storage
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import IO, summary


@task(task_run_name="publish-catalog", **IO)
def publish_catalog(config: Config) -> Path:
    """Build a new DuckDB catalog and move the pointer to it."""
    return Pipeline(config).publish_catalog()


@task(task_run_name="summary", **IO)
def summarize(config: Config, folder: Path, headline: str) -> None:
    """Leave a summary of the generation in `folder` in the UI."""
    published = Pipeline(config).workspace.published() == folder.name
    text = summary.generation(storage.read_json(folder / "manifest.json"), headline, folder, published)
    create_markdown_artifact(key="generation", markdown=text, description="What changed, how much, how good")
