"""rebuild-index: the periodic job; new and changed documents come in, deleted ones leave."""

from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext

from flows.build_index import build_index
from flows.parameters import Configuration, Refit
from flows.runners import cancel
from msif_core.pipeline import Pipeline


@flow(name="rebuild-index", flow_run_name="rebuild {config.workspace.name}")
def rebuild_index(config: Configuration, refit: Refit = False) -> Path:
    """Bring the index up to date with the documents: only what is new or changed is sketched.

    The factors stay pinned by the last full build; "fit anew" (or another model) makes a full build.
    """
    stand_in_for_waiting()
    if refit:
        Pipeline(config).unpin()
    return build_index(config)


def stand_in_for_waiting() -> None:
    """Cancel the runs of this deployment that are due and ask for no more: this one reads the documents after them."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return
    due = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[context.flow_run.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(context.flow_run.id)
        waiting = [run.id for run in client.read_flow_runs(flow_run_filter=due) if covers(this, run)]
    cancel(waiting, f"{this.name} began after this was asked for, and does its work")
    if waiting:
        get_run_logger().info("does the work of %d runs that waited", len(waiting))


def covers(this: FlowRun, other: FlowRun) -> bool:
    """Whether the configurations are the same, and the factors are fitted anew where the other asks for that."""
    ours, theirs = this.parameters, other.parameters
    return ours.get("config") == theirs.get("config") and ours.get("refit", False) >= theirs.get("refit", False)
