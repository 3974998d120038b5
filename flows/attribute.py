"""attribute: queries in, ranked pre-training documents out."""

from pathlib import Path
from typing import Any

from prefect import flow

from msif_core.config import Config
from tasks import attribution, publish


@flow(name="attribute", flow_run_name="attribute {config.workspace}")
def attribute(config: Config, queries: Path | list[dict[str, Any]], top_k: int = 20) -> Path:
    """Answer the queries against the published generation; store, page, and publish to SQL."""
    run = attribution.answer(config, queries, top_k)
    attribution.write_page(run)
    publish.publish_catalog(config)
    return run
