"""Methods side by side on the held-out queries."""

from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from msif_core.config import Config
from msif_core.evaluation.comparison import compare
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, progress


@task(task_run_name="compare-methods", tags=[ACCELERATOR])
def compare_methods(config: Config, learning_rate: float) -> dict[str, Any]:
    """Fact tracing and tail-patch of influence, dot product and BM25; the table goes to the UI too."""
    result = compare(Pipeline(config), learning_rate, progress.step("compare methods"))
    create_table_artifact(key="methods", table=result["methods"], description="Methods side by side")
    return result
