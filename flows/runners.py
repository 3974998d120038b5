"""Who builds the shards: this process, runs on a work pool that help, or a Ray cluster.

Whoever builds, a shard's file is written once, by the holder of its lock, and read from the file system by all: the
result has the same bits, and a worker that dies frees what it held.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.futures import PrefectFuture
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from msif_core.config import Config
from msif_core.errors import InputError
from tasks import progress, turns


def task_runner(config: Config) -> Any:
    """The task runner of the flows that map over shards.

    Raises:
        InputError: Ray is asked for and not installed.
    """
    if config.runner.kind != "ray":
        return ThreadPoolTaskRunner(max_workers=1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise InputError("runner.kind ray needs the extra `ray`; in the checkout: pip install -e '.[ray]'") from None
    local = {"num_cpus": config.runner.workers, "include_dashboard": False}
    return RayTaskRunner(address=config.runner.address, init_kwargs={} if config.runner.address else local)


def model_tasks(config: Config) -> int:
    """How many tasks that run a model may run at a time, on all machines together."""
    helping = 0 if config.runner.kind == "threads" else config.runner.workers
    return config.compute.workers * (1 + helping)


def resources(config: Config) -> AbstractContextManager[Any]:
    """What each task asks of the cluster, for the tasks submitted inside."""
    if config.runner.kind != "ray":
        return nullcontext()
    from prefect_ray.context import remote_options

    return remote_options(num_cpus=1, num_gpus=config.runner.accelerators)


def share(config: Config, name: str, step: Any, *arguments: Any, parts: Sequence[int]) -> None:
    """Run a step for every part, in an order of this process's own where others help, so that they seldom meet.

    Parts that another process is at come last: they are waited for when no free one is left.
    """
    order = list(parts)
    if config.runner.kind == "pool":
        random.Random(f"{os.uname().nodename} {os.getpid()}").shuffle(order)
    at_once = model_tasks(config) if config.runner.kind == "ray" else 1

    def submit(part: int, wait: bool = False) -> PrefectFuture[Any]:
        turns.give_way(config)
        return step.submit(config, *arguments, part, wait=wait)

    with resources(config):
        found = progress.gather(name, submit, order, at_once)
        held = [part for part, built in zip(order, found, strict=True) if built is None]
        progress.gather(name, partial(submit, wait=True), held, at_once)


@contextmanager
def helpers(config: Config) -> Iterator[None]:
    """Runs of `runner.deployment` work on the same shards as the flow inside; those left at the end are cancelled.

    The flow does not wait for them: it works too, and takes over what a dead one leaves.
    """
    if config.runner.kind != "pool":
        yield
        return
    parameters = {"config": config.model_dump(mode="json")}
    started = [
        cast(FlowRun, run_deployment(config.runner.deployment, parameters=parameters, timeout=0, as_subflow=False))
        for _ in range(config.runner.workers)
    ]
    get_run_logger().info("asked for %d runs of %s to help", len(started), config.runner.deployment)
    try:
        yield
    finally:
        cancel([run.id for run in started], "the build is done")


def cancel(runs: list[UUID], reason: str) -> None:
    """Cancel those of the runs that have not ended."""
    with get_client(sync_client=True) as client:
        for run in runs:
            state = client.read_flow_run(run).state
            if state is None or not state.is_final():
                client.set_flow_run_state(run, Cancelled(message=reason), force=True)
