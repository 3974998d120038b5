"""serve: the flows as deployments on the server, run from here when the UI, the schedule or an event asks."""

from typing import Any, cast

from prefect import Flow, serve
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from flows.attribute import attribute
from flows.build_index import build_index
from flows.rebuild_index import rebuild_index
from msif_core.config import Config


def deployments(config: Config, cron: str | None = None) -> list[RunnerDeployment]:
    """One deployment a flow, with the configuration filled in; the rebuild is scheduled by `cron` (UTC)."""
    settings = config.model_dump(mode="json")

    def deploy(flow: Flow[..., Any], schedule: str | None = None) -> RunnerDeployment:
        deployment = flow.to_deployment(
            name=config.workspace.name,
            parameters={"config": settings},
            cron=schedule,
            concurrency_limit=1,
            description=flow.description,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        return cast(RunnerDeployment, deployment)

    return [deploy(build_index), deploy(attribute), deploy(rebuild_index, cron)]


def serve_flows(config: Config, cron: str | None = None) -> None:
    """Register the deployments and run what is asked of them, one at a time, until interrupted."""
    serve(*deployments(config, cron), limit=1)
