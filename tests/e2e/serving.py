"""Processes that the end-to-end tests start, and what the server's API says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

BIN = Path(sys.executable).parent
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def environment(**variables: str) -> dict[str, str]:
    """This process's, without a configured server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return {**kept, "DO_NOT_TRACK": "1", **variables}


@contextmanager
def process(log: Path, *command: str | Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command with its output in `log`, ended at the end, with its children."""
    with open(log, "ab") as output:
        started = subprocess.Popen(
            [str(BIN / command[0]), *map(str, command[1:])], stdout=output, stderr=subprocess.STDOUT,
            env=environment(**variables), start_new_session=True,
        )  # fmt: skip
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def wait_for(condition: Callable[[], Any], seconds: float = 120, log: Path | None = None) -> Any:
    """The first truthy answer of `condition`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log else "too late"
        time.sleep(0.5)
    return found


class Api:
    """The server's API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/api{path}", data=data, headers={"content-type": "application/json"})
        for patience in (30, 60, None):  # a server on SQLite answers late, or 503, while several write
            try:
                with urlopen(request, timeout=patience or 120) as answer:
                    return json.loads(answer.read() or b"null")
            except (TimeoutError, HTTPError) as error:
                if patience is None or (isinstance(error, HTTPError) and error.code != 503):
                    raise
                time.sleep(1)

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Runs of a flow, oldest first."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self("/flow_runs/filter", body))

    def finished(self, flow: str, number: int = 1, seconds: float = 120) -> list[dict[str, Any]]:
        """Runs of a flow, once `number` of them have ended."""

        def ended() -> list[dict[str, Any]]:
            found = [run for run in self.runs(flow) if run["state_type"] in TERMINAL]
            return found if len(found) >= number else []

        return list(wait_for(ended, seconds))

    def artifact(self, key: str) -> str:
        """The text of the newest artifact of that key."""
        found = self("/artifacts/filter", {"artifacts": {"key": {"any_": [key]}}, "sort": "UPDATED_DESC"})
        return str(found[0]["data"])

    def emit(self, event: str, resource: str) -> None:
        """Emit an event, as a user's pipeline would."""
        subprocess.run(
            [str(BIN / "prefect"), "event", "emit", event, "--resource-id", resource], check=True,
            env=environment(PREFECT_API_URL=f"{self.url}/api"), capture_output=True,
        )  # fmt: skip
