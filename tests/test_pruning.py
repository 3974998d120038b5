"""What pruning leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from msif_core import generations, storage
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from tests.tiny_project import asked, change, manifest, rewrite


def build_three(project: Path) -> tuple[Pipeline, list[Path]]:
    pipeline = Pipeline.from_config(project)
    folders = [pipeline.run()]
    for count in (47, 46):
        rewrite(project, count)
        folders.append(pipeline.run())
    return pipeline, folders


def age(root: Path) -> None:
    old = time.time() - 7200
    for path in root.rglob("*"):
        os.utime(path, (old, old))


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


def test_prune_removes_folders_with_what_an_error_left_in_them(project: Path) -> None:
    pipeline, _ = build_three(project)
    old = pipeline.codes_folder()
    change(project, sketch={"dimensions": 256}).run()
    with pytest.raises(OSError, match="full"), storage.locked(old / "shard"):
        raise OSError("full")
    found = prune(pipeline.workspace, keep=1, grace_seconds=0)
    assert old in found.paths
    assert storage.lock_of(old / "shard") not in found.paths, "counted once"
    assert not any(path.exists() for path in found.paths)


def test_prune_spares_what_a_query_may_still_read(project: Path) -> None:
    pipeline, folders = build_three(project)
    root = pipeline.workspace.root
    age(root)
    pipeline.workspace.publish(folders[1].name)  # just now, folders[2] was replaced
    pipeline.workspace.publish(folders[0].name)  # and folders[1]
    prune(pipeline.workspace, keep=1, grace_seconds=3600)
    kept = {path.parent.name for path in pipeline.workspace.generations.glob("*/manifest.json")}
    assert kept == {folder.name for folder in folders}
    for part in (part for folder in folders for part in generations.parts(manifest(folder))):
        assert (root / part).exists(), part


def test_prune_spares_a_tokenize_under_way(project: Path) -> None:
    pipeline, _ = build_three(project)
    corpus = pipeline.workspace.corpus("pretrain")
    raw = corpus / ".tmp-raw-x" / "raw-00000"
    raw.parent.mkdir()
    raw.touch()
    with storage.locked(corpus):
        prune(pipeline.workspace, grace_seconds=0)
        assert raw.exists()
        assert storage.is_held(storage.lock_of(corpus))
    storage.lock_of(corpus).touch()  # as an error leaves it
    prune(pipeline.workspace, grace_seconds=0)
    assert not raw.exists()
    assert not storage.lock_of(corpus).exists()


def test_prune_spares_a_long_build_of_the_newest_corpus(project: Path) -> None:
    pipeline, _ = build_three(project)
    rewrite(project, 40)
    pipeline.tokenize("pretrain")
    built = [step(shard) for step in (pipeline.index_shard, pipeline.exact_shard) for shard in range(2)]
    built.append(pipeline.build_lexical())
    age(pipeline.workspace.root)
    prune(pipeline.workspace, keep=1)
    assert all(path.exists() for path in built)


def test_prune_spares_a_long_build_with_other_settings(project: Path) -> None:
    """Its codes stand for hours while exact scores follow."""
    pipeline, _ = build_three(project)
    pipeline = change(project, sketch={"dimensions": 256})
    codes = [pipeline.train_index(), pipeline.index_shard(0)]
    change(project, index={"recall_queries": 1})
    age(pipeline.workspace.root)
    exact = Pipeline.from_config(project).exact_shard(0)
    prune(pipeline.workspace, keep=1)
    assert all(path.exists() for path in codes)
    age(exact.parent)
    prune(pipeline.workspace, keep=1)
    assert not any(path.exists() for path in [*codes, exact]), "abandoned"


def test_a_half_pruned_generation_is_not_rolled_back_to(project: Path) -> None:
    pipeline, folders = build_three(project)
    (pipeline.workspace.root / manifest(folders[1])["codes"][0]).unlink()
    with pytest.raises(InputError, match=r"is not here or pruned .codes/.*faiss is gone.; run `msif rebuild CONFIG`"):
        generations.rollback(pipeline.workspace)
    assert pipeline.workspace.published() == folders[2].name
