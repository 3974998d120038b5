"""The FAISS index over sketches: which type, training, shards, search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from msif_core.config import IndexSettings
from msif_core.errors import InputError

FloatArray = npt.NDArray[np.float32]
FLAT_UP_TO = 1_000
IVF_FROM = 5_000_000


def kind_for(settings: IndexSettings, sequences: int) -> str:
    """The index type: as set, or by size."""
    if settings.kind != "auto":
        return settings.kind
    if sequences <= FLAT_UP_TO:
        return "flat"
    return "rabitq" if sequences < IVF_FROM else "ivf"


def train(sample: FloatArray, settings: IndexSettings, sequences: int, path: Path) -> None:
    """Write an empty index trained on `sample` [n, d] (the codes' centre, and the cells of an IVF)."""
    d = sample.shape[1]
    inner = faiss.METRIC_INNER_PRODUCT
    kind = kind_for(settings, sequences)
    if kind == "flat":
        index: Any = faiss.IndexFlat(d, inner)
    elif kind == "rabitq":
        index = faiss.IndexRaBitQ(d, inner, settings.bits)
    else:
        cells = max(1, min(len(sample) // 4, int(4 * np.sqrt(sequences))))
        index = faiss.IndexIVFRaBitQ(faiss.IndexFlat(d, inner), d, cells, inner, False, settings.bits)
        index.nprobe = max(1, cells // 4)
    index.train(np.ascontiguousarray(sample))
    faiss.write_index(faiss.IndexIDMap2(index), str(path))


def build_shard(trained: Path, phi: FloatArray, ids: npt.NDArray[np.int64], path: Path) -> None:
    """Write the codes of phi [n, d] under 64-bit ids."""
    index = faiss.read_index(str(trained))
    if len(phi):
        index.add_with_ids(np.ascontiguousarray(phi), np.ascontiguousarray(ids))
    faiss.write_index(index, str(path))


class Index:
    """Shard files opened memory-mapped and searched as one."""

    def __init__(self, shards: Sequence[Path], settings: IndexSettings) -> None:
        self._shards = [self._open(path, settings) for path in shards]
        self.count = sum(shard.ntotal for shard in self._shards)
        size = sum(path.stat().st_size for path in shards)
        self.bytes_per_vector = size / max(1, self.count)

    @staticmethod
    def _open(path: Path, settings: IndexSettings) -> Any:
        try:
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise InputError(f"{path}: not a readable index shard ({error}); delete it and run again") from None
        inner = faiss.downcast_index(index.index)
        if hasattr(inner, "qb"):
            inner.qb = settings.query_bits
        return index

    def search(self, psi: FloatArray, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """The k largest estimated scores of each query [Q, k] and their ids; -1 where there are fewer."""
        psi = np.ascontiguousarray(psi, dtype=np.float32)
        found = [shard.search(psi, min(k, shard.ntotal)) for shard in self._shards if shard.ntotal]
        scores = np.concatenate([d for d, _ in found], axis=1)
        ids = np.concatenate([i for _, i in found], axis=1)
        scores = np.where(ids >= 0, scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
