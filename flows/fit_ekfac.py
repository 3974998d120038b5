"""fit-ekfac: covariances, eigenbases, corrected eigenvalues, for every stage that lacks them."""

from prefect import flow, get_run_logger

from flows.parameters import Configuration
from flows.runners import share
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import curvature


@flow(name="fit-ekfac", flow_run_name="fit {config.workspace.name}")
def fit_ekfac(config: Configuration) -> None:
    """Fit the curvature factors (EK-FAC) of every stage that lacks them: two passes over a sample of its sequences."""
    for stage in (stage.name for stage in config.stages):
        if not Pipeline(config).fitted(stage):
            fit_stage(config, stage)
        Pipeline(config).remove_sums(stage)


def fit_stage(config: Config, stage: str) -> None:
    """Each step over the parts of the sample, then the factors."""
    pipeline = Pipeline(config)
    coverage = pipeline.coverage(stage)
    get_run_logger().info(f"stage {stage}: {coverage.told()}")
    parts = range(len(pipeline.fit_parts(stage)))
    share(config, f"covariance of {stage}", curvature.covariance_part, stage, parts=parts)
    share(config, f"eigenbases of {stage}", curvature.eigenbasis_part, stage, parts=parts)
    share(config, f"eigenvalues of {stage}", curvature.eigenvalue_part, stage, parts=parts)
    curvature.combine_eigenvalues(config, stage)
    for remark in pipeline.remarks(stage, coverage):
        get_run_logger().warning(remark)
