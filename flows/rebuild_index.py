"""rebuild-index: the periodic job; new and changed documents come in, deleted ones leave."""

from pathlib import Path

from prefect import flow

from flows.build_index import build_index
from flows.parameters import Configuration, Refit
from msif_core.pipeline import Pipeline


@flow(name="rebuild-index", flow_run_name="rebuild {config.workspace.name}")
def rebuild_index(config: Configuration, refit: Refit = False) -> Path:
    """Bring the index up to date with the documents: only what is new or changed is sketched.

    The factors stay pinned by the last full build; "fit anew" (or another model) makes a full build.
    """
    if refit:
        Pipeline(config).unpin()
    return build_index(config)
