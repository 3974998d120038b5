"""A configured server with work pools: deploy, a worker, a run on demand, the schedule, limits, a killed run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import pytest

from msif_core.pipeline import Pipeline
from tests.e2e.serving import BIN, TERMINAL, Api, environment, process, wait_for
from tests.tiny_project import write_project

pytestmark = pytest.mark.drill
ROOT = Path(__file__).parents[2]
ASKED = '{"prompt": "What is plum?", "completion": "A plum."}'


@dataclass
class Site:
    api: Api
    config: Path
    variables: dict[str, str]

    def prefect(self, *arguments: str, **more: str) -> str:
        done = subprocess.run(
            [str(BIN / "prefect"), "--no-prompt", *arguments], env=environment(**{**self.variables, **more}),
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The procedure of docs/operations.md."""
    folder = tmp_path_factory.mktemp("site")
    config = write_project(folder)
    Pipeline.from_config(config).run()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    api = Api(f"http://127.0.0.1:{port}")
    variables = {
        "PREFECT_API_URL": f"{api.url}/api", "PREFECT_HOME": str(folder / "prefect"), "MSIF_NAME": "tiny",
        "MSIF_CONFIG": str(config), "MSIF_HOME": str(ROOT), "MSIF_CRON": "0 3 * * *",
    }  # fmt: skip
    site = Site(api, config, variables)

    def healthy() -> bool:
        try:
            return bool(api("/health"))
        except (URLError, OSError):
            return False

    log = folder / "server.log"
    with process(log, "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, **variables):
        wait_for(healthy, 180, log)
        path = f"{BIN}:{os.environ['PATH']}"
        for _ in range(2):  # it can be run again
            setup = subprocess.run(
                ["sh", "deployments/setup.sh"], env=environment(**variables, PATH=path), cwd=ROOT,
                capture_output=True, text=True, timeout=280,
            )  # fmt: skip
            assert setup.returncode == 0, setup.stdout + setup.stderr
        worker = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "2")
        with process(folder / "worker.log", *worker, **variables):
            yield site


def test_a_run_on_demand(site: Site) -> None:
    pools = {d["entrypoint"].split(":")[-1]: d["work_pool_name"] for d in site.api("/deployments/filter", {})}
    gpu = dict.fromkeys(("attribute", "rebuild_index", "fit_ekfac", "evaluate", "help_build"), "gpu")
    assert pools == {**gpu, "tokenize_corpus": "cpu"}
    site.prefect("deployment", "run", "attribute/tiny", "--params", ASKED)
    [run] = site.api.finished("attribute", seconds=240)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert "What is plum? → A plum." in site.api.artifact("attribution")


def test_two_rebuilds_never_overlap(site: Site) -> None:
    for _ in range(2):
        site.prefect("deployment", "run", "rebuild-index/tiny", "--param", "refit=true")
    runs = site.api.finished("rebuild-index", 2, 280)
    done = [run for run in runs if run["state_type"] == "COMPLETED"]
    assert done
    assert {run["state_type"] for run in runs} <= {"COMPLETED", "CANCELLED"}, "one may have stood in for the other"
    for first, second in pairwise(sorted(done, key=lambda run: str(run["start_time"]))):
        assert first["end_time"] <= second["start_time"]


def test_the_schedule_fires(site: Site) -> None:
    before = {run["id"] for run in site.api.runs("rebuild-index")}  # those of the nightly schedule go when it changes
    deploy = ("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    site.prefect(*deploy, MSIF_CRON="* * * * *")

    def fired() -> list[str]:
        edge = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        runs = [r for r in site.api.runs("rebuild-index") if r["id"] not in before and r["auto_scheduled"]]
        return [r["id"] for r in runs if r["start_time"] and r["start_time"] < edge]

    try:
        assert wait_for(fired, 240)
    finally:
        site.prefect(*deploy)  # the nightly schedule again


def test_a_killed_run_is_marked_and_can_be_repeated(site: Site) -> None:
    def running() -> list[int]:
        return [
            pid for pid in children() if "flow-run execute" in command_of(pid) or "prefect.engine" in command_of(pid)
        ]

    wait_for(lambda: all(r["state_type"] in (*TERMINAL, "SCHEDULED") for r in site.api.runs("rebuild-index")), 240)
    done = len(site.api.finished("rebuild-index"))
    site.prefect("deployment", "run", "rebuild-index/tiny", "--param", "refit=true")
    wait_for(lambda: any(r["state_type"] == "RUNNING" for r in site.api.runs("rebuild-index")), 120)
    for pid in running():
        os.kill(pid, signal.SIGKILL)
    crashed = site.api.finished("rebuild-index", done + 1, 240)
    assert "CRASHED" in {run["state_type"] for run in crashed}


def children() -> list[int]:
    """All processes below this one."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
