"""Sketches to codes, recall, and the published generation."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact

from msif_core import storage
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR, IO, MODEL


@task(task_run_name="train-index", tags=[ACCELERATOR], **IO)
def train_index(config: Config) -> Path:
    """Train the empty index on a sample of sketches."""
    with MODEL:
        return Pipeline(config).train_index()


@task(task_run_name="sketch-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def index_shard(config: Config, shard: int) -> Path:
    """Codes of one shard's sequences."""
    with MODEL:
        return Pipeline(config).index_shard(shard)


@task(task_run_name="exact-shard-{shard:05d}", tags=[ACCELERATOR], **IO)
def exact_shard(config: Config, shard: int) -> Path:
    """Exact scores of the held-out queries on one shard, the ground truth of recall."""
    with MODEL:
        return Pipeline(config).exact_shard(shard)


@task(task_run_name="publish-generation", **IO)
def publish_generation(config: Config) -> Path:
    """Measure recall, write the generation's manifest, move the pointer; leave a summary in the UI."""
    folder = Pipeline(config).publish_generation()
    manifest = storage.read_json(folder / "manifest.json")
    recall = manifest["recall"].get("recall_at_10", {})
    rows = [f"| {float(share):.1%} | {value:.2f} |" for share, value in recall.items()]
    create_markdown_artifact(
        key="generation",
        markdown="\n".join(
            [
                f"# Generation {manifest['generation']}",
                f"{manifest['n_sequences']:,} sequences, {manifest['index_bytes'] / 1e6:.1f} MB of codes.",
                "",
                "| re-scored | recall@10 |",
                "|---|---|",
                *rows,
            ]
        ),
        description="The index that was published",
    )
    return folder
