"""Prefect tasks: one thin module for each step; retries, limits and artifacts live here and only here.

A task takes the configuration and names, calls one step of `msif_core.Pipeline` and returns a path. Whether
there is anything to do is decided by the files and their checksums, not by Prefect's result cache: a cached
result would claim that a file exists that somebody has deleted.
"""

from contextlib import nullcontext
from typing import Any

from msif_core import storage, torchrun
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline

ACCELERATOR = "accelerator"
"""Tag of the tasks that run a model; the server limits how many run at a time."""


def run_step(config: Config, step: str, *arguments: str | int, wait: bool = True) -> Any:
    """Run a step of the pipeline, here or in the processes that share a large model; returns its path or paths.

    Without `wait`, None where another process is at it.
    """
    try:
        if config.compute.ranks > 1 and step in torchrun.STEPS:
            return torchrun.run_step(config, step, *arguments, wait=wait)
        with nullcontext() if wait else storage.passing_by():
            return getattr(Pipeline(config), step)(*arguments)
    except storage.BusyError:
        return None


def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another attempt may help: not where the input is wrong."""
    return not isinstance(state.result(raise_on_failure=False), InputError)


IO: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [1, 10], "retry_condition_fn": worth_retrying}
"""Retries of tasks whose failures are mostly the file system's."""
