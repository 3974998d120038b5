"""build-index: from documents to a published generation."""

from pathlib import Path
from typing import Any

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from flows.fit_ekfac import fit_ekfac
from flows.tokenize_corpus import tokenize_corpus
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import index, publish


@flow(name="build-index", flow_run_name="index {config.workspace}")
def build_index(config: Config) -> Path:
    """Tokenize, fit what is not fitted, sketch the shards, measure recall, publish. Idempotent."""
    runner: Any = ThreadPoolTaskRunner(max_workers=config.compute.workers)
    tokenize_corpus(config)
    fit_ekfac.with_options(task_runner=runner)(config)
    return sketch_and_publish.with_options(task_runner=runner)(config)


@flow(name="sketch-and-publish", flow_run_name="sketch {config.workspace}")
def sketch_and_publish(config: Config) -> Path:
    """Codes of every shard, exact scores of the held-out queries, one atomic publish."""
    pipeline = Pipeline(config)
    index.train_index(config)
    index.index_shard.map(unmapped(config), range(len(pipeline.shards(pipeline.target)))).result()
    if pipeline.held_out() is not None:
        index.exact_shard.map(unmapped(config), pipeline.recall_shards()).result()
    generation = index.publish_generation(config)
    publish.publish_catalog(config)
    return generation
