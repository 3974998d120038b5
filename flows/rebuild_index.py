"""rebuild-index: the periodic job; new and changed documents come in, deleted ones leave."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.build_index import build_index
from msif_core import storage
from msif_core.config import Config
from msif_core.pipeline import Pipeline


@flow(name="rebuild-index", flow_run_name="rebuild {config.workspace}")
def rebuild_index(config: Config, refit: bool = False) -> Path:
    """Rebuild with the factors pinned by the last full build; `refit` (or another model) makes a full build."""
    workspace = Pipeline(config).workspace
    before = workspace.published()
    if refit:
        Pipeline(config).unpin()
    folder = build_index(config)
    old = storage.read_json(workspace.generations / before / "manifest.json") if before else None
    get_run_logger().info(what_changed(old, storage.read_json(folder / "manifest.json")))
    return folder


def what_changed(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Which case a rebuild met, and why, from the generations' manifests."""
    if before is None:
        return f"first build: generation {after['generation']}"
    if before["generation"] == after["generation"]:
        return f"nothing changed: generation {after['generation']} stays published"
    refitted = [name for name, factors in after["factors"].items() if before["factors"].get(name) != factors]
    if refitted:
        case = f"full build: the model, the curvature settings or the pin of {', '.join(refitted)} changed"
    elif before["codes_key"] != after["codes_key"]:
        case = "all codes anew: the filter, the sketch or the index kind changed"
    else:
        fresh = len(set(after["codes"]) - set(before["codes"]))
        case = f"incremental: {fresh} of {len(after['codes'])} shards sketched, factors kept"
    return f"{case}; generation {after['generation']} replaces {before['generation']}"
