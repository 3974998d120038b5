"""Long drills: the command line as its own process, killed and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msif_core import storage
from tests.tiny_project import write_project

pytestmark = pytest.mark.drill
MSIF = Path(sys.executable).with_name("msif")


def start(config: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return subprocess.Popen(
        [str(MSIF), "run", str(config)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def digests(root: Path) -> dict[str, str]:
    kinds = ("factors", "codes")
    found = (p for kind in kinds for p in (root / kind).rglob("*") if p.suffix in {".safetensors", ".faiss"})
    return {p.name: storage.file_digest(p) for p in found}


def wait_for(condition: Path, process: subprocess.Popen[bytes], pattern: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not list(condition.rglob(pattern)):
        assert process.poll() is None, "the command ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    config = write_project(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"curvature": {"part_sequences": 24}}))
    workspace = tmp_path / "workspace"
    moments = (("factors", "covariance-00001*"), ("factors", "eigenvalues-00000*"), ("codes", "shard-00000*.faiss"))
    for kind, pattern in moments:
        process = start(config)
        wait_for(workspace / kind, process, pattern)
        process.kill()
        process.wait()
        assert not (workspace / "generations" / "CURRENT").exists()

    server = storage.read_json(workspace / "server" / "server.json")
    finished = start(config)
    assert finished.wait(280) == 0
    assert not alive(server["pid"]), "a server that was left behind by the killed command is reused, then stopped"
    killed = digests(workspace)

    workspace.rename(tmp_path / "killed")
    clean = start(config)
    assert clean.wait(280) == 0
    assert not (workspace / "server" / "server.json").exists(), "what a command starts, it stops"
    assert digests(workspace) == killed
