"""build-index: from documents to a published generation."""

from pathlib import Path

from prefect import flow, unmapped

from flows.fit_ekfac import fit_ekfac
from flows.runners import helpers, in_turn, resources, task_runner
from flows.tokenize_corpus import tokenize_corpus
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import index, publish


@flow(name="build-index", flow_run_name="index {config.workspace}")
def build_index(config: Config) -> Path:
    """Tokenize, fit what is not fitted, sketch the shards, measure recall, publish. Idempotent."""
    tokenize_corpus(config)
    with helpers(config):
        fit_ekfac.with_options(task_runner=task_runner(config))(config)
        return sketch_and_publish.with_options(task_runner=task_runner(config))(config)


@flow(name="sketch-and-publish", flow_run_name="sketch {config.workspace}")
def sketch_and_publish(config: Config) -> Path:
    """Codes of every shard, exact scores of the held-out queries, one atomic publish."""
    sketch_shards(config)
    generation = index.publish_generation(config)
    publish.publish_catalog(config)
    return generation


def sketch_shards(config: Config) -> None:
    """What workers can share: codes of every shard, and exact scores of the held-out queries."""
    pipeline = Pipeline(config)
    index.train_index(config)
    with resources(config):
        index.index_shard.map(unmapped(config), in_turn(config, len(pipeline.shards(pipeline.target)))).result()
        if pipeline.held_out() is not None:
            index.exact_shard.map(unmapped(config), pipeline.recall_shards()).result()
