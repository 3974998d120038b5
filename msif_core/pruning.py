"""Remove what no kept generation needs: old generations, and the codes, factors and words only they used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msif_core import storage
from msif_core.workspace import Workspace


@dataclass(frozen=True)
class Pruned:
    """What was removed, and how many bytes that were."""

    paths: tuple[Path, ...]
    bytes: int


def prune(workspace: Workspace, keep: int = 3, grace_seconds: float = 3600.0, dry_run: bool = False) -> Pruned:
    """Keep the published generation, those before it that `rollback` reaches, `keep` in all; drop the rest.

    Partial sums of finished factors go too: they are needed only until the fit is done. What is younger than
    `grace_seconds` stays, so that a build under way loses nothing. Answers are never touched.
    """
    manifests = {path.parent.name: storage.read_json(path) for path in workspace.generations.glob("*/manifest.json")}
    kept = [manifests[name] for name in _lineage(manifests, workspace.published(), keep)]
    edge = time.time() - grace_seconds
    doomed = [path for path in _doomed(workspace, manifests, kept) if _newest(path) <= edge]
    size = sum(file.stat().st_size for path in doomed for file in _files(path))
    if not dry_run:
        for path in doomed:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return Pruned(tuple(doomed), size)


def _lineage(manifests: dict[str, Any], published: str | None, keep: int) -> list[str]:
    """The published generation and its parents, at most `keep`."""
    names: list[str] = []
    while published in manifests and published not in names and len(names) < max(1, keep):
        names.append(published)
        published = manifests[published]["parent"]
    return names


def _doomed(workspace: Workspace, manifests: dict[str, Any], kept: list[Any]) -> Iterator[Path]:
    root = workspace.root
    if not kept:
        return
    for name in manifests.keys() - {manifest["generation"] for manifest in kept}:
        yield workspace.generations / name
    used = {root / code for manifest in kept for code in manifest["codes"]}
    folders = {path.parent for path in used}
    for folder in root.glob("codes/*"):
        if folder not in folders:
            yield folder
            continue
        for path in folder.glob("shard-*.faiss"):
            if path not in used:
                yield path
                yield from [c for c in [path.with_name(path.name + ".sha256")] if c.exists()]
    lexical = {root / manifest["lexical"] for manifest in kept}
    yield from (folder for folder in root.glob("lexical/*") if folder not in lexical)
    pins = {storage.read_json(pin)["factors"] for pin in root.glob("pins/*.json")}
    fitted = pins | {name for manifest in kept for name in manifest["factors"].values()}
    for folder in root.glob("factors/*"):
        if folder.name not in fitted:
            yield folder
        elif (folder / "factors.json").exists() and (folder / "partial").exists():
            yield folder / "partial"


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _newest(path: Path) -> float:
    return max((file.stat().st_mtime for file in _files(path)), default=0.0)
