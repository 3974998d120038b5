"""help-build: a worker of a pool joins in on a build that another run leads."""

from prefect import flow

from flows.build_index import sketch_shards
from flows.fit_ekfac import fit_ekfac
from flows.runners import task_runner
from msif_core.config import Config


@flow(name="help-build", flow_run_name="help {config.workspace}")
def help_build(config: Config) -> None:
    """Fit and sketch what no other process is at; the corpus is tokenized, and publishing is the leader's."""
    fit_ekfac.with_options(task_runner=task_runner(config))(config)
    help_sketch.with_options(task_runner=task_runner(config))(config)


@flow(name="help-sketch", flow_run_name="sketch {config.workspace}")
def help_sketch(config: Config) -> None:
    """Codes and exact scores."""
    sketch_shards(config)
