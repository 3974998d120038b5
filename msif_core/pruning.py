"""Remove what no kept generation needs: old generations, and the files that only they used."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msif_core import storage
from msif_core.generations import parts
from msif_core.workspace import Workspace


@dataclass(frozen=True)
class Pruned:
    """What was removed, and how many bytes that were."""

    paths: tuple[Path, ...]
    bytes: int


def prune(workspace: Workspace, keep: int = 3, grace_seconds: float = 3600.0, dry_run: bool = False) -> Pruned:
    """Keep the published generation, those before it that `rollback` reaches, `keep` in all; drop the rest.

    Kept too: a generation that was built on the published one (withheld, or rolled back from), and one that was
    published within `grace_seconds`, as queries may still be reading it. Any file younger than that stays, and what was
    made of the newest corpora or is locked, so that a build under way loses nothing. Partial sums of finished factors
    go: they are needed only until the fit is done. What killed builds left behind goes. Answers are never touched.
    """
    edge = time.time() - grace_seconds
    manifests = {path.parent.name: storage.read_json(path) for path in workspace.generations.glob("*/manifest.json")}
    published = workspace.published()
    names = set(_lineage(manifests, published, keep))
    names |= {name for name, manifest in manifests.items() if published is not None and manifest["parent"] == published}
    # The published generation's file bears the time of its build; others bear the time they were replaced.
    names |= {name for name in manifests if _newest(workspace.generations / name) > edge}
    found = [path for path in _doomed(workspace, manifests, names, edge) if _newest(path) <= edge] if names else []
    doomed = [path for path in found if not set(found).intersection(path.parents)]
    size = sum(stat.st_size for path in doomed for stat in _stats(path))
    if not dry_run:
        with storage.told(workspace.root):
            for path in doomed:
                _remove(path)
    return Pruned(tuple(doomed), size)


def _lineage(manifests: dict[str, Any], published: str | None, keep: int) -> list[str]:
    """The published generation and its parents, at most `keep`."""
    names: list[str] = []
    while published in manifests and published not in names and len(names) < max(1, keep):
        names.append(published)
        published = manifests[published]["parent"]
    return names


def _doomed(workspace: Workspace, manifests: dict[str, Any], names: set[str], edge: float) -> Iterator[Path]:
    """Generations first: one that a killed `prune` left half done is none."""
    root = workspace.root
    kept = [manifests[name] for name in sorted(names)]
    yield from (workspace.generations / name for name in sorted(manifests.keys() - names))
    used = {root / path for manifest in kept for path in parts(manifest)}
    newest = [storage.read_json(path) for path in root.glob("corpus/[!.]*/manifest.json")]
    used |= {root / "lexical" / manifest["fingerprint"] for manifest in newest}
    yield from (folder for folder in root.glob("lexical/[!.]*") if folder not in used)
    yield from _corpora(root, used)
    stems = {path.stem for path in used if path.suffix == ".faiss"}
    stems |= {Path(shard["sequences"]).stem for manifest in newest for shard in manifest["shards"]}
    folders = {path.parent for path in used if path.suffix == ".faiss"}
    folders |= {root / manifest["exact"] for manifest in kept if manifest.get("exact")}
    unnamed = {*root.glob("codes/[!.]*"), *root.glob("exact/[!.]*")} - folders
    if all(_newest(folder) <= edge for folder in unnamed):  # else a build with other settings is under way
        yield from sorted(unnamed)
    for folder in sorted(folders):
        yield from (path for path in folder.glob("shard-*") if path.name.partition(".")[0] not in stems)
    yield from _factors(root, kept)
    left = (path for path in root.glob("[!.]*/**/.tmp-*") if not any(p.name[:5] == ".tmp-" for p in path.parents))
    yield from (path for path in left if not _in_use(path))


def _in_use(path: Path) -> bool:
    """Whether a temporary file is a lock that is held, or lies in a folder that is locked: a tokenize under way."""
    return storage.is_held(path if path.name.startswith(storage.LOCK) else storage.lock_of(path.parent))


def _corpora(root: Path, used: set[Path]) -> Iterator[Path]:
    """Versions that neither a kept generation nor the next build uses, and the files that only they list."""
    for folder in root.glob("corpus/[!.]*"):
        versions = {path for path in folder.glob("manifest-*.json") if path in used}
        kept: set[str] = set()
        for path in [*versions, *folder.glob("manifest.json")]:
            manifest = storage.read_json(path)
            versions.add(folder / f"manifest-{manifest['fingerprint']}.json")
            kept |= {_content(shard["sequences"]) for shard in manifest["shards"]}
        yield from (path for path in folder.glob("manifest-*.json") if path not in versions)
        yield from (p for p in folder.glob("[!.m]*-?????-*") if _content(p.name) not in kept)


def _content(name: str) -> str:
    """The part of a corpus file's name that says what it was made from: 00000-<fingerprint>."""
    return "-".join(name.partition(".")[0].split("-")[-2:])


def _factors(root: Path, kept: list[Any]) -> Iterator[Path]:
    pins = {storage.read_json(pin)["factors"] for pin in root.glob("pins/*.json")}
    fitted = pins | {name for manifest in kept for name in manifest["factors"].values()}
    for folder in root.glob("factors/[!.]*"):
        if folder.name not in fitted:
            yield folder
            yield from root.glob(f"corpus/*/quarantine-fit-{folder.name}-*")
        elif (folder / "factors.json").exists():
            yield from folder.glob("partial-*")


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of the files there, leaving out those that vanish meanwhile."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            if file.is_file():
                yield file.stat()


def _newest(path: Path) -> float:
    return max((stat.st_mtime for stat in _stats(path)), default=0.0)


def _remove(path: Path) -> None:
    """Remove a file or folder, or what is left of it: another process may be at it too."""
    with suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
