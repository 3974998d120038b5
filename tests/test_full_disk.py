"""A full disk and a workspace that cannot be written to: one sentence, nothing half-written, and then it goes on.

A limit on the size of files stands for the full disk: every writer meets it, whoever runs the test.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from msif_core import catalog, index, storage, training
from msif_core.errors import InputError
from msif_core.lexical import LexicalIndex
from msif_core.pipeline import Pipeline
from msif_core.training import new_model, train_tokenizer
from tests.tiny_project import ARCHITECTURE, column
from tests.workspace_fixture import write_workspace

SENTENCE = (
    r"^/.*: (File too large|No space left on device); make room \(`msif prune CONFIG` drops what is no longer used\) "
    "or lift the limit, then run the same command again: it goes on where it stopped$"
)
NUMBERS = np.random.default_rng(0).normal(size=(300, 100)).astype(np.float32)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_array(path: Path) -> None:
    with open(path, "wb") as handle:
        np.save(handle, NUMBERS)


def save_index(path: Path) -> None:
    full = faiss.IndexFlat(100)
    full.add(NUMBERS)
    index._write(full, path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("a" * 100_000),
    "parquet": lambda path: pq.write_table(pa.table({"a": NUMBERS.ravel()}), path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NUMBERS)}, path),
    "index": save_index,
    "array": save_array,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_whoever_writes(name: str, tmp_path: Path) -> None:
    with files_up_to(10_000), pytest.raises(InputError, match=SENTENCE):
        storage.build_once(tmp_path / "file", WRITERS[name])
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-lock-file"}
    assert storage.build_once(tmp_path / "file", WRITERS[name]).stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"file", "file.sha256"}


def test_an_index_that_fails_only_when_its_file_is_closed(tmp_path: Path) -> None:
    few = faiss.IndexFlat(20)
    few.add(np.ones((40, 20), np.float32))
    with files_up_to(3_000), pytest.raises(InputError, match=SENTENCE):
        storage.build_once(tmp_path / "file", lambda path: index._write(few, path))
    assert not (tmp_path / "file").exists()


def write_lexical(folder: Path) -> None:
    texts = [(f"d{i}", f"word{i} of many") for i in range(2_000)]
    with storage.atomic_folder(folder) as temporary:
        LexicalIndex.build(texts).save(temporary)


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with files_up_to(10_000), pytest.raises(InputError, match=SENTENCE):
        write_lexical(tmp_path / "lexical")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path) -> None:
    text = ["of a checkpoint"]
    tokenizer = train_tokenizer(text, 300)
    model = new_model(tokenizer, ARCHITECTURE)
    training._save(model, tokenizer, tmp_path / "model", {"key": "first"})
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with files_up_to(10_000), pytest.raises(InputError, match=SENTENCE):
        training._save(model, tokenizer, tmp_path / "model", {"key": "second"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    training._save(model, tokenizer, tmp_path / "model", {"key": "third"})
    assert storage.read_json(tmp_path / "model" / training.RECORD) == {"key": "third"}


def test_a_catalog_is_whole_or_the_one_before(tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    catalog.publish(root)
    with files_up_to(20_000), pytest.raises(InputError, match=SENTENCE):
        catalog.publish(root)
    assert sorted(path.name for path in (root / "catalog").iterdir()) == ["CURRENT", "catalog-1.duckdb"]
    assert catalog.query(root, "SELECT * FROM runs").num_rows == 1
    catalog.publish(root)


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.atomic_path(tmp_path / "file"):
        (tmp_path / "none").read_text()
    with pytest.raises(PermissionError), storage.told(tmp_path):
        raise PermissionError(13, "Permission denied", "/a/source/of/somebody")


def test_a_build_goes_on_where_the_disk_was_full(project: Path) -> None:
    """Every time it gets a little further, and in the end the index is that of an undisturbed build."""
    pipeline = Pipeline.from_config(project)
    stopped: list[str] = []
    for size in (500, 4_000, 10_000, 48_000, 500_000):
        try:
            with files_up_to(size):
                pipeline.run()
        except InputError as error:
            stopped.append(str(error))
        names = {p.name for p in pipeline.workspace.root.rglob(".tmp-*") if not p.name.startswith(storage.LOCK)}
        assert not names
    assert all(re.match(SENTENCE, message) for message in stopped)
    root = pipeline.workspace.root
    parts = [Path(message.partition(":")[0]).relative_to(root).parts[0] for message in stopped]
    assert list(dict.fromkeys(parts)) == ["corpus", "factors", "codes"]
    pipeline.run()
    built = pipeline.workspace.published()
    assert column(pipeline, "SELECT generation FROM generations WHERE published", "generation") == [built]
    shutil.rmtree(root)
    pipeline.run()
    assert pipeline.workspace.published() == built


INSIDE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
"""A shell that may mount what it likes, in a namespace that nobody else sees and that goes with it."""

MSIF = "import sys; from flows import cli; sys.argv[0] = 'msif'; cli.main()"


def needs(*called: str | Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*INSIDE, *called], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["report", "run"],
        pytest.param(["attribute", "--queries", "q.jsonl"], marks=pytest.mark.drill),
        pytest.param(["serve"], marks=pytest.mark.drill),
    ],
)
def test_a_workspace_that_cannot_be_written_to_is_one_sentence(tmp_path: Path, command: list[str]) -> None:
    from tests.test_cli import config

    root = write_workspace(tmp_path / "workspace")
    (root / "attributions" / "20260101-000000-aaaaaa").rename(root / "attributions" / "run")
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    needs(mount, "sh", root)
    called = [sys.executable, "-c", MSIF, command[0], str(config(tmp_path)), *command[1:]]
    done = subprocess.run(
        [*INSIDE, mount + ' && shift && exec "$@"', "sh", root, *called], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"msif: {root}")
    wanted = ": cannot be written to (Read-only file system); make it writable, or name another folder\n"
    assert done.stderr.endswith(wanted)
    assert done.stderr.count("\n") == 1


FILLED = """
import shutil, subprocess, sys, time
from pathlib import Path
disk, left, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
while run.poll() is None and not (disk / "workspace" / "server" / "server.json").exists():
    time.sleep(0.05)
with open(disk / "filling", "wb") as handle:
    handle.write(bytes(shutil.disk_usage(disk).free - left))
print(run.communicate()[1], end="")
assert run.returncode == 2, run.returncode
(disk / "filling").unlink()
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""


@pytest.mark.drill
@pytest.mark.parametrize("left", [40_000, 300_000])
def test_a_disk_that_fills_up_under_a_run_and_its_server(project: Path, tmp_path: Path, left: int) -> None:
    """The server's database is on the same disk: it answers with errors that do not say so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = json.loads(project.read_text()) | {"workspace": str(disk / "workspace")}
    project.write_text(json.dumps(settings))
    mount = 'mount -t tmpfs -o size=80m tmpfs "$1"'
    needs(mount, "sh", disk)
    called = [sys.executable, "-c", FILLED, str(disk), str(left), sys.executable, "-c", MSIF, "run", str(project)]
    done = subprocess.run(
        [*INSIDE, mount + ' && shift && exec "$@"', "sh", disk, *called], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if not line.startswith("file ")]
    assert re.match(SENTENCE, line.removeprefix("msif: "))
