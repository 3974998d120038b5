"""What pruning leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from msif_core import generations
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from tests.tiny_project import asked, manifest, rewrite


def build_three(project: Path) -> tuple[Pipeline, list[Path]]:
    pipeline = Pipeline.from_config(project)
    folders = [pipeline.run()]
    for count in (47, 46):
        rewrite(project, count)
        folders.append(pipeline.run())
    return pipeline, folders


def test_prune_leaves_one_generation_s_files_and_no_others(project: Path) -> None:
    pipeline, folders = build_three(project)
    root = pipeline.workspace.root
    for left in (root / "codes" / ".tmp-1-x", root / "corpus" / "pretrain" / ".tmp-raw-x" / "raw"):
        left.parent.mkdir(exist_ok=True)
        left.write_text("left by a kill")
    before = pipeline.attribute(asked(project)).table
    found = prune(pipeline.workspace, keep=1, grace_seconds=0, dry_run=True)
    assert all(path.exists() for path in found.paths)
    assert prune(pipeline.workspace, keep=1, grace_seconds=0) == found
    assert [p.parent for p in pipeline.workspace.generations.glob("*/manifest.json")] == [folders[2]]
    for kind, pattern, count in (
        ("codes", "shard-*.faiss", 2), ("exact", "*.npy", 2), ("corpus/pretrain", "*.parquet", 6),
        ("corpus/pretrain", "manifest-*.json", 1), ("lexical", "*/documents.json", 1), ("", ".tmp-*", 0),
    ):  # fmt: skip
        assert len(list((root / kind).rglob(pattern))) == count, kind
    names = ["query_id", "document_id", "score"]
    assert pipeline.attribute(asked(project)).table.select(names).equals(before.select(names))
    assert prune(pipeline.workspace, keep=1, grace_seconds=0).paths == ()
    modified = {p: p.stat().st_mtime_ns for kind in ("codes", "exact", "corpus") for p in (root / kind).rglob("*")}
    assert pipeline.run() == folders[2]
    assert modified == {p: p.stat().st_mtime_ns for p in modified}, "nothing was missed"
    with pytest.raises(InputError, match=r"is not here or pruned .its manifest is gone.; run `msif rebuild CONFIG`"):
        generations.rollback(pipeline.workspace)


def test_prune_spares_what_a_query_may_still_read(project: Path) -> None:
    pipeline, folders = build_three(project)
    root = pipeline.workspace.root
    old = time.time() - 7200
    for path in root.rglob("*"):
        os.utime(path, (old, old))
    pipeline.workspace.publish(folders[1].name)  # just now, folders[2] was replaced
    pipeline.workspace.publish(folders[0].name)  # and folders[1]
    prune(pipeline.workspace, keep=1, grace_seconds=3600)
    kept = {path.parent.name for path in pipeline.workspace.generations.glob("*/manifest.json")}
    assert kept == {folder.name for folder in folders}
    for part in (part for folder in folders for part in generations.parts(manifest(folder))):
        assert (root / part).exists(), part


def test_a_half_pruned_generation_is_not_rolled_back_to(project: Path) -> None:
    pipeline, folders = build_three(project)
    (pipeline.workspace.root / manifest(folders[1])["codes"][0]).unlink()
    with pytest.raises(InputError, match=r"is not here or pruned .codes/.*faiss is gone.; run `msif rebuild CONFIG`"):
        generations.rollback(pipeline.workspace)
    assert pipeline.workspace.published() == folders[2].name
