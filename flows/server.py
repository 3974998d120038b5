"""The Prefect server of a command: the configured one, or a local one with its database in the workspace."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_HOME, temporary_settings

from flows import local_server, prefect_defaults
from flows.proxies import check_socks, spare_loopback
from msif_core import storage
from msif_core.errors import InputError
from tasks import ACCELERATOR

DRAIN_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0


@contextmanager
def server(workspace: Path, keep: bool = False) -> Iterator[str]:
    """Yield the API's address; flows that start inside run against it.

    A configured server (PREFECT_API_URL) is used as it is. Otherwise the workspace's own is used if it lives, or
    started. Whoever is the last to leave stops it, also one that is still coming up, unless one of its users wanted to
    `keep` it.

    Raises:
        InputError: the configured server cannot be used, or the local one does not come up; names the mend.
    """
    prefect_defaults()
    check_socks()
    if url := PREFECT_API_URL.value():
        spare_loopback(url)
        check(url)
        yield url
        return
    folder = workspace.resolve() / "server"
    storage.make_folder(folder)
    with open(folder / "users", "ab") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            url = local_server.ensure_running(folder, keep)
            with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}):
                try:
                    yield url
                finally:
                    _drain()
        finally:
            if _is_last(users):
                local_server.stop(folder)


def _is_last(users: BinaryIO) -> bool:
    """Whether nobody else uses the server; nobody begins to, then, before `users` is closed."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check(url: str) -> None:
    """Refuse a configured server that does not answer, refuses the login, or is none of Prefect's.

    Raises:
        InputError: says which of these, and the mend.
    """
    with get_client(sync_client=True, httpx_settings={"timeout": ANSWER_TIMEOUT}) as client:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            problem = client.api_healthcheck()
        try:
            if problem is None:  # that answer needs no login
                client.read_concurrency_limits(limit=1, offset=0)
        except (PrefectHTTPStatusError, ValueError) as error:
            problem = error
    if problem is not None:
        raise InputError(f"PREFECT_API_URL is {url}, {_with_mend(problem)}")


def _with_mend(problem: Exception) -> str:
    path = "the address of the API usually ends with /api"
    if isinstance(problem, ValueError):  # a page, where JSON is expected
        return f"which answers as no Prefect server does; {path}"
    if not isinstance(problem, PrefectHTTPStatusError):
        return "where nothing answers; start that server, or unset it"
    status = problem.response.status_code
    login = "set PREFECT_API_AUTH_STRING to its user:password (PREFECT_API_KEY for Prefect Cloud)"
    mend = login if status in (401, 403) else path if status < 500 else "see its log"
    return f"which answers {status} {problem.response.reason_phrase}; {mend}"


def _drain() -> None:
    """Hand over the logs and events still queued: once the server is gone, this process would retry for a minute."""
    APILogWorker.drain_all(timeout=DRAIN_TIMEOUT, at_exit=False)
    EventsWorker.drain_all(timeout=DRAIN_TIMEOUT, at_exit=False)


def limit_accelerator(limit: int) -> None:
    """Let the server run so many tasks that run a model at a time; a higher limit stays, as others may share it."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            limit = max(limit, client.read_concurrency_limit_by_tag(ACCELERATOR).concurrency_limit)
        client.create_concurrency_limit(tag=ACCELERATOR, concurrency_limit=limit)
