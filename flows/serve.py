"""serve: the flows as deployments on the server, run from here when the UI, the schedule or an event asks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml
from prefect import Flow, serve
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.types.entrypoint import EntrypointType

from msif_core import storage
from msif_core.errors import InputError

DEFINITIONS = Path(__file__).parents[1] / "deployments"


def deployments(config: Path, name: str, cron: str | None = None) -> list[RunnerDeployment]:
    """Those of deployments/prefect.yaml that a person starts, for one configuration; `cron` (UTC) is the rebuild's."""
    entries = yaml.safe_load((DEFINITIONS / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    values = {"MSIF_NAME": name, "MSIF_CONFIG": str(config.resolve()), "MSIF_CRON": cron or ""}
    return [_deployment(_filled(entry, values), cron) for entry in entries if "parameters" in entry]


def _filled(part: Any, values: dict[str, str]) -> Any:
    """A part of the parsed file with `{{ $NAME }}` replaced by its value, whatever characters that has."""
    if isinstance(part, dict):
        return {key: _filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, values) for value in part]
    return re.sub(r"\{\{ \$(\w+) \}\}", lambda found: values[found[1]], part) if isinstance(part, str) else part


def _deployment(entry: dict[str, Any], cron: str | None) -> RunnerDeployment:
    module, _, function = entry["entrypoint"].partition(":")
    flow: Flow[..., Any] = getattr(import_module(module.removesuffix(".py").replace("/", ".")), function)
    deployment = flow.to_deployment(
        name=entry["name"],
        parameters=entry["parameters"],
        tags=entry["tags"],
        cron=cron if "schedules" in entry else None,
        triggers=[DeploymentEventTrigger(**trigger) for trigger in entry.get("triggers", [])],
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return cast(RunnerDeployment, deployment)


def check_cron(cron: str) -> None:
    """Refuse what is no schedule, which the server would do once it is up."""
    try:
        CronSchedule(cron=cron)
    except ValueError:
        wanted = "expected five fields such as '0 3 * * *', every day at three (UTC)"
        raise InputError(f"--cron '{cron}': not a schedule; {wanted}") from None


@contextmanager
def alone(workspace: Path) -> Iterator[None]:
    """Serve the workspace within; a second time would replace the deployments and the schedule of the first.

    Raises:
        InputError: another process serves it.
    """
    try:
        with storage.locked(workspace.resolve() / "server" / "serve", wait=False):
            yield
    except storage.BusyError:
        raise InputError(f"{workspace}: another `msif serve` serves this workspace; stop it first") from None


def create_automations() -> None:
    """Create those of deployments/automations.yaml that the server lacks."""
    wanted = yaml.safe_load((DEFINITIONS / "automations.yaml").read_text(encoding="utf-8"))["automations"]
    with get_client(sync_client=True) as client:
        known = {automation.name for automation in client.read_automations()}
    for entry in wanted:
        if entry["name"] not in known:
            Automation.model_validate(entry).create()


def serve_flows(config: Path, name: str, cron: str | None = None, limit: int = 1) -> None:
    """Register the deployments and run what is asked of them, `limit` at a time, until interrupted."""
    create_automations()
    serve(*deployments(config, name, cron), limit=limit)
