"""The local server: who stops it, its settings, turns at the accelerator, and what it meets on people's machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import local_server
from flows.server import limit_accelerator, server
from msif_core import storage
from msif_core.config import Config
from msif_core.errors import InputError
from tasks import ACCELERATOR, turns
from tests.e2e.serving import Api, environment, process, wait_for
from tests.tiny_project import write_project

ROOT = Path(__file__).parents[2]

HOLDER = """
import signal, sys
from pathlib import Path
from flows import cli, local_server
from flows.server import limit_accelerator, server

signal.signal(signal.SIGTERM, cli._leave)
ports, free_port = list(map(int, sys.argv[2:])), local_server._free_port
local_server._free_port = lambda: ports.pop() if ports else free_port()
with server(Path(sys.argv[1])) as url:
    limit_accelerator(1)
    print(url, flush=True)
    sys.stdin.read()
"""
"""Holds a server until its input ends; the first ports that it finds free are those given."""

MEANT_FOR_OTHERS = {
    "PREFECT_SERVER_API_AUTH_STRING": "user:password",
    "PREFECT_SERVER_API_BASE_PATH": "/elsewhere",
    "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://127.0.0.1:9/none",
    "http_proxy": "http://127.0.0.1:9",
}

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


def hold(workspace: Path, *ports: int, folder: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """A process that holds the workspace's server, called from `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workspace), *map(str, ports)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **variables),
    )  # fmt: skip


class Stranger(BaseHTTPRequestHandler):
    """Another workspace's server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"home": "/elsewhere"}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def stranger() -> Iterator[int]:
    """A port that another program listens at."""
    with HTTPServer(("127.0.0.1", 0), Stranger) as listening:
        Thread(target=listening.serve_forever).start()
        yield listening.server_port
        listening.shutdown()


@pytest.fixture(scope="module")
def url(config: Config, stranger: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that another process started, and left while this one uses it.

    That process was called where nothing is as it should be: with settings for another server, in its environment and
    in a prefect.toml, a proxy that is dead, a Prefect folder that cannot be made, and a free port that was taken.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "prefect.toml").write_text('[server.api]\nauth_string = "user:password"\nbase_path = "/elsewhere"\n')
    (folder / "file").touch()
    holder = hold(config.workspace, stranger, folder=folder, PREFECT_HOME=str(folder / "file/x"), **MEANT_FOR_OTHERS)
    assert holder.stdout is not None
    started = holder.stdout.readline().strip()
    with server(config.workspace) as address:
        assert address == started
        holder.communicate()
        yield address
    assert not (config.workspace / "server" / "server.json").exists(), "the last to leave stops it"
    with pytest.raises(OSError, match="refused"):
        Api(address.removesuffix("/api"))("/health")


@pytest.fixture
def left(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A workspace, and a command that brings its server up and has just written the record."""
    command = hold(tmp_path / "workspace")
    wait_for(lambda: (tmp_path / "workspace" / "server" / "server.json").exists(), seconds=60)
    yield tmp_path / "workspace", command
    command.kill()
    command.communicate()
    local_server.stop(tmp_path / "workspace" / "server")


def test_it_stays_while_somebody_uses_it_and_has_our_settings(url: str) -> None:
    settings = Api(url.removesuffix("/api"))("/admin/settings")["server"]
    assert settings["services"]["task_run_recorder"]["batch_size"] == 50
    assert settings["services"]["task_run_recorder"]["flush_interval"] == 1
    assert settings["tasks"]["tag_concurrency_slot_wait_seconds"] == 1


def test_its_data_are_in_the_workspace(url: str, config: Config, stranger: int) -> None:
    assert (config.workspace / "server" / "prefect.db").exists()
    assert url.startswith("http://127.0.0.1:")
    assert url != f"http://127.0.0.1:{stranger}/api"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_ends_the_server_that_comes_up(
    left: tuple[Path, subprocess.Popen[str]], signum: int
) -> None:
    workspace, command = left
    pid = storage.read_json(workspace / "server" / "server.json")["pid"]
    command.send_signal(signum)
    assert command.wait(60) != 0
    assert not (workspace / "server" / "server.json").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_after_a_kill_the_next_command_uses_the_server_that_came_up_and_stops_it(
    left: tuple[Path, subprocess.Popen[str]],
) -> None:
    workspace, command = left
    started = storage.read_json(workspace / "server" / "server.json")
    command.kill()
    following = hold(workspace)
    assert following.stdout is not None
    assert following.stdout.readline().strip() == started["url"]
    following.communicate()
    assert following.returncode == 0
    assert not (workspace / "server" / "server.json").exists()
    assert not local_server.is_locked(workspace / "server" / "server.log")


def test_a_server_whose_starter_is_killed_before_its_record_stands_never_begins(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shell = subprocess.Popen(["sh", "-c", local_server.BEGIN, "sh", "touch", str(begun)], stdin=subprocess.PIPE)
    shell.communicate()
    assert shell.returncode != 0
    assert not begun.exists()


def test_a_record_whose_number_went_to_another_process_is_stale(tmp_path: Path, stranger: int) -> None:
    (tmp_path / "server.log").touch()
    record = tmp_path / "server.json"
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        storage.write_json(record, {"url": f"http://127.0.0.1:{stranger}/api", "pid": other.pid, "keep": False})
        local_server.stop(tmp_path)
        assert not record.exists()
        assert other.poll() is None
        other.kill()


def test_a_configured_server_wants_its_login(tmp_path: Path) -> None:
    port = local_server._free_port()
    at = f"http://127.0.0.1:{port}"
    variables = {"PREFECT_SERVER_API_AUTH_STRING": "user:password", "PREFECT_HOME": str(tmp_path)}
    log = tmp_path / "server.log"
    with process(log, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), **variables):
        wait_for(lambda: local_server._is_taken(f"{at}/api"), log=log)
        login = "which answers 401 Unauthorized; set PREFECT_API_AUTH_STRING to its user:password"
        path = "which answers 404 Not Found; the address of the API usually ends with /api"
        for address, said, message in (
            (f"{at}/api", None, login),
            (f"{at}/api", "user:other", login),
            (at, "user:password", path),
            (f"{at}/api/elsewhere", "user:password", path),
        ):
            settings = temporary_settings({PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: said})
            with settings, pytest.raises(InputError) as refused, server(tmp_path):
                pass
            assert str(refused.value).startswith(f"PREFECT_API_URL is {address}, {message}")
        with (
            temporary_settings({PREFECT_API_URL: f"{at}/api", PREFECT_API_AUTH_STRING: "user:password"}),
            server(tmp_path) as address,
        ):
            assert address == f"{at}/api"
            limit_accelerator(1)


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
