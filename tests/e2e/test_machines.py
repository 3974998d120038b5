"""Several machines: two real workers of a work pool, one killed in the middle; the same bits as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from flows.help_build import help_build
from flows.server import limit_accelerator, server
from msif_core import storage
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tests.tiny_project import write_project

pytestmark = pytest.mark.drill
ROOT = Path(__file__).parents[2]
BUILT = ("factors", "codes", "exact")


def digests(workspace: Path) -> dict[str, str]:
    found = (
        p for kind in BUILT for p in (workspace / kind).rglob("*") if p.suffix in {".safetensors", ".faiss", ".npy"}
    )
    return {str(p.relative_to(workspace)): storage.file_digest(p) for p in found if "partial-" not in str(p)}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(p for child in found for p in family(child))]


def kill(pid: int) -> None:
    for process in reversed(family(pid)):
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def alone(tmp_path: Path) -> Config:
    """The configuration of a project whose single-process build stands in `alone`."""
    settings = json.loads(write_project(tmp_path).read_text())
    settings["corpus"]["shard_sequences"] = 8
    settings["curvature"] = {"part_sequences": 8}
    config = Config.model_validate(settings | {"workspace": str(tmp_path / "alone")})
    Pipeline(config).run()
    return config


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            kill(process.pid)
        process.wait()


def waiting_for(path: Path) -> list[int]:
    """Processes, this one aside, that have the lock of `path` open: they wait for it."""
    lock = str(path.with_name(f".tmp-lock-{path.name}"))
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            opened = {os.readlink(entry) for entry in (folder / "fd").iterdir()}
        except OSError:  # it has ended
            continue
        if lock in opened and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def helping() -> list[FlowRun]:
    """Runs of the deployment, whatever their state."""
    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs() if run.deployment_id is not None]


def test_a_killed_worker_of_a_pool_changes_no_bit(
    alone: Config, tmp_path: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    shared = alone.model_copy(update={"workspace": tmp_path / "shared"})
    shared = Config.model_validate(shared.model_dump() | {"runner": {"kind": "pool", "workers": 2}})
    pipeline = Pipeline(shared)
    for stage in shared.stages:
        pipeline.tokenize(stage.name)
    pretrain = shared.stages[0].name
    held = pipeline.fit(pretrain, pipeline.structure(pretrain))._file("covariance", 0, 0)

    with server(tmp_path / "server") as url:
        environment = {**os.environ, "PREFECT_API_URL": url, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        prefect = [sys.executable, "-m", "prefect"]
        limit_accelerator(3)
        subprocess.run([*prefect, "work-pool", "create", "pool", "--type", "process"], env=environment, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        help_build.from_source(source=str(ROOT), entrypoint="flows/help_build.py:help_build").deploy(  # type: ignore[union-attr]
            name="pool", work_pool_name="pool", print_next_steps=False, ignore_warnings=True,
        )  # fmt: skip
        for number in range(2):
            workers.append(
                subprocess.Popen(
                    [*prefect, "worker", "start", "--pool", "pool", "--limit", "1", "--name", f"worker{number}"],
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        config = tmp_path / "shared.yaml"
        config.write_text(shared.model_dump_json())
        with storage.locked(held):  # both workers come to this part, and wait for it
            leader = subprocess.Popen(
                [str(Path(sys.executable).with_name("msif")), "run", str(config)], env=environment, cwd=ROOT,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            workers.append(leader)
            wait_until(lambda: sum(r.state_name == "Running" for r in helping()) == 2, "two helping runs")
            others = len(pipeline.fit_parts(pretrain)) - 1
            wait_until(
                lambda: len(list(held.parent.glob("covariance-*.safetensors"))) == others, "every part but the held one"
            )
            kill(workers[0].pid)
        _, errors = leader.communicate(timeout=600)
        assert leader.returncode == 0, errors.decode()[-2000:]
        assert all(run.state is not None and run.state.is_final() for run in helping())
    assert digests(tmp_path / "shared") == digests(tmp_path / "alone")
    assert Pipeline(shared).workspace.published() == Pipeline(alone).workspace.published()


def test_a_killed_worker_of_a_ray_cluster_changes_no_bit(
    alone: Config, tmp_path: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    pytest.importorskip("prefect_ray", reason="the extra `ray` is not installed")
    settings = alone.model_dump(mode="json") | {"workspace": str(tmp_path / "shared")}
    shared = Config.model_validate(settings | {"runner": {"kind": "ray", "workers": 2}})
    pipeline = Pipeline(shared)
    for stage in shared.stages:
        pipeline.tokenize(stage.name)
    pretrain = shared.stages[0].name
    held = pipeline.fit(pretrain, pipeline.structure(pretrain))._file("covariance", 2, 0)
    config = tmp_path / "shared.yaml"
    config.write_text(shared.model_dump_json())
    with server(tmp_path / "server") as url:
        environment = {**os.environ, "PREFECT_API_URL": url, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with storage.locked(held):
            leader = subprocess.Popen(
                [str(Path(sys.executable).with_name("msif")), "run", str(config)], env=environment, cwd=ROOT,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            workers.append(leader)
            others = len(pipeline.fit_parts(shared.stages[0].name)) - 1
            wait_until(
                lambda: len(list(held.parent.glob("covariance-*.safetensors"))) == others, "every part but the held one"
            )
            wait_until(lambda: bool(waiting_for(held)), "a Ray worker that waits for the held part")
            for process in waiting_for(held):
                os.kill(process, signal.SIGKILL)
        _, errors = leader.communicate(timeout=600)
        assert leader.returncode == 0, errors.decode()[-2000:]
    assert digests(tmp_path / "shared") == digests(tmp_path / "alone")
