"""Sketches to codes, recall, and the published generation."""

from pathlib import Path

from prefect import get_run_logger, task

from msif_core import generations, storage
from msif_core.config import Config
from tasks import ACCELERATOR, IO, progress, run_step


@task(task_run_name="train-index", tags=[ACCELERATOR], **IO)
def train_index(config: Config) -> Path:
    """Train the empty index on a sample of sketches."""
    with progress.whole("train the index"):
        return run_step(config, "train_index")


@task(task_run_name="sketch-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def index_shard(config: Config, shard: int, wait: bool) -> Path | None:
    """Codes of one shard's sequences."""
    return run_step(config, "index_shard", shard, wait=wait)


@task(task_run_name="exact-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def exact_shard(config: Config, shard: int, wait: bool) -> Path | None:
    """Exact scores of the held-out queries on one shard, the ground truth of recall."""
    return run_step(config, "exact_shard", shard, wait=wait)


@task(task_run_name="publish-generation", **IO)
def publish_generation(config: Config) -> Path:
    """Measure recall and drift, write the generation's manifest, move the pointer."""
    with progress.whole("measure recall and publish"):
        folder: Path = run_step(config, "publish_generation")
    if (reason := generations.withheld(folder, config.index)) is not None:
        get_run_logger().warning(reason)
    recall = storage.read_json(folder / "manifest.json")["recall"]
    if recall.get("verdict") == "chance":
        get_run_logger().warning(recall["told"])
    return folder
