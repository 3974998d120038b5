"""retrain: the ground truth, and every method held against it."""

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture

from msif_core.config import Config
from msif_core.evaluation.judgement import left_out_runs, read_scores
from msif_core.evaluation.retraining import Retraining, Run
from tasks import progress, publish, retraining, turns


@flow(name="retrain", flow_run_name="retrain {config.workspace}")
def retrain(config: Config) -> dict[str, Any]:
    """Train every stage on random subsets, score the pool, leave top documents out. Finished trainings are kept.

    One task a training; then the table, which SQL reads as `metrics` beside `retrained_losses`.
    """
    retraining.prepare(config)
    ground_truth = Retraining(config)
    train(config, "train on subsets", ground_truth.missing(ground_truth.subset_runs()))
    scores = retraining.score_methods(config)
    train(config, "train without the best", ground_truth.missing(left_out_runs(ground_truth, read_scores(scores))))
    result = retraining.judge(config, scores)
    publish.publish_catalog(config)
    return result


def train(config: Config, name: str, runs: Sequence[Run]) -> None:
    """The trainings, one after another."""

    def submit(run: Run) -> PrefectFuture[Any]:
        turns.give_way(config)
        return retraining.retrain.submit(config, run)

    progress.gather(name, submit, runs)
