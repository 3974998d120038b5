"""Which case a build of the index met, and what it saved, in words."""

from typing import Any


def what_changed(before: dict[str, Any] | None, after: dict[str, Any], withheld: str | None = None) -> str:
    """Which case a rebuild met, why, and what it saved, from the generations' manifests.

    `withheld` says why the new one was not published, where it was not.
    """
    if before is not None and before["generation"] == after["generation"]:
        return f"nothing changed: generation {after['generation']} stays published"
    kept = before is not None and before["factors"] == after["factors"]
    case = f"{_case(before, after)}; {saved(after['changes'])}{drifted(after.get('drift') or {}) if kept else ''}"
    if withheld is not None:
        return f"{case}; {withheld}" + (f", {before['generation']} stays published" if before else "")
    return f"{case}; generation {after['generation']} " + (
        f"replaces {before['generation']}" if before else "is published"
    )


def _case(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    if before is None:
        return "first build"
    refitted = [name for name, factors in after["factors"].items() if before["factors"].get(name) != factors]
    if refitted:
        return f"full build: the model, the curvature settings or the pin of {', '.join(refitted)} changed"
    if before["codes_key"] != after["codes_key"]:
        return "all codes anew: the filter, the sketch or the index kind changed"
    return "incremental, factors kept"


def saved(changes: dict[str, dict[str, int]]) -> str:
    """The work of a build and what it saved, in words."""
    documents, sequences = changes["documents"], changes["sequences"]
    return (
        f"documents: {documents['added']:,} added, {documents['changed']:,} changed, {documents['removed']:,} removed; "
        f"sequences: {sequences['sketched']:,} sketched, {sequences['reused']:,} reused, "
        f"{sequences['removed']:,} removed"
    )


def drifted(drift: dict[str, Any]) -> str:
    """How far the pinned factors are from the corpus, in words; nothing where it was not measured."""
    if not drift:
        return ""
    difference, noise = f"{drift['difference']:.0%}", f"{drift['noise']:.0%}"
    return f"; the pinned eigenvalues differ from today's by {difference} (sampling noise {noise})"
