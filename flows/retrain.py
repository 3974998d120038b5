"""retrain: the ground truth, and every method held against it."""

from typing import Any

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from msif_core.config import Config
from msif_core.evaluation.judgement import left_out_runs, read_scores
from msif_core.evaluation.retraining import Retraining
from tasks import publish, retraining


@flow(name="retrain", flow_run_name="retrain {config.workspace}")
def retrain(config: Config) -> dict[str, Any]:
    """Train every stage on random subsets, score the pool, leave top documents out. Finished trainings are kept."""
    runner: Any = ThreadPoolTaskRunner(max_workers=config.compute.workers)
    return train_and_judge.with_options(task_runner=runner)(config)


@flow(name="train-and-judge", flow_run_name="judge {config.workspace}")
def train_and_judge(config: Config) -> dict[str, Any]:
    """One task a training; then the table, which SQL reads as `metrics` beside `retrained_losses`."""
    retraining.prepare(config)
    ground_truth = Retraining(config)
    retraining.retrain.map(unmapped(config), ground_truth.missing(ground_truth.subset_runs())).result()
    scores = retraining.score_methods(config)
    left_out = left_out_runs(ground_truth, read_scores(scores))
    retraining.retrain.map(unmapped(config), ground_truth.missing(left_out)).result()
    result = retraining.judge(config, scores)
    publish.publish_catalog(config)
    return result
