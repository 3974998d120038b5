"""evaluate: influence, gradient dot product and BM25 side by side on the held-out queries."""

from typing import Any

from prefect import flow

from msif_core.config import Config
from msif_core.errors import InputError
from tasks import evaluation

TAIL_PATCH_RATE = 0.02
"""Learning rate of the tail-patch step: small enough that random documents hardly move the loss."""


@flow(name="evaluate", flow_run_name="evaluate {config.workspace}")
def evaluate(config: Config, tail_patch_rate: float = TAIL_PATCH_RATE) -> dict[str, Any]:
    """Fact tracing and tail-patch of every method, against the index as it stands."""
    if config.queries is None:
        raise InputError("`msif evaluate` needs held-out queries: set `queries` to a jsonl file with gold_doc_ids")
    return evaluation.compare_methods(config, tail_patch_rate)
