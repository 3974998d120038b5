"""tokenize-corpus: every stage's documents become shards of token sequences."""

from prefect import flow

from flows.parameters import Configuration
from tasks import corpus


@flow(name="tokenize-corpus", flow_run_name="tokenize {config.workspace.name}")
def tokenize_corpus(config: Configuration) -> None:
    """Tokenize the documents of all stages; what already stands is kept."""
    for stage in config.stages:
        corpus.tokenize(config, stage.name)
