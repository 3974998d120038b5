"""What deployments/ names exists, and the forms' parameters do what they say; the container files are only parsed."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from typer.testing import CliRunner

from flows import cli
from flows.attribute import gather, typed, with_retrieval
from flows.rebuild_index import covers
from flows.serve import alone, check_cron, deployments
from flows.show_settings import markdown
from msif_core.config import Config, Query
from msif_core.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "deployments" / "configs" / "demo.yaml"


def parse(name: str) -> Any:
    return yaml.safe_load((ROOT / "deployments" / name).read_text(encoding="utf-8"))


def test_the_same_deployments_for_a_pool_and_for_serve() -> None:
    entries = [entry for entry in parse("prefect.yaml")["deployments"] if "parameters" in entry]
    served = deployments(CONFIG, "demo", "0 3 * * *")
    assert len(entries) == len(served)
    for entry, deployment in zip(entries, served, strict=True):
        module, function = entry["entrypoint"].split(":")
        assert (ROOT / module).exists()
        assert getattr(importlib.import_module(module.removesuffix(".py").replace("/", ".")), function)
        assert entry["work_pool"]["name"] in ("cpu", "gpu")
        assert deployment.tags == entry["tags"]
        assert deployment.concurrency_limit == 1
        assert bool(deployment.schedules) == ("schedules" in entry)
    assert not any(deployment.schedules for deployment in deployments(CONFIG, "demo"))


def test_a_workspace_may_have_any_name() -> None:
    name = cli.deployment_name(Path("runs/ws [v1] 100%#1?x*y & <z>"))
    assert {made.name for made in deployments(CONFIG, name)} == {"ws [v1] 100-#1?x-y - -z-"}


def test_a_path_may_hold_what_means_something_in_yaml() -> None:
    path = Path('/data/a "quoted" one: #1/config.yaml')
    assert [d.parameters for d in deployments(path, "demo")] == [{"config": str(path)}] * len(
        deployments(CONFIG, "demo")
    )


def test_a_wrong_schedule_is_refused() -> None:
    check_cron("0 3 * * *")
    for cron in ("every night", ""):
        with pytest.raises(InputError, match=f"--cron '{cron}': not a schedule; expected five fields"):
            check_cron(cron)


def test_a_workspace_is_served_once_at_a_time(tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(InputError, match=r"another `msif serve` serves this workspace; stop it first"),
        alone(tmp_path),
    ):
        pass
    with alone(tmp_path):
        pass


def test_the_compose_file_starts_what_there_is() -> None:
    services = parse("compose.yaml")["services"]
    assert services["database"]["image"].startswith("docker.io/library/postgres:")
    pools = {re.search(r"--pool (\w+)", s.get("command", "")) for s in services.values()} - {None}
    used = {entry["work_pool"]["name"] for entry in parse("prefect.yaml")["deployments"]}
    assert {match.group(1) for match in pools if match} == used
    assert (ROOT / services["setup"]["command"].split()[1]).exists()
    wanted = set(re.findall(r"\{\{ \$(\w+) \}\}", (ROOT / "deployments" / "prefect.yaml").read_text()))
    assert wanted <= set(services["setup"]["environment"])
    for line in (ROOT / "deployments" / "Containerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line


def test_a_parameter_is_a_path_or_a_configuration() -> None:
    from flows.fit_ekfac import fit_ekfac

    for given in (str(CONFIG), CONFIG, Config.load(CONFIG)):
        assert fit_ekfac.validate_parameters({"config": given})["config"] == Config.load(CONFIG)
    with pytest.raises(Exception, match=r"nowhere\.yaml: no such configuration file"):
        fit_ekfac.validate_parameters({"config": "nowhere.yaml"})


def test_a_rebuild_stands_in_for_those_that_ask_for_no_more() -> None:
    def run(**parameters: Any) -> FlowRun:
        return FlowRun(flow_id=uuid4(), parameters={"config": "c.yaml", **parameters})

    plain, refit = run(), run(refit=True)
    assert covers(plain, run(refit=False))
    assert covers(refit, plain)
    assert covers(refit, refit)
    assert not covers(plain, refit)
    assert not covers(plain, run(config="other.yaml"))


def test_queries_are_typed_or_a_file() -> None:
    asked = [Query(prompt="a", completion="b", source="x"), Query(id="own", prompt="c")]
    assert gather(asked, "") == [
        {"id": "query-1", "prompt": "a", "completion": "b", "source": "x"},
        {"id": "own", "prompt": "c"},
    ]
    assert gather([], "q.jsonl") == Path("q.jsonl")
    with pytest.raises(InputError, match="choose one of them"):
        gather(asked, "q.jsonl")
    with pytest.raises(InputError, match="nothing to explain: type a prompt"):
        gather([], "")


def test_an_answer_needs_its_prompt() -> None:
    assert typed("", "", "") == []
    assert typed("What?", "", "")[0].completion is None
    for completion, contrast in (("This.", ""), ("", "That.")):
        with pytest.raises(InputError, match="is given without a prompt; type the prompt, or clear them"):
            typed("", completion, contrast)


def test_a_form_overrides_the_configuration() -> None:
    config = Config.load(CONFIG)
    assert with_retrieval(config, 0, "as configured") == config
    changed = with_retrieval(config, 3, "bm25").retrieval
    assert (changed.top_k, changed.candidates) == (3, "bm25")


def test_documented_commands_exist() -> None:
    """Every `msif ... --option` in docs/operations.md is a command with that option."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    lines = re.findall(r"msif (sql|serve|prune|run|attribute)\b([^\n`#|]*)", text)
    assert len(lines) > 6
    for command, rest in lines:
        shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, (command, option)
    ready = re.findall(r"--ready (\w+)", text)
    assert set(ready) <= {path.stem for path in (ROOT / "sql").glob("*.sql")}


def test_documented_settings_are_those_of_the_code() -> None:
    """docs/settings.md is what `msif settings` prints, and no setting is without a word."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == markdown()
    assert not re.findall(r"\|  \|$", markdown(), re.MULTILINE)


def test_descriptions_are_short_enough_to_read() -> None:
    from flows.serve import deployments as served

    for deployment in served(CONFIG, "demo"):
        first = inspect.cleandoc(deployment.description or "").splitlines()[0]
        assert 20 < len(first) <= 120
