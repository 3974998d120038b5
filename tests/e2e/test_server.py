"""The local server: who stops it, its settings, and turns at the accelerator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task

from flows.server import limit_accelerator, server
from msif_core.config import Config
from tasks import ACCELERATOR, turns
from tests.e2e.serving import Api, environment, wait_for
from tests.tiny_project import write_project

HOLDER = """
import sys
from pathlib import Path
from flows.server import server
with server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""

BUILD = """
import sys, time
from pathlib import Path
from prefect import flow, task
from flows.runners import share
from msif_core.config import Config
from tasks import ACCELERATOR

@task(tags=[ACCELERATOR])
def shard(config, number, wait):
    with open(sys.argv[2], "a") as lines:
        print(number, file=lines)
    time.sleep(0.5)
    return number

@flow
def build(config: Config):
    share(config, "shards", shard, parts=range(16))

build(Config.load(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    loaded = Config.load(write_project(tmp_path_factory.mktemp("project")))
    return loaded.model_copy(update={"compute": loaded.compute.model_copy(update={"workers": 1})})


@pytest.fixture(scope="module")
def url(config: Config) -> Iterator[str]:
    """The address of a server that another process started, and left while this one uses it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(config.workspace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    started = holder.stdout.readline().strip()
    with server(config.workspace) as address:
        assert address == started
        holder.communicate()
        yield address
    assert not (config.workspace / "server" / "server.json").exists(), "the last to leave stops it"
    with pytest.raises(OSError, match="refused"):
        Api(address.removesuffix("/api"))("/health")


def test_it_stays_while_somebody_uses_it_and_has_our_settings(url: str) -> None:
    settings = Api(url.removesuffix("/api"))("/admin/settings")["server"]
    assert settings["services"]["task_run_recorder"]["batch_size"] == 50
    assert settings["services"]["task_run_recorder"]["flush_interval"] == 1
    assert settings["tasks"]["tag_concurrency_slot_wait_seconds"] == 1


def test_an_answer_goes_before_the_next_shard_of_another_process(url: str, config: Config, tmp_path: Path) -> None:
    log, settings, begun = tmp_path / "log", tmp_path / "config.yaml", list[int]()
    settings.write_text(config.model_dump_json())

    @task(tags=[ACCELERATOR])
    def answer() -> None:
        with open(log, "a") as lines:
            lines.write("answer\n")

    @flow
    def ask() -> None:
        with turns.ahead(config):
            begun.append(len(log.read_text().split()))
            answer()

    limit_accelerator(1)
    building = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(settings), str(log)], env=environment(PREFECT_API_URL=url)
    )
    wait_for(lambda: log.exists() and "2" in log.read_text(), seconds=60)
    ask()
    assert building.wait(120) == 0
    order = log.read_text().split()
    assert order.index("answer") <= begun[0] + 1, "at most the shard that was already let in"
    assert [line for line in order if line != "answer"] == [str(number) for number in range(16)]
