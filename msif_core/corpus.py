"""Documents to token sequences in Parquet shards, each with a content fingerprint.

A document goes to a shard by a hash of its id, so that a corpus that grows or changes leaves most shards'
bytes, and all that was built from them, as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import records, storage
from msif_core.batching import IGNORED, Sequences, sequence_fingerprint
from msif_core.config import CorpusSettings, Documents
from msif_core.errors import InputError

SHARD_BITS = 40
"""A sequence id is shard << 40 | row."""

RAW = pa.schema([("record", pa.string())])
SEQUENCES = pa.schema([
    ("sequence_id", pa.int64()), ("document_id", pa.string()), ("window", pa.int32()),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("fingerprint", pa.string()),
])  # fmt: skip
DOCUMENTS = pa.schema([
    ("document_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("metadata", pa.string()),
    ("n_sequences", pa.int32()), ("n_tokens", pa.int64()), ("shard", pa.int32()), ("fingerprint", pa.string()),
])  # fmt: skip
QUARANTINE = pa.schema([("document_id", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Queries:
    """Queries: what is asked, and the sequence whose loss is explained."""

    ids: list[str]
    prompts: list[str]
    completions: list[str]
    sequences: Sequences
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: npt.NDArray[np.integer]) -> Queries:
        """The queries at `rows`."""
        kept = [int(row) for row in rows]
        return Queries(
            [self.ids[r] for r in kept], [self.prompts[r] for r in kept], [self.completions[r] for r in kept],
            self.sequences.take(kept), [self.metadata[r] for r in kept],
        )  # fmt: skip


def encode(record: records.Record, tokenizer: Any, max_length: int, task: str) -> list[tuple[list[int], list[int]]]:
    """A record as windows of (input_ids, labels), labels aligned with input_ids.

    Text is cut into windows of `max_length`; a prompt with its completion is one window, the prompt's
    beginning cut away where both do not fit, with the loss on the completion and its end token.

    Raises:
        InputError: the record needs a tokenizer and the stage has none.
    """
    if "input_ids" in record:
        return [(list(record["input_ids"]), list(record.get("labels") or record["input_ids"]))]
    if tokenizer is None:
        raise InputError(f"record {record['id']!r} is text, but the stage's model has no tokenizer; give input_ids")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "prompt" in record:
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        completion = (tokenizer(record["completion"], add_special_tokens=False)["input_ids"] + end)[: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
        return [(prompt + completion, [IGNORED] * len(prompt) + completion)]
    if task == "classification":
        ids = tokenizer(record["text"], truncation=True, max_length=max_length)["input_ids"]
        return [(ids, [int(record["label"])] + [IGNORED] * (len(ids) - 1))]
    ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"] + end
    windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [(window, list(window)) for window in windows if len(window) > 1]


def tokenize(
    documents: Documents,
    folder: Path,
    *,
    tokenizer: Any,
    max_length: int,
    settings: CorpusSettings,
    task: str,
) -> Path:
    """Write `documents` as shards below `folder`; returns the manifest's path. Nothing is done twice."""
    tokens = storage.fingerprint(tokenizer.backend_tokenizer.to_str()) if tokenizer is not None else None
    key = storage.fingerprint(records.source_fingerprint(documents), settings.model_dump(), max_length, task, tokens)
    path = folder / "manifest.json"
    previous = storage.read_json(path) if path.exists() else None
    if (
        previous is not None
        and previous["key"] == key
        and all((folder / s["sequences"]).exists() for s in previous["shards"])
    ):
        return path
    skipped = records.Skipped()
    found = partition(documents, folder / "raw", settings, skipped, previous)
    shards = [tokenize_shard(raw, folder, n, tokenizer, max_length, task) for n, raw in enumerate(found)]
    storage.write_json(
        path,
        {
            "key": key,
            "fingerprint": storage.fingerprint([shard["digest"] for shard in shards]),
            "max_length": max_length,
            "shards": shards,
            "skipped": {"count": skipped.count, "first": skipped.first},
        },
    )
    return path


def partition(
    documents: Documents,
    folder: Path,
    settings: CorpusSettings,
    skipped: records.Skipped,
    previous: dict[str, Any] | None,
) -> list[Path]:
    """Stream the records into one raw file a shard; a rebuild keeps the number of shards."""  # fmt: skip
    found = list(records.read_records(documents, skipped, settings.skip_bad_records))
    if not found:
        raise InputError(f"{documents}: no document in it")
    wanted = math.ceil(len(found) / settings.shard_sequences)
    kept = len(previous["shards"]) if previous else wanted
    count = kept if wanted / 2 <= kept <= wanted * 2 else wanted
    buckets: list[list[str]] = [[] for _ in range(count)]
    for record in sorted(found, key=lambda r: str(r["id"])):
        buckets[shard_of(record["id"], count)].append(json.dumps(record, sort_keys=True, ensure_ascii=False))
    paths = []
    for number, bucket in enumerate(buckets):
        path = folder / f"raw-{number:05d}.parquet"
        _write(path, {"record": bucket}, RAW)
        paths.append(path)
    return paths


def shard_of(document_id: str, shards: int) -> int:
    """The shard of a document, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") % shards


def tokenize_shard(raw: Path, folder: Path, number: int, tokenizer: Any, max_length: int, task: str) -> dict[str, Any]:
    """Encode one shard's documents; returns its entry in the manifest."""
    rows: dict[str, list[Any]] = {name: [] for name in SEQUENCES.names}
    docs: dict[str, list[Any]] = {name: [] for name in DOCUMENTS.names}
    bad: dict[str, list[Any]] = {name: [] for name in QUARANTINE.names}
    for line in pq.read_table(raw)["record"].to_pylist():
        record = json.loads(line)
        windows = encode(record, tokenizer, max_length, task)
        if not windows:
            _append(bad, (record["id"], "no token has a target: the text is a single token"))
        for window, (ids, labels) in enumerate(windows):
            row = (number << SHARD_BITS) | len(rows["window"])
            _append(rows, (row, record["id"], window, ids, labels, sequence_fingerprint(ids, labels)))
        metadata = json.dumps(records.metadata_of(record), sort_keys=True, ensure_ascii=False)
        tokens = sum(len(ids) for ids, _ in windows)
        digest = hashlib.sha256(line.encode()).hexdigest()[:16]
        values = (
            record["id"],
            records.text_of(record),
            record.get("source"),
            metadata,
            len(windows),
            tokens,
            number,
            digest,
        )
        _append(docs, values)
    names = {kind: f"{kind}-{number:05d}.parquet" for kind in ("shard", "documents", "quarantine")}
    _write(folder / names["shard"], rows, SEQUENCES)
    _write(folder / names["documents"], docs, DOCUMENTS)
    _write(folder / names["quarantine"], bad, QUARANTINE)
    return {
        "sequences": names["shard"], "documents": names["documents"], "quarantine": names["quarantine"],
        "n_sequences": len(rows["window"]), "n_documents": len(docs["text"]), "n_quarantined": len(bad["reason"]),
        "digest": storage.file_digest(folder / names["shard"]),
    }  # fmt: skip


def _append(columns: dict[str, list[Any]], values: Sequence[Any]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _write(path: Path, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
    with storage.atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """A Parquet file of ours.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run again, it is made anew") from None


def read_shard(path: Path) -> Sequences:
    """The sequences of a shard file."""
    return _sequences(read_table(path))


def _sequences(table: pa.Table) -> Sequences:
    def lists(name: str) -> list[npt.NDArray[np.int32]]:
        column = table[name].combine_chunks()
        flat, offsets = column.flatten().to_numpy(), column.offsets.to_numpy()
        offsets = offsets - offsets[0]
        return [flat[offsets[i] : offsets[i + 1]] for i in range(len(column))]

    return Sequences(
        lists("input_ids"), lists("labels"), table["fingerprint"].to_pylist(), table["document_id"].to_pylist(),
        table["sequence_id"].to_numpy().astype(np.int64),
    )  # fmt: skip


def sequences_of_documents(folder: Path, documents: Sequence[str]) -> Sequences:
    """All sequences of the named documents, in order of sequence id; reads only their shards."""
    count = len(storage.read_json(folder / "manifest.json")["shards"])
    wanted: dict[int, list[str]] = {}
    for name in documents:
        wanted.setdefault(shard_of(name, count), []).append(name)
    tables = []
    for number in sorted(wanted):
        table = read_table(folder / f"shard-{number:05d}.parquet")
        mask = pa.compute.is_in(table["document_id"], value_set=pa.array(wanted[number]))
        tables.append(table.filter(mask))
    return _sequences(pa.concat_tables(tables))


def documents_of_sequences(folder: Path, ids: npt.NDArray[np.int64]) -> list[str]:
    """The distinct documents of sequences, in the order of first mention; negative ids are padding."""
    names: dict[int, str] = {}
    kept = ids[ids >= 0]
    for number in np.unique(kept >> SHARD_BITS):
        column = read_table(folder / f"shard-{number:05d}.parquet")["document_id"]
        for i in kept[(kept >> SHARD_BITS) == number]:
            names[int(i)] = column[int(i) & ((1 << SHARD_BITS) - 1)].as_py()
    return list(dict.fromkeys(names[int(i)] for i in kept))


def read_documents(folder: Path) -> pa.Table:
    """All documents of a tokenized corpus."""
    shards = storage.read_json(folder / "manifest.json")["shards"]
    return pa.concat_tables([read_table(folder / shard["documents"]) for shard in shards])


def document_texts(folder: Path, documents: Sequence[str]) -> dict[str, str]:
    """Texts of the named documents."""
    count = len(storage.read_json(folder / "manifest.json")["shards"])
    found: dict[str, str] = {}
    for number in {shard_of(name, count) for name in documents}:
        table = read_table(folder / f"documents-{number:05d}.parquet").select(["document_id", "text"])
        table = table.filter(pa.compute.is_in(table["document_id"], value_set=pa.array(list(documents))))
        found |= dict(zip(table["document_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return found


def sample_documents(folder: Path, count: int) -> list[str]:
    """A fixed random sample of documents that have sequences: those whose ids hash lowest."""
    table = read_documents(folder)
    names = table.filter(pa.compute.greater(table["n_sequences"], 0))["document_id"].to_pylist()
    return sorted(names, key=lambda name: hashlib.sha256(b"sample" + name.encode()).digest())[:count]


def quarantine(folder: Path, name: str, documents: Sequence[str], reason: str) -> None:
    """Set documents aside with a reason, in a table of their own."""
    if documents:
        rows = {"document_id": sorted(set(documents)), "reason": [reason] * len(set(documents))}
        _write(folder / f"quarantine-{name}.parquet", rows, QUARANTINE)


def encode_list(
    found: Sequence[records.Record], tokenizer: Any, max_length: int, task: str
) -> tuple[Sequences, npt.NDArray[np.int64]]:
    """Records as sequences, and for each sequence the row of its record."""
    windows = [(row, pair) for row, record in enumerate(found) for pair in encode(record, tokenizer, max_length, task)]
    ids = [np.asarray(pair[0], np.int32) for _, pair in windows]
    labels = [np.asarray(pair[1], np.int32) for _, pair in windows]
    sequences = Sequences(
        ids, labels, [sequence_fingerprint(a, b) for a, b in zip(ids, labels, strict=True)],
        [str(found[row]["id"]) for row, _ in windows], np.arange(len(windows), dtype=np.int64),
    )  # fmt: skip
    return sequences, np.asarray([row for row, _ in windows], dtype=np.int64)


def load_queries(source: Path | Sequence[records.Record], tokenizer: Any, max_length: int, task: str) -> Queries:
    """Queries of a jsonl file or of a list of records, one sequence each.

    Raises:
        InputError: a record is malformed, there is none, or one takes more than a window.
    """
    found = records.read_list(source)
    if not found:
        raise InputError(f"{source}: no query in it")
    sequences, rows = encode_list(found, tokenizer, max_length, task)
    if len(sequences) != len(found):
        counts = np.bincount(rows, minlength=len(found))
        first = found[int(np.flatnonzero(counts != 1)[0])]["id"]
        raise InputError(f"query {first!r} does not fit one window of {max_length} tokens; shorten it")
    prompts = [str(r.get("prompt", "")) for r in found]
    completions = [str(r.get("completion", r.get("text", ""))) for r in found]
    return Queries(
        [str(r["id"]) for r in found],
        prompts,
        completions,
        sequences,
        [records.metadata_of(r) for r in found],
    )
