"""A build that is killed with SIGKILL at any of its renames and started again ends with the same bytes.

Every file that counts comes to its name by a rename, so the renames part a build into all states that a kill can leave
behind (what is half written has a temporary name). The reduced sweep kills at some of them, the drill at each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from msif_core import catalog, corpus, generations, storage
from msif_core.workspace import Workspace
from tests.forker import Forker
from tests.tiny_project import documents, write_project, write_records

TIMES = {"created", "seconds"}
TABLES = {"documents": "", "sequences": "", "shards": "", "stages": "", "recall": "", "generations": "created, seconds"}


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as started:
        yield started


def left_over(name: str) -> bool:
    """Whether a file is no part of a workspace: what a killed build was writing, and the locks that it held."""
    return any(part.startswith((".tmp-", ".lock-")) for part in Path(name).parts)


def contents(root: Path) -> dict[str, Any]:
    """Every file's digest; the manifests' values but for times; the catalog's tables."""
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if not path.is_file() or left_over(name) or name.startswith("catalog/"):
            continue
        if name.startswith("generations/") and path.suffix == ".json":
            found[name] = {key: value for key, value in storage.read_json(path).items() if key not in TIMES}
            del found[name]["settings"]["workspace"]
        else:
            found[name] = storage.file_digest(path)
    for table, left_out in TABLES.items():
        columns = f"* exclude ({left_out})" if left_out else "*"
        rows = catalog.query(root, f"select {columns} from {table} order by all").to_pylist()
        found[f"table {table}"] = [{**row, "settings": None} if "settings" in row else row for row in rows]
    return found


def progress(root: Path) -> set[Path]:
    """What a further attempt can build on; each attempt may number a catalog of its own."""
    found = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "catalog")
    return {path for path in found if not left_over(str(path.relative_to(root)))}


def check_readers(root: Path) -> None:
    """Whatever a kill left, what readers are pointed to is complete."""
    workspace = Workspace(root)
    published = generations.manifest_of(workspace, workspace.published())
    assert (published is None) == (workspace.published() is None)
    for manifest in map(storage.read_json, [*workspace.generations.glob("*/manifest.json")]):
        for part in generations.parts(manifest):
            path = root / part
            assert storage.is_whole(path) if path.suffix == ".faiss" else path.exists(), part
    for path in root.glob("corpus/*/manifest*.json"):
        folder, entries = corpus.shard_entries(path)
        assert all(corpus._is_whole(folder, entry) for entry in entries)
    if (root / "catalog" / "CURRENT").exists():
        assert catalog.query(root, "select count(*) from documents").num_rows == 1


def killed_build(forker: Forker, config: Path, root: Path, at: Sequence[str], stride: int) -> int:
    """Build, killed at every `stride`-th rename, however many starts that takes; returns how many were killed.

    `at` are the moments, before or after a rename, in turns.
    """
    kills, count, before = 0, stride, progress(root)
    while not forker.build(config, at[kills % len(at)], count):
        kills += 1
        assert kills < 1000
        check_readers(root)
        after = progress(root)
        # A rename that each start does over again is no progress: the next start gets further.
        count = stride if after != before else count + 1
        before = after
    return kills


def change_documents(folder: Path) -> None:
    rows = documents()
    rows[5]["text"] = "brook: another thing altogether."
    write_records(folder / "documents.jsonl", [*rows[:40], {"id": "new", "text": "heron: a thing made of water."}])


def sweep(forker: Forker, folder: Path, at: Sequence[str], strides: tuple[int, int]) -> list[int]:
    """A first build and a rebuild, killed, against those that are not; returns the numbers of kills."""
    config, clean = write_project(folder), folder / "clean.yaml"
    settings = json.loads(config.read_text()) | {"curvature": {"part_sequences": 24}}
    config.write_text(json.dumps(settings))
    clean.write_text(json.dumps(settings | {"workspace": str(folder / "clean")}))
    kills = []
    for step, stride in enumerate(strides):
        if step:
            change_documents(folder)
        assert forker.build(clean)
        kills.append(killed_build(forker, config, folder / "workspace", at, stride))
        assert contents(folder / "workspace") == contents(folder / "clean")
    assert len(list((folder / "workspace" / "generations").glob("*/manifest.json"))) == 2
    return kills


def test_killed_at_some_renames(tmp_path: Path, forker: Forker) -> None:
    first, second = sweep(forker, tmp_path, ("before", "after"), (23, 9))
    assert first >= 4
    assert second >= 2


@pytest.mark.drill
@pytest.mark.parametrize(("at", "stride"), [("before", 2), ("after", 3)])
def test_killed_at_every_rename(tmp_path: Path, forker: Forker, at: str, stride: int) -> None:
    """Before each (what is after one is before the next, but for a file under its temporary name); after some."""
    first, second = sweep(forker, tmp_path, (at,), (stride, stride))
    assert first > 80 / stride
    assert second > 20 / stride
