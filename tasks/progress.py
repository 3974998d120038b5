"""Progress of a run's long steps: a line each for a listener (the terminal), an artifact each in the UI."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture, as_completed

from msif_core.stages import Progress

EVERY = 2.0
"""Seconds between two updates of an artifact: each is a call to the server."""

P = TypeVar("P")
T = TypeVar("T")


def _silent(step: str, done: int, total: int) -> None:
    """The listener where nobody watches."""


_listener: Progress = _silent


@contextmanager
def listening(listener: Progress) -> Iterator[None]:
    """Tell `listener` of the steps of this process as well."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = _silent


def step(name: str) -> Callable[[int, int], None]:
    """A callback (done, total) that shows how far the step is, on the terminal and in the UI.

    To be called within a flow or task run, whose artifact it becomes.
    """
    key = re.sub(r"[^a-z0-9]+", "-", f"progress-{name}".lower()).strip("-")
    artifact = cast(UUID, create_progress_artifact(progress=0.0, key=key, description=name))
    shown_at = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal shown_at
        _listener(name, done, total)
        if done == total or time.monotonic() - shown_at > EVERY:
            shown_at = time.monotonic()
            update_progress_artifact(artifact_id=artifact, progress=100.0 * done / max(total, 1))

    return report


def gather(name: str, submit: Callable[[P], PrefectFuture[T]], parts: Sequence[P], at_once: int = 1) -> list[T]:
    """Results of a task run for each part, in order; so many are submitted at a time, and the first failure ends it."""
    if not parts:
        return []
    report = step(name)
    report(0, len(parts))
    running: dict[PrefectFuture[T], int] = {}
    results: dict[int, T] = {}

    def finish_one() -> None:
        future = next(as_completed(list(running)))
        results[running.pop(future)] = future.result()
        report(len(results), len(parts))

    for number, part in enumerate(parts):
        if len(running) == at_once:
            finish_one()
        running[submit(part)] = number
    while running:
        finish_one()
    return [results[number] for number in range(len(parts))]


@contextmanager
def whole(name: str) -> Iterator[None]:
    """A step that cannot say how far it is: begun, then done."""
    _listener(name, 0, 1)
    yield
    _listener(name, 1, 1)
