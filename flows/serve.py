"""serve: the flows as deployments on the server, run from here when the UI, the schedule or an event asks."""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml
from prefect import Flow, serve
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.types.entrypoint import EntrypointType

DEFINITIONS = Path(__file__).parents[1] / "deployments"


def deployments(config: Path, name: str, cron: str | None = None) -> list[RunnerDeployment]:
    """Those of deployments/prefect.yaml that a person starts, for one configuration; `cron` (UTC) is the rebuild's."""
    text = (DEFINITIONS / "prefect.yaml").read_text(encoding="utf-8")
    values = {"MSIF_NAME": name, "MSIF_CONFIG": str(config.resolve()), "MSIF_CRON": cron or ""}
    for variable, value in values.items():
        text = text.replace(f"{{{{ ${variable} }}}}", value)
    entries = yaml.safe_load(text)["deployments"]
    return [_deployment(entry, cron) for entry in entries if "parameters" in entry]


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
