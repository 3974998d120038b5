"""fit-ekfac: covariances, eigenbases, corrected eigenvalues, for every stage that lacks them."""

from prefect import flow, unmapped

from flows.runners import in_turn, resources
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tasks import curvature


@flow(name="fit-ekfac", flow_run_name="fit {config.workspace}")
def fit_ekfac(config: Config) -> None:
    """Fit every stage's factors: two passes over the parts of the sample, each added up in part order."""
    for stage in (stage.name for stage in config.stages):
        if not Pipeline(config).fitted(stage):
            fit_stage(config, stage)
        Pipeline(config).remove_sums(stage)


def fit_stage(config: Config, stage: str) -> None:
    """Both passes over the parts of the sample."""
    parts = in_turn(config, len(Pipeline(config).fit_parts(stage)))
    with resources(config):
        curvature.covariance_part.map(unmapped(config), unmapped(stage), parts).result()
    curvature.combine_covariances(config, stage)
    with resources(config):
        curvature.eigenvalue_part.map(unmapped(config), unmapped(stage), parts).result()
    curvature.combine_eigenvalues(config, stage)
