"""Generations: what a build changed and saved, whether it may be published, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from msif_core import corpus, storage
from msif_core.config import IndexSettings
from msif_core.errors import InputError
from msif_core.evaluation.retrieval_quality import decisive
from msif_core.workspace import Workspace

Manifest = dict[str, Any]


def manifest_of(workspace: Workspace, generation: str | None) -> Manifest | None:
    """The manifest of a generation, None where there is no such generation."""
    path = workspace.generations / (generation or "none") / "manifest.json"
    return dict(storage.read_json(path)) if generation is not None and path.exists() else None


def withheld(folder: Path, settings: IndexSettings) -> str | None:
    """Why the generation in `folder` may not be published, None where it may."""
    manifest = storage.read_json(folder / "manifest.json")
    if Workspace(folder.parents[1]).rolled_back(manifest["content"]).exists():
        return (
            f"generation {manifest['generation']} is what was rolled back: it is kept but not published; "
            f"`msif rollback CONFIG --to {manifest['generation']}` publishes it"
        )
    row = decisive(manifest["recall"].get("found", []))
    if row is None or row["recall"] >= settings.min_recall:
        return None
    return (
        f"recall@10 of the gradient index is {row['recall']:.3f} at {row['share']:.1%} re-scored, below "
        f"index.min_recall = {settings.min_recall:g}: generation {manifest['generation']} is kept but not published"
    )


def rolled_back(workspace: Workspace) -> list[Manifest]:
    """The generations that a build does not publish again, the newest last."""
    found = [storage.read_json(path) for path in workspace.generations.glob("*/manifest.json")]
    marked = [manifest for manifest in found if workspace.rolled_back(manifest["content"]).exists()]
    return sorted(marked, key=lambda manifest: str(manifest["created"]))


def rollback(workspace: Workspace, to: str | None = None) -> str:
    """Publish the generation before the published one, or the one named `to`; returns its id.

    The content of the one left behind is not published again by a rebuild, only by a generation's name.

    Raises:
        InputError: there is none, or what it needs is gone.
    """
    current = workspace.current_generation()
    wanted = to or storage.read_json(current / "manifest.json")["parent"]
    if wanted is None:
        raise InputError(f"generation {current.name} is the first; there is none before it")
    manifest = manifest_of(workspace, wanted)
    if manifest is None or (gone := [part for part in parts(manifest) if not (workspace.root / part).exists()]):
        missing = gone[0] if manifest else "its manifest"
        raise InputError(f"generation {wanted} is not here or pruned ({missing} is gone); run `msif rebuild CONFIG`")
    if wanted != current.name:
        content = storage.read_json(current / "manifest.json")["content"]
        storage.write_text(workspace.rolled_back(content), f"{current.name}: {wanted} was published instead\n")
    workspace.rolled_back(manifest["content"]).unlink(missing_ok=True)
    workspace.publish(wanted)
    return str(wanted)


def parts(manifest: Manifest) -> list[str]:
    """Paths below the workspace that answering from a generation takes, beside its factors."""
    return [*manifest.get("codes", []), *manifest.get("corpora", {}).values(), *filter(None, [manifest.get("lexical")])]


def changes(
    root: Path, before: Manifest | None, shards: list[Path], documents: list[Path], codes: list[str]
) -> dict[str, dict[str, int]]:
    """What a build added, changed and removed against the generation before, and the sketches it saved.

    Reads the files that differ alone. `shards` and `documents` are the new corpus's, `codes` the new codes' paths
    below `root`; a receipt beside each of those tells how it was made.
    """
    parent, sketched = before["generation"] if before else None, 0
    for path in set(codes) - set(before["codes"] if before else ()):
        receipt = storage.read_json((root / path).with_suffix(".json"))
        # Codes that stand from an earlier generation still cost this build nothing.
        sketched += receipt["sketched"] if receipt["parent"] == parent else 0
    come_and_gone, removed = {"added": _rows(documents), "changed": 0, "removed": 0}, 0
    if before is not None:
        folder, entries = corpus.shard_entries(root / before["corpora"][before["settings"]["attribute_to"]])
        was, now = (_sequences(files) for files in _apart([folder / e["sequences"] for e in entries], shards))
        gone, come = (_documents(files) for files in _apart([folder / e["documents"] for e in entries], documents))
        come_and_gone = {
            "added": len(come.keys() - gone.keys()),
            "changed": sum(gone[name] != come[name] for name in come.keys() & gone.keys()),
            "removed": len(gone.keys() - come.keys()),
        }
        removed = sum((was - now).values())
    reused = _rows(shards) - sketched
    return {"documents": come_and_gone, "sequences": {"sketched": sketched, "reused": reused, "removed": removed}}


def _apart(old: list[Path], new: list[Path]) -> tuple[set[Path], set[Path]]:
    """The files of each that the other lacks."""
    return set(old) - set(new), set(new) - set(old)


def _rows(paths: Iterable[Path]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _sequences(paths: Iterable[Path]) -> Counter[str]:
    return Counter(fingerprint for path in paths for fingerprint in corpus.fingerprints(path))


def _documents(paths: Iterable[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        table = corpus.read_table(path, ["document_id", "fingerprint"])
        found |= dict(zip(table["document_id"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))
    return found
