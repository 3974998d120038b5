"""evaluate: influence, gradient dot product and BM25 side by side on the held-out queries."""

from typing import Any

from prefect import flow

from flows.parameters import Configuration, TailPatchRate
from msif_core.errors import InputError
from tasks import evaluation, turns

TAIL_PATCH_RATE = 0.02
"""Learning rate of the tail-patch step: small enough that random documents hardly move the loss."""


@flow(name="evaluate", flow_run_name="evaluate {config.workspace.name}")
def evaluate(config: Configuration, tail_patch_rate: TailPatchRate = TAIL_PATCH_RATE) -> dict[str, Any]:
    """Influence beside gradient dot product and BM25 on the held-out queries: fact tracing, and the tail-patch."""
    if config.queries is None:
        raise InputError("`msif evaluate` needs held-out queries: set `queries` to a jsonl file with gold_doc_ids")
    with turns.ahead(config):
        return evaluation.compare_methods(config, tail_patch_rate)
