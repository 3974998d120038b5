"""Documents to token sequences in Parquet shards, each with a content fingerprint.

A document goes to a shard by a hash of its id, so that a corpus that grows or changes leaves most shards, and all
that was built from them, as they were. A shard's files are named by what they were made from and never change;
`manifest-<fingerprint>.json` lists those of one version of the corpus, `manifest.json` those of the newest. The
functions that read take either: the folder, for the newest version, or a version's manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import records, storage
from msif_core.batching import Sequences, sequence_fingerprint
from msif_core.config import CorpusSettings, Documents
from msif_core.dealing import canonical_json, partition, shard_of
from msif_core.encoding import encode
from msif_core.errors import InputError
from msif_core.tokenizers import first_unknown, tokenizer_fingerprint, unknown_token

SHARD_BITS = 40
"""A sequence id is shard << 40 | row."""

ENCODING = 3
"""Version of how records become tokens: other ones are other corpora."""

MOST_UNKNOWN = 0.2
"""Share of unknown tokens from which on a corpus is taken to be encoded with a tokenizer that is not its model's."""

SEQUENCES = pa.schema([
    ("sequence_id", pa.int64()), ("document_id", pa.string()), ("window", pa.int32()),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("fingerprint", pa.string()),
])  # fmt: skip
DOCUMENTS = pa.schema([
    ("document_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("metadata", pa.string()),
    ("n_sequences", pa.int32()), ("n_tokens", pa.int64()), ("shard", pa.int32()), ("fingerprint", pa.string()),
])  # fmt: skip
QUARANTINE = pa.schema([("document_id", pa.string()), ("reason", pa.string())])


def tokenize(
    documents: Documents,
    folder: Path,
    *,
    tokenizer: Any,
    max_length: int,
    settings: CorpusSettings,
    task: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `documents` as shards below `folder`, telling `progress` of each; returns the newest manifest's path.

    The source is streamed once. A shard whose documents are as before is not encoded again, one whose file is
    damaged or lost is. Older versions stay readable (`msif prune` removes them).
    """
    recipe = storage.fingerprint(ENCODING, max_length, task, settings.start, tokenizer_fingerprint(tokenizer))
    key = storage.fingerprint(records.source_fingerprint(documents), settings.model_dump(), recipe)
    path = folder / "manifest.json"
    previous = storage.read_json(path) if path.exists() else None
    if previous is not None and previous["key"] == key and all(_is_whole(folder, s) for s in previous["shards"]):
        return _keep_version(path, previous)
    skipped = records.Skipped()

    def windows(record: records.Record) -> int:
        return len(encode([record], tokenizer, max_length, task, settings.start)[0])

    storage.make_folder(folder)
    with storage.told(folder), TemporaryDirectory(prefix=".tmp-raw-", dir=folder) as raw:
        found = partition(documents, Path(raw), settings, skipped, previous, windows)
        shards = []
        for number, part in enumerate(found):
            progress(number, len(found))
            shards.append(tokenize_shard(part, folder, number, tokenizer, max_length, task, settings.start, recipe))
    if not any(shard["n_sequences"] for shard in shards):
        raise InputError(f"{documents}: no document in it has a token to predict{_to(tokenizer)}")
    unknown = _unknown(folder, shards, tokenizer)
    if unknown is not None and unknown["share"] > MOST_UNKNOWN:
        raise InputError(
            f"{documents}: {unknown['share']:.0%} of its tokens are unknown{_to(tokenizer)}, for example "
            f"{unknown['example']!r} of document {unknown['document']!r}; put the tokenizer there that the model was "
            "trained with, or give the documents as input_ids"
        )
    manifest = {
        "key": key,
        "fingerprint": storage.fingerprint([shard["sequences"] for shard in shards]),
        "max_length": max_length,
        "unknown": unknown,
        "settings": settings.model_dump(),
        "shards": shards,
        "quarantined": sum(shard["n_quarantined"] for shard in shards),
        "skipped": {"count": skipped.count, "first": skipped.first},
    }
    _keep_version(path, manifest)
    storage.write_json(path, manifest)
    return path


def _to(tokenizer: Any) -> str:
    """Whose fault it may be."""
    return "" if tokenizer is None else f" to the tokenizer of {tokenizer.name_or_path} ({type(tokenizer).__name__})"


def _unknown(folder: Path, shards: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Any] | None:
    """Share of the tokens that stand for what the tokenizer does not know, and an example; None where it knows all."""
    token = unknown_token(tokenizer)
    if token is None:
        return None
    counts = [shard["n_unknown"] for shard in shards]
    share = sum(counts) / max(1, sum(shard["n_tokens"] for shard in shards))
    first = next((shard for shard, count in zip(shards, counts, strict=True) if count), None)
    if first is None:
        return {"share": share}
    table = read_table(folder / first["sequences"], ["document_id", "input_ids"])
    row = next(row for row, ids in enumerate(table["input_ids"].to_pylist()) if token in ids)
    name = table["document_id"][row].as_py()
    documents = read_table(folder / first["documents"], ["document_id", "text"])
    text = documents["text"][documents["document_id"].to_pylist().index(name)].as_py()
    return {"share": share, "document": name, "example": first_unknown(tokenizer, text)}


def _keep_version(path: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest under its version's name too, before it becomes the newest."""
    version = version_path(path.parent, manifest)
    if not version.exists():
        storage.write_json(version, manifest)
    return path


def version_path(folder: Path, manifest: dict[str, Any]) -> Path:
    """Where the manifest of that version of the corpus in `folder` stands."""
    return folder / f"manifest-{manifest['fingerprint']}.json"


def shard_entries(where: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A corpus's folder and the entries of its shards; `where` is the folder or a version's manifest."""
    path = where if where.suffix == ".json" else where / "manifest.json"
    return path.parent, list(storage.read_json(path)["shards"])


def tokenize_shard(
    raw: Path, folder: Path, number: int, tokenizer: Any, max_length: int, task: str, start: str, recipe: str
) -> dict[str, Any]:
    """Encode one shard's documents, unless its files stand whole; returns its entry in the manifest.

    Documents go by id, so that the order of the source does not matter. The receipt is written last: without it
    the files do not count.
    """
    lines = sorted(raw.read_text(encoding="utf-8").split("\n")[:-1], key=lambda line: str(json.loads(line)["id"]))
    stem = f"{number:05d}-{storage.fingerprint(recipe, number, lines)}"
    receipt = folder / f"shard-{stem}.json"
    if receipt.exists():
        known = storage.read_json(receipt)
        if _is_whole(folder, known["entry"]):
            return dict(known["entry"])
    rows: dict[str, list[Any]] = {name: [] for name in SEQUENCES.names}
    docs: dict[str, list[Any]] = {name: [] for name in DOCUMENTS.names}
    bad: dict[str, list[Any]] = {name: [] for name in QUARANTINE.names}
    found, unknown = [json.loads(line) for line in lines], unknown_token(tokenizer)
    encoded, n_unknown = encode(found, tokenizer, max_length, task, start), 0
    for line, record, windows in zip(lines, found, encoded, strict=True):
        if not windows:
            _append(bad, (record["id"], "no token has a target: one token at most, or no label"))
        for window, (ids, labels) in enumerate(windows):
            row = (number << SHARD_BITS) | len(rows["window"])
            _append(rows, (row, record["id"], window, ids, labels, sequence_fingerprint(ids, labels)))
            n_unknown += 0 if unknown is None else ids.count(unknown)
        source, metadata = record.get("source"), canonical_json(records.metadata_of(record))
        source = source if source is None or isinstance(source, str) else canonical_json(source)
        tokens = sum(len(ids) for ids, _ in windows)
        digest = hashlib.sha256(line.encode()).hexdigest()[:16]
        text = records.text_of(record)
        _append(docs, (record["id"], text, source, metadata, len(windows), tokens, number, digest))
    names = {kind: f"{kind}-{stem}.parquet" for kind in ("shard", "documents", "quarantine")}
    _write(folder / names["shard"], rows, SEQUENCES)
    _write(folder / names["documents"], docs, DOCUMENTS)
    _write(folder / names["quarantine"], bad, QUARANTINE)
    entry = {
        "sequences": names["shard"], "documents": names["documents"], "quarantine": names["quarantine"],
        "n_sequences": len(rows["window"]), "n_documents": len(docs["text"]), "n_quarantined": len(bad["reason"]),
        "n_tokens": sum(docs["n_tokens"]), "n_unknown": n_unknown,
        "digest": storage.file_digest(folder / names["shard"]),
    }  # fmt: skip
    others = {kind: storage.file_digest(folder / names[kind]) for kind in ("documents", "quarantine")}
    storage.write_json(receipt, {"entry": entry, "others": others})
    return entry


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether the files of a shard stand with the bytes that its receipt promises."""
    receipt = (folder / entry["sequences"]).with_suffix(".json")
    others = storage.read_json(receipt)["others"] if receipt.exists() else {}
    wanted = {entry["sequences"]: entry["digest"]} | {entry[kind]: digest for kind, digest in others.items()}
    files = [entry[kind] for kind in ("sequences", "documents", "quarantine")]
    return all((folder / f).exists() and storage.file_digest(folder / f) == wanted.get(f) for f in files)


def _append(columns: dict[str, list[Any]], values: Sequence[Any]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _write(path: Path, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
    with storage.atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of ours, all of it or some columns.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run again, it is made anew") from None


def read_shard(path: Path) -> Sequences:
    """The sequences of a shard file."""
    return _sequences(read_table(path))


def read_rows(paths: Sequence[Path], rows_of: Callable[[list[str]], npt.NDArray[np.int64]]) -> Sequences:
    """The sequences of shard files at the rows that `rows_of(fingerprints)` picks of each."""
    tables = ((table, rows_of(table["fingerprint"].to_pylist())) for table in map(read_table, paths))
    return _sequences(pa.concat_tables([table.take(rows) for table, rows in tables]))


def take_rows(places: Iterable[tuple[Path, int]]) -> Sequences:
    """The sequences at (shard file, row), in the order of files and rows."""
    rows: dict[Path, list[int]] = {}
    for path, row in sorted(places):
        rows.setdefault(path, []).append(row)
    return _sequences(pa.concat_tables([read_table(path).take(found) for path, found in rows.items()]))


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


def fingerprints(path: Path) -> list[str]:
    """Fingerprints of a shard file's sequences, in row order."""
    return list(read_table(path, ["fingerprint"])["fingerprint"].to_pylist())


def names(path: Path) -> tuple[list[str], list[str]]:
    """Fingerprints and document ids of a shard file's sequences, in row order."""
    table = read_table(path, ["fingerprint", "document_id"])
    return table["fingerprint"].to_pylist(), table["document_id"].to_pylist()


def rows_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of sequences in their shard."""
    return ids & ((1 << SHARD_BITS) - 1)


def tables_of_documents(
    where: Path, kind: str, documents: Sequence[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Rows of the named documents in the shards' files of a `kind`, in order of shard; reads only their shards."""
    folder, shards = shard_entries(where)
    wanted: dict[int, list[str]] = {}
    for name in documents:
        wanted.setdefault(shard_of(name, len(shards)), []).append(name)
    for number in sorted(wanted):
        table = read_table(folder / shards[number][kind], columns)
        yield table.filter(pa.compute.is_in(table["document_id"], value_set=pa.array(wanted[number])))


def sequences_of_documents(where: Path, documents: Sequence[str]) -> Sequences:
    """All sequences of the named documents, in order of sequence id."""
    tables = [SEQUENCES.empty_table()]  # no name, no shard
    return _sequences(pa.concat_tables([*tables, *tables_of_documents(where, "sequences", documents)]))


def documents_of_sequences(where: Path, ids: npt.NDArray[np.int64]) -> list[str]:
    """The distinct documents of sequences, in the order of first mention; negative ids are padding."""
    folder, shards = shard_entries(where)
    names: dict[int, str] = {}
    kept = ids[ids >= 0]
    for number in np.unique(kept >> SHARD_BITS):
        column = read_table(folder / shards[number]["sequences"], ["document_id"])["document_id"]
        own = kept[(kept >> SHARD_BITS) == number]
        names |= {int(i): column[int(row)].as_py() for i, row in zip(own, rows_of(own), strict=True)}
    return list(dict.fromkeys(names[int(i)] for i in kept))


def read_documents(where: Path, columns: list[str] | None = None) -> pa.Table:
    """All documents of a tokenized corpus."""
    folder, shards = shard_entries(where)
    return pa.concat_tables([read_table(folder / shard["documents"], columns) for shard in shards])


def rows_of_documents(where: Path, documents: Sequence[str], columns: list[str]) -> dict[str, dict[str, Any]]:
    """Columns of the named documents that the corpus knows, by id."""
    tables = tables_of_documents(where, "documents", documents, ["document_id", *columns])
    return {row["document_id"]: row for table in tables for row in table.to_pylist()}


def texts(where: Path) -> Iterator[tuple[str, str]]:
    """Id and text of every document, read shard by shard."""
    folder, entries = shard_entries(where)
    for entry in entries:
        table = read_table(folder / entry["documents"], ["document_id", "text"])
        yield from zip(table["document_id"].to_pylist(), table["text"].to_pylist(), strict=True)


def sample_documents(where: Path, count: int) -> list[str]:
    """A fixed random sample of documents that have sequences: the first by shard and then by another hash of the id.

    A hash has dealt the documents out to the shards, so that the first shards are as random as any.
    """
    folder, shards = shard_entries(where)
    found: list[str] = []
    for shard in shards:
        if len(found) >= count:
            break
        table = read_table(folder / shard["documents"], ["document_id", "n_sequences"])
        names = table.filter(pa.compute.greater(table["n_sequences"], 0))["document_id"].to_pylist()
        found += sorted(names, key=lambda name: hashlib.sha256(b"sample" + name.encode()).digest())
    return found[:count]


def quarantine(folder: Path, name: str, documents: Sequence[str], reason: str) -> None:
    """Set documents aside with a reason, in a table of their own; without any there is none."""
    path, found = folder / f"quarantine-{name}.parquet", sorted(set(documents))
    if found:
        _write(path, {"document_id": found, "reason": [reason] * len(found)}, QUARANTINE)
    else:
        path.unlink(missing_ok=True)


def encode_list(
    found: Sequence[records.Record],
    tokenizer: Any,
    max_length: int,
    task: str,
    start: str = "auto",
    last_turn: bool = False,
) -> tuple[Sequences, npt.NDArray[np.int64]]:
    """Records as sequences (see `encode`), and for each sequence the row of its record."""
    encoded = encode(found, tokenizer, max_length, task, start, last_turn)
    windows = [(row, pair) for row, own in enumerate(encoded) for pair in own]
    ids = [np.asarray(pair[0], np.int32) for _, pair in windows]
    labels = [np.asarray(pair[1], np.int32) for _, pair in windows]
    sequences = Sequences(
        ids, labels, [sequence_fingerprint(a, b) for a, b in zip(ids, labels, strict=True)],
        [str(found[row]["id"]) for row, _ in windows], np.arange(len(windows), dtype=np.int64),
    )  # fmt: skip
    return sequences, np.asarray([row for row, _ in windows], dtype=np.int64)
