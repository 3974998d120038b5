"""Records dealt out to shards by a hash of their ids, on disk, whatever their number."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msif_core import records
from msif_core.config import CorpusSettings, Documents
from msif_core.errors import InputError

SIZED_BY = 256
"""The first so many records tell how many windows a record has."""

HELD_BYTES = 1 << 26
"""Bytes of records held while they are dealt out to shards."""


def partition(
    documents: Documents,
    folder: Path,
    settings: CorpusSettings,
    skipped: records.Skipped,
    previous: dict[str, Any] | None,
    windows: Callable[[records.Record], int],
) -> list[Path]:
    """Stream the records into one raw file a shard.

    Two passes over disk and never a corpus in memory: the number of shards follows from the number of records
    and the windows of the first `SIZED_BY` of them.

    Raises:
        InputError: there is no record.
    """
    spool, count, sized = folder / "spool", 0, 0
    with open(spool, "wb") as handle:
        for record in records.read_records(documents, skipped, settings.skip_bad_records):
            try:
                line = canonical_json(record).encode()
            except UnicodeEncodeError:
                message = f"{documents}, record {record['id']!a}: a lone surrogate is no text; re-encode it"
                skipped.add(message, settings.skip_bad_records)
                continue
            if count < SIZED_BY:
                sized += windows(record)
            count += 1
            name = str(record["id"]).encode()
            handle.write(hashlib.sha256(name).digest()[:8] + len(line).to_bytes(8, "big") + line)
    if not count:
        raise InputError(f"{documents}: no document in it")
    found = count * sized / min(count, SIZED_BY)
    shards = shard_count(found, settings.shard_sequences, len(previous["shards"]) if previous else None)
    paths = [folder / f"raw-{number:05d}" for number in range(shards)]
    for path in paths:
        path.touch()
    held: dict[Path, list[bytes]] = {}
    size = 0
    with open(spool, "rb") as handle:
        while head := handle.read(16):
            line = handle.read(int.from_bytes(head[8:], "big"))
            held.setdefault(paths[int.from_bytes(head[:8], "big") % shards], []).append(line + b"\n")
            size += len(line)
            if size > HELD_BYTES:
                _append_lines(held)
                size = 0
    _append_lines(held)
    spool.unlink()
    return paths


def shard_count(windows: float, per_shard: int, kept: int | None = None) -> int:
    """The power of two that comes nearest to `per_shard` windows in a shard; `kept` while they are half to twice that.

    Where the number doubles, a shard's documents go to two of the new ones, and where it halves, those of two to one:
    what was built of them is found again in few files (`related_shards`).
    """
    wanted = max(1.0, windows / per_shard)
    return kept if kept and wanted / 2 <= kept <= wanted * 2 else 2 ** round(math.log2(wanted))


def related_shards(shard: int, shards: int, before: int) -> range:
    """Shards, of `before`, that may hold documents which are in this one of `shards` now."""
    step = math.gcd(shards, before)
    return range(shard % step, before, step)


def _append_lines(held: dict[Path, list[bytes]]) -> None:
    for path, lines in held.items():
        with open(path, "ab") as handle:
            handle.writelines(lines)
    held.clear()


def canonical_json(value: Any) -> str:
    """JSON that is the same for the same value; dates and the like as text, NaN and infinities as null."""

    def finite(part: Any) -> Any:
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        if isinstance(part, dict):
            return {str(key): finite(item) for key, item in part.items()}
        return [finite(item) for item in part] if isinstance(part, list | tuple) else part

    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str, allow_nan=False)
    except (ValueError, TypeError):
        return json.dumps(finite(value), sort_keys=True, ensure_ascii=False, default=str)


def shard_of(document_id: str, shards: int) -> int:
    """The shard of a document, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") % shards
