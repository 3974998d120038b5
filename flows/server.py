"""The Prefect server of a command: the configured one, or a local one with its database in the workspace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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


@contextmanager
def server(workspace: Path, keep: bool = False) -> Iterator[str]:
    """Yield the API's address; flows that start inside run against it.

    A configured server (PREFECT_API_URL) is used as it is. Otherwise the workspace's own is reused if it
    answers, or started; what was started here is stopped at the end unless `keep`.

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
    url, process = _running(record), None
    if url is None:
        url, process = _start(folder, record)
    try:
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}):
            try:
                yield url
            finally:
                _drain()
    finally:
        if process is not None and not keep:
            _stop(process)
            record.unlink(missing_ok=True)


def _running(record: Path) -> str | None:
    """Address of the workspace's server if it still answers."""
    if not record.exists():
        return None
    url = str(storage.read_json(record)["url"])
    return url if _healthy(url) else None


def _start(folder: Path, record: Path) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    folder.mkdir(parents=True, exist_ok=True)
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
            _stop(process)
            raise InputError(f"the local Prefect server did not start; see {log}")
        time.sleep(0.3)
    storage.write_json(record, {"url": url, "pid": process.pid})
    return url, process


def _healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=2) as answer:
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


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its children: a polite signal first, then a hard one."""
    for signum, seconds in ((signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def limit_accelerator(limit: int) -> None:
    """Let the server run so many tasks that run a model at a time; a higher limit stays, as others may share it."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            limit = max(limit, client.read_concurrency_limit_by_tag(ACCELERATOR).concurrency_limit)
        client.create_concurrency_limit(tag=ACCELERATOR, concurrency_limit=limit)
