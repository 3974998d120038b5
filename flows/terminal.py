"""Steps on the terminal: a bar each where it is one, plain lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import PrefectConsoleHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from flows.plain_console import PlainConsole
from msif_core.errors import InputError
from tasks.progress import listening

EVERY = 10.0
"""Seconds between two plain lines of a step."""


@contextmanager
def quiet_log() -> Iterator[None]:
    """Prefect's log on the terminal from warnings on, without the user's own mistakes; the UI keeps all of it.

    A mistake (`InputError`), or a server that fails, is told once, by the command line, when it ends.
    """
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.Logger.manager.loggerDict)]
    handlers = {h for logger in loggers for h in logger.handlers if isinstance(h, PrefectConsoleHandler)}
    before = {handler: (handler.level, handler.console) for handler in handlers}
    for handler in handlers:
        handler.console = PlainConsole(file=handler.stream)  # Prefect's own draws emoji codes
        handler.setLevel(logging.WARNING)
        handler.addFilter(_told_elsewhere)
    try:
        yield
    finally:
        for handler, (level, console) in before.items():
            handler.console = console
            handler.setLevel(level)
            handler.removeFilter(_told_elsewhere)


def _told_elsewhere(record: logging.LogRecord) -> bool:
    told = InputError, PrefectHTTPStatusError
    mistake = record.exc_info and isinstance(record.exc_info[1], told)
    silent = ("Failed to write result", *(error.__name__ for error in told))  # nobody reads Prefect's copy of a result
    return not mistake and not any(words in record.getMessage() for words in silent)


@contextmanager
def steps_shown(console: PlainConsole) -> Iterator[None]:
    """Show the steps of the flows inside: name, done of total, elapsed and remaining time."""
    if not console.is_terminal:
        with listening(Lines(console)):
            yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
        known: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in known:
                known[step] = bars.add_task(step, total=total)
            bars.update(known[step], completed=done, total=total)

        with listening(show):
            yield


class Lines:
    """A line when a step ends, and one every `EVERY` seconds before."""

    def __init__(self, console: PlainConsole, every: float = EVERY) -> None:
        self.console = console
        self.every = every
        self.begun: dict[str, float] = {}
        self.said: dict[str, float] = {}
        self.lock = Lock()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take note of a step's progress; print where it is due."""
        with self.lock:
            now = time.monotonic()
            begun = self.begun.setdefault(step, now)
            if done >= total:
                count = f" ({total:,} of {total:,})" if total > 1 else ""
                self.console.print(f"{step}: done in {now - begun:.0f} s{count}")
                del self.begun[step]
            elif now - self.said.setdefault(step, begun) >= self.every:
                left = f", about {(now - begun) * (total - done) / done:.0f} s left" if done else ""
                self.console.print(f"{step}: {done:,} of {total:,} after {now - begun:.0f} s{left}")
                self.said[step] = now
