"""demo: the whole story on the shipped texts."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.attribute import attribute
from flows.build_index import build_index
from flows.evaluate import evaluate
from flows.parameters import Configuration
from msif_core import records
from msif_core.config import Query
from msif_core.errors import InputError
from tasks import training

QUESTIONS = 10


@flow(name="demo", flow_run_name="demo {config.workspace.name}")
def demo(config: Configuration) -> tuple[Path, dict[str, Any]]:
    """Train two stages, fit, index, attribute ten questions, and set the methods side by side."""
    if config.queries is None:
        raise InputError("the demo's configuration needs `queries`")
    training.train_stages(config)
    build_index(config)
    questions = [
        Query(**record) for record in records.read_list(Path(config.queries), records.query_problem_of)[:QUESTIONS]
    ]
    run = attribute(config, queries=questions)
    return run, evaluate(config)
