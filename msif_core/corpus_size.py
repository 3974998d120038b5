"""How many sequences and tokens a stage has: counted where it is tokenized, else estimated from its files."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from msif_core import records, storage
from msif_core.config import Config, HubDataset, Stage
from msif_core.dealing import shard_count
from msif_core.errors import InputError
from msif_core.meta_models import KNOWN
from msif_core.tokenizers import load_tokenizer
from msif_core.workspace import Workspace

CHARACTERS_PER_TOKEN, ENCODED = 4.0, 100_000
"""The first is assumed where a stage's tokenizer is not at hand; with it, so many characters of a file are encoded."""

SHRUNK = 3.5
"""Size of records to that of their compressed file, of English text too."""


@dataclass(frozen=True)
class CorpusSize:
    """A stage's corpus; `assumed` says how its numbers are known, empty where they are counted.

    `lengths` are tokens of its sequences, or of a sample of them, int64.
    """

    sequences: int
    tokens: int
    shards: int
    lengths: npt.NDArray[np.int64]
    assumed: str = ""

    def padded(self, count: int, batch_tokens: int) -> float:
        """Tokens of a sequence with the padding of its batch, on average of `count` sequences like these."""
        lengths = np.quantile(self.lengths, np.linspace(1, 0, count), method="nearest")
        start, total = 0, 0
        while start < count:  # as `batches`: the longest first
            rows = min(count - start, max(1, batch_tokens // int(lengths[start])))
            total += rows * int(lengths[start])
            start += rows
        return total / count


def corpus_size(config: Config, stage: Stage, window: int, given: int | None) -> CorpusSize:
    """Counted, given, estimated from the files, or assumed.

    Raises:
        InputError: a file holds no record.
    """
    per_shard = config.corpus.shard_sequences
    whole = np.array([window])
    if given is not None:
        note = f"{given:,} sequences of {window} tokens as given"
        return CorpusSize(given, given * window, shard_count(given, per_shard), whole, note)
    folder = Workspace(config.workspace.resolve()).corpus(stage.name)
    if (folder / "manifest.json").exists():
        shards = storage.read_json(folder / "manifest.json")["shards"]
        columns = [pq.read_table(folder / s["documents"], columns=["n_tokens"])["n_tokens"] for s in shards]
        tokens = np.concatenate([column.to_numpy() for column in columns])
        return CorpusSize(
            sum(s["n_sequences"] for s in shards), int(tokens.sum()), len(shards), window_lengths(tokens, window)
        )
    sources = stage.documents if isinstance(stage.documents, list) else [stage.documents]
    try:
        found = [_estimate(source, window, _tokenizer(config, stage)) for source in sources]
    except LookupError:
        count = config.curvature.max_sequences
        note = f"its documents are not here: {count:,} sequences of {window} tokens assumed, see --sequences"
        return CorpusSize(count, count * window, shard_count(count, per_shard), whole, note)
    counts, totals, lengths = zip(*found, strict=True)
    if not sum(counts):
        raise InputError(f"{stage.documents}: no document in it")
    note, count = "estimated from the size of its files", sum(counts)
    return CorpusSize(count, sum(totals), shard_count(count, per_shard), np.concatenate(lengths), note)


def window_lengths(tokens: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    """Tokens of each window of texts of so many tokens, the whole windows first; at least one."""
    rest = tokens % window
    return np.concatenate([np.full(int((tokens // window).sum()), window), rest[rest > 0], [1] * (not tokens.any())])


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


def _estimate(
    source: str | HubDataset, window: int, tokenizer: Any, sample: int = 500
) -> tuple[int, int, npt.NDArray[np.int64]]:
    """Sequences and tokens of a glob, and those of some windows: from its first records and the files' sizes.

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
    documents, read = 0.0, list[int]()
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
        read += [math.ceil(len(t) / (characters if isinstance(t, str) else 1)) for t in texts]
    scale, lengths = documents / max(1, len(read)), window_lengths(np.array(read, dtype=np.int64), window)
    counts = sum(math.ceil(n / window) for n in read)
    return round(counts * scale), round(sum(read) * scale), lengths
