"""`msif serve`: its deployments on a real server, and an attribution started, watched and read in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from msif_core import storage
from msif_core.pipeline import Pipeline
from tests.e2e.browser import Page, button, chromium
from tests.e2e.serving import TERMINAL, Api, process, wait_for
from tests.tiny_project import write_project


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_project(tmp_path_factory.mktemp("project"))
    Pipeline.from_config(path).run()
    return path


@pytest.fixture(scope="module")
def api(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with process(log, "msif", "serve", config, "--cron", "0 3 * * *"):
        wait_for(lambda: "trigger any of these" in log.read_text(), log=log)
        address = re.search(r"Prefect: (http://[\d.:]+)", log.read_text())
        assert address
        yield Api(address.group(1))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def screenshots(request: pytest.FixtureRequest) -> Path:
    """Kept as the tests' output, in a folder that git does not track."""
    folder = request.config.rootpath / ".pytest_cache" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def field(title: str) -> str:
    """JavaScript that finds the box under a title of the form."""
    return (
        "[...document.querySelectorAll('.schema-form-property')].find(e => e.querySelector("
        f"'.schema-form-property__label')?.innerText.startsWith({json.dumps(title)}))?.querySelector('textarea, input')"
    )


def row_link(text: str) -> str:
    """JavaScript that finds the link of a table's row by a word in the row."""
    return (
        f"[...document.querySelectorAll('tr')].find(r => r.innerText.includes({json.dumps(text)}))?.querySelector('a')"
    )


def test_deployments_are_forms_with_limits_and_triggers(api: Api, config: Path) -> None:
    found = {d["name"] + ":" + d["entrypoint"].split(".")[-1]: d for d in api("/deployments/filter", {})}
    flows = {"attribute", "rebuild_index", "fit_ekfac", "evaluate", "tokenize_corpus"}
    assert set(found) == {f"workspace:{flow}" for flow in flows}
    for deployment in found.values():
        schema = deployment["parameter_openapi_schema"]
        assert deployment["parameters"] == {"config": str(config)}
        assert schema["required"] == ["config"], "nothing else has to be filled in"
        assert schema["properties"]["config"]["type"] == "string"
        assert all(p["title"][0].isupper() and p["description"] for p in schema["properties"].values())
        assert "msif" in deployment["tags"]
        assert deployment["concurrency_options"] is not None
    rebuild = found["workspace:rebuild_index"]
    assert rebuild["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert [s["schedule"]["cron"] for s in rebuild["schedules"]] == ["0 3 * * *"]
    automations = {a["name"]: a for a in api("/automations/filter", {})}
    assert set(automations) == {"msif zombies", "re-index workspace"}
    assert automations["re-index workspace"]["actions"][0]["deployment_id"] == rebuild["id"]
    limit = api("/concurrency_limits/tag/accelerator")
    assert limit["concurrency_limit"] >= 1


def test_an_attribution_from_the_form_to_its_artifact(api: Api, page: Page, config: Path, screenshots: Path) -> None:
    page.open(f"{api.url}/deployments")
    page.wait_text("rebuild-index")
    page.screenshot(screenshots / "1-deployments.png")
    page.click(row_link("attribute"))
    page.click(button("Run"))
    page.click(button("Custom run"))
    page.wait_text("Another answer: explain why")
    page.click(field("Prompt"))
    page.write("What is plum?\n")
    page.click(field("Completion"))
    page.write("A plum.")
    page.screenshot(screenshots / "2-form.png")
    page.click(button("Submit"))
    page.wait_text("View run")

    [run] = api.finished("attribute")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["name"] == "attribute workspace: What is plum?"
    page.open(f"{api.url}/runs/flow-run/{run['id']}")
    page.wait_text("Completed")
    page.wait_text("write page")
    page.screenshot(screenshots / "3-run.png")
    page.click(button("Artifacts"))
    page.click("document.querySelector('a[href*=\"/artifacts/\"]')")
    page.wait_text("What is plum? → A plum.")
    page.screenshot(screenshots / "4-artifact.png")
    stored = sorted((config.parent / "workspace" / "attributions").iterdir())[-1]
    assert stored.name in page.text()
    assert "plum: a thing called plum" in page.text()
    link = page.value("[...document.querySelectorAll('a')].find(a => a.innerText === 'page.html').href")
    assert link == (stored / "page.html").as_uri()
    assert (stored / "page.html").exists()


def test_a_failure_says_what_to_do(api: Api, page: Page, screenshots: Path) -> None:
    [deployment] = [d for d in api("/deployments/filter", {}) if d["entrypoint"].endswith(".attribute")]
    page.open(f"{api.url}/deployments/deployment/{deployment['id']}")
    page.click(button("Run"))
    page.click(button("Custom run"))
    page.wait_text("Another answer: explain why")
    page.click(button("Submit"))
    run = api.finished("attribute", 2)[-1]
    assert run["state_type"] == "FAILED"
    assert (
        "nothing to explain: type a prompt, add queries, or name a file of queries (jsonl)" in run["state"]["message"]
    )
    page.open(f"{api.url}/runs/flow-run/{run['id']}")
    page.wait_text("nothing to explain: type a prompt")
    page.screenshot(screenshots / "5-failure.png")


def test_an_event_re_indexes_and_leaves_a_summary(api: Api, page: Page, config: Path, screenshots: Path) -> None:
    documents = config.parent / "documents.jsonl"
    new = {"id": "new", "text": "heron: a thing called heron, made of water."}
    documents.write_text(documents.read_text() + json.dumps(new) + "\n")
    api.emit("msif.corpus.updated", "msif.workspace.workspace")
    wait_for(lambda: [r for r in api.runs("rebuild-index") if r["state_type"] == "COMPLETED"], 180)
    current = (config.parent / "workspace" / "generations" / "CURRENT").read_text().strip()
    manifest = storage.read_json(config.parent / "workspace" / "generations" / current / "manifest.json")
    assert manifest["n_sequences"] == 49
    [artifact] = [a for a in api("/artifacts/filter", {}) if a["key"] == "generation"]
    page.open(f"{api.url}/artifacts/artifact/{artifact['id']}")
    page.wait_text(f"Generation {current}")
    page.wait_text("exact top ten")
    page.screenshot(screenshots / "6-rebuild.png")


def test_of_rebuilds_that_wait_one_does_the_work_of_all(api: Api) -> None:
    [rebuild] = [d for d in api("/deployments/filter", {}) if d["entrypoint"].endswith(".rebuild_index")]
    before = sum(run["state_type"] in TERMINAL for run in api.runs("rebuild-index"))
    asked = {api(f"/deployments/{rebuild['id']}/create_flow_run", {})["id"] for _ in range(3)}
    finished = [run for run in api.finished("rebuild-index", before + 3) if run["id"] in asked]
    assert sorted(run["state_type"] for run in finished) == ["CANCELLED", "CANCELLED", "COMPLETED"]
    [done] = [run for run in finished if run["state_type"] == "COMPLETED"]
    stood_in = {run["state"]["message"] for run in finished if run is not done}
    assert stood_in == {f"{done['name']} began after this was asked for, and does its work"}
    assert [run for run in api.runs("rebuild-index") if run["state_type"] == "SCHEDULED"], "the schedule's later ones"
