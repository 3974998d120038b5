"""How many sequences and tokens a stage has: counted where it is tokenized, else estimated from its files."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from msif_core import records, storage
from msif_core.config import Config, HubDataset, Stage
from msif_core.dealing import shard_count
from msif_core.errors import InputError
from msif_core.meta_models import KNOWN
from msif_core.tokenizers import load_tokenizer
from msif_core.workspace import Workspace

CHARACTERS_PER_TOKEN, ENCODED = 4.0, 100_000
"""Of English text, where a stage's tokenizer is not at hand; else as in so many characters of each file."""

SHRUNK = 3.5
"""Size of records to that of their compressed file, of English text too."""


def corpus_size(config: Config, stage: Stage, window: int, given: int | None) -> tuple[int, int, int, str]:
    """Sequences, tokens, shards, and how they are known: counted, given, estimated from the files, or assumed."""
    per_shard = config.corpus.shard_sequences
    if given is not None:
        return given, given * window, shard_count(given, per_shard), f"{given:,} sequences of {window} tokens as given"
    folder = Workspace(config.workspace.resolve()).corpus(stage.name)
    if (folder / "manifest.json").exists():
        shards = storage.read_json(folder / "manifest.json")["shards"]
        columns = (pq.read_table(folder / s["documents"], columns=["n_tokens"])["n_tokens"] for s in shards)
        tokens = sum(int(column.to_numpy().sum()) for column in columns)
        return sum(s["n_sequences"] for s in shards), tokens, len(shards), ""
    sources = stage.documents if isinstance(stage.documents, list) else [stage.documents]
    try:
        found = [_estimate(source, window, _tokenizer(config, stage)) for source in sources]
    except LookupError:
        count = config.curvature.max_sequences
        note = f"its documents are not here: {count:,} sequences of {window} tokens assumed, see --sequences"
        return count, count * window, shard_count(count, per_shard), note
    count, tokens = (sum(column) for column in zip(*found, strict=True))
    if not count:
        raise InputError(f"{stage.documents}: no document in it")
    return count, tokens, shard_count(count, per_shard), "estimated from the size of its files"


def _tokenizer(config: Config, stage: Stage) -> Any:
    """The stage's, None where it has none or is planned for without the hub."""
    if stage.model in KNOWN and not Path(stage.model).exists():
        return None
    return load_tokenizer(stage.model, stage.revision, config.compute.trust_remote_code)


def _characters_per_token(texts: list[str], tokenizer: Any) -> float:
    """Of the first of the texts."""
    ends = list(itertools.accumulate(len(text) for text in texts))
    some = texts[: 1 + bisect_left(ends, ENCODED)]
    if tokenizer is None or not some:
        return CHARACTERS_PER_TOKEN
    return sum(map(len, some)) / max(1, sum(len(ids) for ids in tokenizer(some).input_ids))


def _estimate(source: str | HubDataset, window: int, tokenizer: Any, sample: int = 500) -> tuple[int, int]:
    """Sequences and tokens of a glob, from its first records and the files' sizes.

    Raises:
        LookupError: there is no file.
        InputError: a file holds no record.
    """
    if isinstance(source, HubDataset):
        raise LookupError(source.dataset)
    try:
        files = records.files_of(source)
    except InputError as error:
        raise LookupError(source) from error
    documents, counts, lengths, read = 0.0, 0, 0, 0
    for path in files:
        texts, stored = [], 0
        for record in records.read_records(str(path), records.Skipped(), skip=True):
            texts.append(record.get("input_ids") or records.text_of(record))
            stored += len(str(record).encode())
            if len(texts) == sample:
                break
        if path.suffix == ".parquet":
            documents += pq.ParquetFile(path).metadata.num_rows
        else:
            size = path.stat().st_size * (SHRUNK if path.suffix in (".gz", ".bz2", ".zst") else 1)
            documents += size / max(1.0, stored / max(1, len(texts)))
        characters = _characters_per_token([t for t in texts if isinstance(t, str)], tokenizer)
        tokens = [math.ceil(len(t) / (characters if isinstance(t, str) else 1)) for t in texts]
        counts += sum(math.ceil(n / window) for n in tokens)
        lengths += sum(tokens)
        read += len(texts)
    scale = documents / max(1, read)
    return round(counts * scale), round(lengths * scale)
