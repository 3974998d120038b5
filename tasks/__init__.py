"""Prefect tasks: one thin module for each step; retries, limits and artifacts live here and only here.

A task takes the configuration and names, calls one step of `msif_core.Pipeline` and returns a path. Whether
there is anything to do is decided by the files and their checksums, not by Prefect's result cache: a cached
result would claim that a file exists that somebody has deleted.
"""

from threading import Lock
from typing import Any

from msif_core.errors import InputError

ACCELERATOR = "accelerator"
"""Tag of the tasks that run a model; the server limits how many run at a time."""


MODEL = Lock()
"""Held by a task while it runs a model. Threads of one process share a stage's model, and a pass is hooks on that
model: two passes at a time would read each other's activations. Shards run side by side in separate processes."""


def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another attempt may help: not where the input is wrong."""
    return not isinstance(state.result(raise_on_failure=False), InputError)


IO: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [1, 10], "retry_condition_fn": worth_retrying}
"""Retries of tasks whose failures are mostly the file system's."""
