"""build-index: from documents to a published generation."""

from pathlib import Path

from prefect import flow, get_run_logger

from flows.changes import what_changed
from flows.fit_ekfac import fit_ekfac
from flows.parameters import Configuration
from flows.runners import helpers, share, task_runner
from flows.tokenize_corpus import tokenize_corpus
from msif_core import generations, storage
from msif_core.pipeline import Pipeline
from tasks import index, publish


@flow(name="build-index", flow_run_name="index {config.workspace.name}")
def build_index(config: Configuration) -> Path:
    """From documents to a published index: tokenize, fit, sketch, measure recall, publish; what stands is kept."""
    tokenize_corpus(config)
    with helpers(config):
        fit_ekfac.with_options(task_runner=task_runner(config))(config)
        return sketch_and_publish.with_options(task_runner=task_runner(config))(config)


@flow(name="sketch-and-publish", flow_run_name="sketch {config.workspace.name}")
def sketch_and_publish(config: Configuration) -> Path:
    """Codes of every shard, exact scores of the held-out queries, one atomic publish."""
    workspace = Pipeline(config).workspace
    before = generations.manifest_of(workspace, workspace.published())
    sketch_shards(config)
    generation = index.publish_generation(config)
    withheld = generations.withheld(generation, config.index)
    headline = what_changed(before, storage.read_json(generation / "manifest.json"), withheld)
    get_run_logger().info(headline)
    publish.summarize(config, generation, headline)
    publish.publish_catalog(config)
    return generation


def sketch_shards(config: Configuration) -> None:
    """What workers can share: codes of every shard, and exact scores of the held-out queries."""
    index.train_index(config)
    pipeline = Pipeline(config)
    unsketched = pipeline.unsketched()
    standing = len(pipeline.shards(pipeline.target)) - len(unsketched)
    get_run_logger().info("codes of %d shards stand, %d are to be sketched", standing, len(unsketched))
    share(config, "sketch", index.index_shard, parts=unsketched)
    share(config, "exact scores", index.exact_shard, parts=pipeline.unscored())
