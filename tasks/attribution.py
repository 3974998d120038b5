"""Queries to stored answers."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from msif_core.attribution import Attribution
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, IO


@task(task_run_name="answer", tags=[ACCELERATOR], **IO)
def answer(config: Config, queries: Path | list[dict[str, Any]], top_k: int) -> Path:
    """Candidates, exact re-rank, stored attribution; the best documents become a table in the UI."""
    attribution = Pipeline(config).attribute(queries, top_k)
    keys = ("query_id", "rank", "document_id", "score", "percentile", "side")
    best = [{key: row[key] for key in keys} for row in attribution.table.to_pylist() if row["rank"] <= 3]
    create_table_artifact(key="top-documents", table=best, description="The three strongest of each side")
    return attribution.folder


@task(task_run_name="page", **IO)
def write_page(run: Path) -> Path:
    """The attribution as one HTML page."""
    path = run / "page.html"
    Attribution.open(run).to_html(path)
    return path
