"""Queries to stored answers."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from msif_core.attribution import Attribution
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, IO, progress, summary


@task(task_run_name="answer queries", tags=[ACCELERATOR], **IO)
def answer(config: Config, queries: Path | list[dict[str, Any]], top_k: int) -> Path:
    """Candidates, exact re-rank, stored attribution."""
    with progress.whole("answer the queries"):
        return Pipeline(config).attribute(queries, top_k).folder


@task(task_run_name="write page", **IO)
def write_page(run: Path) -> Path:
    """The attribution as one HTML page; its best documents become a summary in the UI."""
    found = Attribution.open(run)
    path = found.to_html(run / "page.html")
    create_markdown_artifact(
        key="attribution",
        markdown=summary.attribution(found, path),
        description="The strongest documents",
    )
    return path
