"""The workspace's own Prefect server: a process that outlives who started it, with its database in a folder.

It holds a lock on its log for as long as it lives, so that a record whose process number has gone to another process is
known to be stale. It begins only once its record is written, so that whatever is killed, a server that runs has a name.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

from flows import PREFECT_DEFAULTS
from msif_core import storage
from msif_core.errors import InputError

START_TIMEOUT = 180.0
STOP_TIMEOUT = 5.0

BEGIN = 'read begin && exec "$@" </dev/null'
"""Shell: become the command given once a line is read, and end where the writer ends without one."""


def ensure_running(folder: Path, keep: bool) -> str:
    """The address of the folder's server, once it answers: of the one that runs, or of a new one; `keep` is noted.

    Raises:
        InputError: it ends before it answers, or does not answer in time; names its log.
    """
    record = folder / "server.json"
    with storage.locked(record):
        if not _lives(folder):
            _launch(folder)
        found = _wait(folder)
        storage.write_json(record, found | {"keep": keep or found["keep"]})
    return str(found["url"])


def stop(folder: Path) -> None:
    """Stop the folder's server, unless it is to be kept; forget one that no longer lives."""
    record = folder / "server.json"
    if _lives(folder):
        found = storage.read_json(record)
        if found["keep"]:
            return
        _end(found["pid"], folder)
    record.unlink(missing_ok=True)


def _launch(folder: Path) -> None:
    """Start a server and write its record: url, pid, and that nobody wants it kept yet."""
    record = folder / "server.json"
    record.unlink(missing_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    server = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "server.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # goes over to the process, which has the file as its output
        process = subprocess.Popen(
            ["sh", "-c", BEGIN, "sh", *server],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=_environment(folder, url),
        )
    assert process.stdin is not None
    with process.stdin as begin:
        storage.write_json(record, {"url": url, "pid": process.pid, "keep": False})
        begin.write(b"\n")


def _environment(folder: Path, url: str) -> dict[str, str]:
    """This process's, without the user's settings of Prefect: they are for other servers (login, path, database)."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith("PREFECT_")}
    ours = {key: os.environ.get(key, value) for key, value in PREFECT_DEFAULTS.items()}
    database = f"sqlite+aiosqlite:///file:{quote(str(folder / 'prefect.db'))}?uri=true"  # whatever is in its name
    own = {"PREFECT_API_URL": url, "PREFECT_HOME": str(folder), "PREFECT_API_DATABASE_CONNECTION_URL": database}
    return kept | ours | own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(folder: Path) -> dict[str, Any]:
    """The record of the folder's server once that answers; another is started where the port was lost to a stranger."""
    log = folder / "server.log"
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        found: dict[str, Any] = storage.read_json(folder / "server.json")
        if _answers(found["url"], folder):
            return found
        if not _lives(folder):
            if not _is_taken(found["url"]):
                raise InputError(f"the local Prefect server did not start; see {log}")
            _launch(folder)
        time.sleep(0.3)
    raise InputError(f"the local Prefect server does not answer; see {log}")


def _lives(folder: Path) -> bool:
    """Whether the folder's record is that of a server that lives."""
    return (folder / "server.json").exists() and is_locked(folder / "server.log")


def is_locked(log: Path) -> bool:
    """Whether a server, or what it left running, holds the lock on its log."""
    with open(log, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _answers(url: str, folder: Path) -> bool:
    """Whether the server that answers there is the folder's, and not one that took its port."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/admin/settings", timeout=10) as answer:
            return bool(json.load(answer)["home"] == str(folder))
    except (URLError, OSError, ValueError, LookupError, TypeError):
        return False


def _is_taken(url: str) -> bool:
    """Whether somebody listens at the address's port."""
    host, _, port = url.removeprefix("http://").removesuffix("/api").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _end(pid: int, folder: Path) -> None:
    """End the server and its children: a polite signal first, then a hard one."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(pid, signum)
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):  # another process's child: its parent takes note of the end
                os.waitpid(pid, os.WNOHANG)
            if not _lives(folder):
                return
            time.sleep(0.1)
