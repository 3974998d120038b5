"""Ground truth and judgement: one task a training, then the scores, then the table."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from msif_core.config import Config
from msif_core.evaluation import judgement
from msif_core.evaluation.retraining import Retraining, Run
from tasks import ACCELERATOR, IO


@task(task_run_name="prepare-retraining", **IO)
def prepare(config: Config) -> Path:
    """Write the pool, the masks and the tokenizer that all trainings share."""
    return Retraining(config).prepare()


@task(task_run_name="retrain-{run.name}", tags=[ACCELERATOR], **IO)
def retrain(config: Config, run: Run) -> Path:
    """Train all stages on one subset and write the queries' losses."""
    return Retraining(config).train(run)


@task(task_run_name="score-methods", tags=[ACCELERATOR], **IO)
def score_methods(config: Config) -> Path:
    """Train on the whole pool and score it by every method."""
    return judgement.score_methods(Retraining(config))


@task(task_run_name="judge-methods", tags=[ACCELERATOR])
def judge(config: Config, scores: Path) -> dict[str, Any]:
    """Every method against the ground truth; the table goes to the UI too."""
    result = judgement.judge(Retraining(config), judgement.read_scores(scores))
    create_table_artifact(key="retraining", table=result["metrics"], description="Methods against retraining")
    return result
