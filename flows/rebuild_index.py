"""rebuild-index: the periodic job; new and changed documents come in, deleted ones leave."""

from pathlib import Path

from prefect import flow, get_run_logger

from flows.build_index import build_index
from msif_core.config import Config
from msif_core.pipeline import Pipeline


@flow(name="rebuild-index", flow_run_name="rebuild {config.workspace}")
def rebuild_index(config: Config, refit: bool = False) -> Path:
    """Rebuild with the factors pinned by the last full build; `refit` (or another model) makes a full build."""
    pipeline = Pipeline(config)
    if refit:
        pipeline.unpin()
    before = pipeline.workspace.published()
    folder = build_index(config)
    logger = get_run_logger()
    if folder.name == before:
        logger.info("nothing changed: generation %s stays published", before)
    else:
        logger.info("%s; generation %s replaces %s", pipeline.build_case(before), folder.name, before)
    return folder
