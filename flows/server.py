"""The Prefect server of a command: the configured one, or a local one with its database in the workspace."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import prefect_defaults
from msif_core import storage
from msif_core.errors import InputError
from tasks import ACCELERATOR

START_TIMEOUT = 180.0
DRAIN_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0


@contextmanager
def server(workspace: Path, keep: bool = False) -> Iterator[str]:
    """Yield the API's address; flows that start inside run against it.

    A configured server (PREFECT_API_URL) is used as it is. Otherwise the workspace's own is used if it answers, or
    started. Whoever is the last to leave stops it, unless one of its users wanted to `keep` it.

    Raises:
        InputError: the configured server does not answer, or the local one does not come up; names its log.
    """
    prefect_defaults()
    if url := PREFECT_API_URL.value():
        if not _answers(url):
            raise InputError(f"PREFECT_API_URL is {url}, where nothing answers; start that server, or unset it")
        yield url
        return
    folder = workspace.resolve() / "server"
    record = folder / "server.json"
    storage.make_folder(folder)
    with open(folder / "users", "ab") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with storage.locked(record):
            running = _running(record) or _start(folder)
            storage.write_json(record, running | {"keep": keep or running.get("keep", False)})
        try:
            with temporary_settings({PREFECT_API_URL: running["url"], PREFECT_HOME: folder}):
                try:
                    yield running["url"]
                finally:
                    _drain()
        finally:
            if _is_last(users):
                _stop(record)


def _is_last(users: BinaryIO) -> bool:
    """Whether nobody else uses the server; nobody begins to, then, before `users` is closed."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _running(record: Path) -> dict[str, Any] | None:
    """The workspace's server if it still answers: url, pid, and whether it is to be kept."""
    if not record.exists():
        return None
    found: dict[str, Any] = storage.read_json(record)
    return found if _healthy(found["url"], seconds=10) else None  # one that is busy answers late


def _start(folder: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    log = folder / "server.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(folder)},
        )
    deadline = time.monotonic() + START_TIMEOUT
    while not _healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process.pid)
            raise InputError(f"the local Prefect server did not start; see {log}")
        time.sleep(0.3)
    return {"url": url, "pid": process.pid}


def _stop(record: Path) -> None:
    """Stop the workspace's server, unless it is to be kept or no longer answers."""
    running = _running(record)
    if running is not None and not running["keep"]:
        _end(running["pid"])
        record.unlink(missing_ok=True)


def _healthy(url: str, seconds: float = 2) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=seconds) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _answers(url: str) -> bool:
    """Whether something is there, whatever it answers: a server may ask for a login first."""
    try:
        urlopen(f"{url}/health", timeout=10).close()
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True


def _drain() -> None:
    """Hand over the logs and events still queued: once the server is gone, this process would retry for a minute."""
    APILogWorker.drain_all(timeout=DRAIN_TIMEOUT, at_exit=False)
    EventsWorker.drain_all(timeout=DRAIN_TIMEOUT, at_exit=False)


def _end(pid: int) -> None:
    """End the server and its children: a polite signal first, then a hard one."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(pid, signum)
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            if _has_ended(pid):
                return
            time.sleep(0.1)


def _has_ended(pid: int) -> bool:
    with suppress(ChildProcessError):  # another process's child: its parent takes note of the end
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def limit_accelerator(limit: int) -> None:
    """Let the server run so many tasks that run a model at a time; a higher limit stays, as others may share it."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            limit = max(limit, client.read_concurrency_limit_by_tag(ACCELERATOR).concurrency_limit)
        client.create_concurrency_limit(tag=ACCELERATOR, concurrency_limit=limit)
