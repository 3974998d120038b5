"""Sketches to codes, recall, and the published generation."""

from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from msif_core import generations, storage
from msif_core.config import Config
from tasks import ACCELERATOR, IO, run_step


@task(task_run_name="train-index", tags=[ACCELERATOR], **IO)
def train_index(config: Config) -> Path:
    """Train the empty index on a sample of sketches."""
    return run_step(config, "train_index")


@task(task_run_name="sketch-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def index_shard(config: Config, shard: int) -> Path:
    """Codes of one shard's sequences."""
    return run_step(config, "index_shard", shard)


@task(task_run_name="exact-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def exact_shard(config: Config, shard: int) -> Path:
    """Exact scores of the held-out queries on one shard, the ground truth of recall."""
    return run_step(config, "exact_shard", shard)


@task(task_run_name="publish-generation", **IO)
def publish_generation(config: Config) -> Path:
    """Measure recall and drift, write the generation's manifest, move the pointer; leave a summary in the UI."""
    folder = run_step(config, "publish_generation")
    manifest = storage.read_json(folder / "manifest.json")
    reason = generations.withheld(manifest, config.index)
    if reason is not None:
        get_run_logger().warning(reason)
    description = "The index that was published" if reason is None else "An index that was kept but not published"
    create_markdown_artifact(key="generation", markdown=summary(manifest, reason), description=description)
    return folder


def summary(manifest: dict[str, Any], reason: str | None) -> str:
    """A generation in Markdown: what changed, what that took, recall, drift."""
    size = f"{manifest['n_sequences']:,} sequences, {manifest['index_bytes'] / 1e6:.1f} MB of codes"
    lines = [f"# Generation {manifest['generation']}", f"{size}, described in {manifest['seconds']:,} s.", ""]
    lines += [f"**Not published:** {reason}", ""] if reason else []
    for kind, names in (
        ("documents", ("added", "changed", "removed")),
        ("sequences", ("sketched", "reused", "removed")),
    ):
        counts = [f"{manifest['changes'][kind][name]:,}" for name in names]
        lines += [f"| {kind} | {' | '.join(names)} |", "|---|---|---|---|", f"| | {' | '.join(counts)} |", ""]
    if recall := manifest["recall"].get("recall_at_10"):
        lines += ["| re-scored | recall@10 |", "|---|---|"]
        lines += [f"| {float(share):.1%} | {value:.2f} |" for share, value in recall.items()]
        lines += [""]
    if drift := manifest["drift"]:
        lines += ["| drift of the pinned factors | trace, now / then | difference | noise of the sample |"]
        lines += ["|---|---|---|---|", _drift_row(f"all maps, {drift['sequences']} sequences", drift)]
        worst = sorted(drift["maps"].items(), key=lambda item: item[1]["noise"] - item[1]["difference"])
        lines += [_drift_row(name, values) for name, values in worst[:5]]
    return "\n".join(lines)


def _drift_row(name: str, values: dict[str, float]) -> str:
    return f"| {name} | {values['trace']:.2f} | {values['difference']:.2f} | {values['noise']:.2f} |"
