"""The FAISS index over sketches: which type, training, shards, search."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from msif_core.config import IndexSettings
from msif_core.errors import InputError

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]
FLAT_UP_TO = 1_000


def kind_for(settings: IndexSettings, sequences: int) -> str:
    """The index type: as set, or by size."""
    if settings.kind != "auto":
        return settings.kind
    return "flat" if sequences <= FLAT_UP_TO else "rabitq"


def cells(sample: int, sequences: int) -> int:
    """Cells of an IVF over so many sequences, trained on a sample; every shard holds their centres, in float32."""
    return max(1, min(sample // 4, int(4 * np.sqrt(sequences))))


def train(sample: FloatArray, settings: IndexSettings, sequences: int, path: Path) -> None:
    """Write an empty index trained on `sample` [n, d] (the codes' centre, and the cells of an IVF).

    Rows that are not finite are left out: one would spoil the centre of all codes.
    """
    d = sample.shape[1]
    sample = sample[np.isfinite(sample).all(axis=1)]
    if not len(sample):
        sample = np.zeros((1, d), dtype=np.float32)  # a centre at the origin
    inner = faiss.METRIC_INNER_PRODUCT
    kind = kind_for(settings, sequences)
    if kind == "flat":
        index: Any = faiss.IndexFlat(d, inner)
    elif kind == "rabitq":
        index = faiss.IndexRaBitQ(d, inner, settings.bits)
    else:
        lists = cells(len(sample), sequences)
        index = faiss.IndexIVFRaBitQ(faiss.IndexFlat(d, inner), d, lists, inner, True, settings.bits)
        index.nprobe = max(1, lists // 4)
    index.train(np.ascontiguousarray(sample))
    _write(faiss.IndexIDMap2(index), path)


def _write(index: Any, path: Path) -> None:
    """Write an index; `faiss.write_index` would only print that a disk is full when it closes the file."""
    path.write_bytes(faiss.serialize_index(index).tobytes())


def encode(trained: Path, phi: FloatArray) -> CodeArray:
    """Codes of phi [n, d]: uint8 [n, bytes], each a function of its own row alone.

    Raises:
        InputError: the trained index is of another width.
    """
    index = faiss.read_index(str(trained))
    if index.d != phi.shape[1]:
        raise InputError(f"{trained}: trained for {index.d} dimensions, the sketches have {phi.shape[1]}: refit")
    if len(phi):
        index.add_with_ids(np.ascontiguousarray(phi), np.arange(len(phi)))
    return _codes(index)


def code_bytes(trained: Path) -> int:
    """Bytes of a code, of an IVF with the number of its list."""
    index: Any = faiss.read_index(str(trained))
    return int(faiss.downcast_index(index.index).sa_code_size())


def write_shard(trained: Path, codes: CodeArray, ids: npt.NDArray[np.int64], path: Path) -> None:
    """Write a shard of codes [n, bytes] that were made with `trained`, under 64-bit ids."""
    index = faiss.read_index(str(trained))
    if len(codes):
        index.add_sa_codes(np.ascontiguousarray(codes), np.ascontiguousarray(ids))
    _write(index, path)


def read_codes(trained: Path, path: Path) -> tuple[npt.NDArray[np.int64], CodeArray] | None:
    """Ids and codes of a shard; None where it was not made with `trained`, so that its codes mean something else."""
    index = _read(path)
    ids, codes = faiss.vector_to_array(index.id_map), _codes(index)
    index.reset()
    same = np.array_equal(faiss.serialize_index(index), np.frombuffer(trained.read_bytes(), np.uint8))
    return (ids, codes) if same else None


def _codes(index: Any) -> CodeArray:
    """Codes in the order of the id map; those of an IVF start with the number of their list."""
    inner: Any = faiss.downcast_index(index.index)
    if not hasattr(inner, "invlists"):
        return faiss.vector_to_array(inner.codes).reshape(index.ntotal, inner.sa_code_size())
    width, lists = inner.coarse_code_size(), inner.invlists
    codes = np.zeros((index.ntotal, inner.sa_code_size()), np.uint8)
    for number in range(inner.nlist):
        size = lists.list_size(number)
        if size:
            rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
            listed = faiss.rev_swig_ptr(lists.get_codes(number), size * inner.code_size)
            codes[rows, width:] = listed.reshape(size, inner.code_size)
            codes[rows, :width] = np.frombuffer(number.to_bytes(width, "little"), np.uint8)
    return codes


class Index:
    """Shard files opened memory-mapped where FAISS can, and searched as one."""

    def __init__(self, shards: Sequence[Path], settings: IndexSettings) -> None:
        found = [_open(path, settings) for path in shards]
        self._shards = [shard for shard in found if shard.ntotal]
        self.count = sum(shard.ntotal for shard in self._shards)
        size = sum(path.stat().st_size for path in shards)
        self.bytes_per_vector = size / max(1, self.count)

    def search(self, psi: FloatArray, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """The k largest estimated scores of each query [Q, k] and their ids; -inf and -1 where there are fewer.

        Equal scores go by id, so that the answer does not depend on how the ids are spread over shards.

        Raises:
            InputError: the queries' width is not the index's.
        """
        psi = np.ascontiguousarray(psi, dtype=np.float32)
        for shard in self._shards:
            if shard.d != psi.shape[1]:
                raise InputError(f"the index holds {shard.d} dimensions, the queries have {psi.shape[1]}: rebuild it")
        found = self._search_shards(psi, k)
        padding = np.full((len(psi), k), -1, dtype=np.int64)
        ids = np.concatenate([*(i for _, i in found), padding], axis=1)
        scores = np.concatenate([*(d for d, _ in found), padding.astype(np.float32)], axis=1)
        scores = np.where(ids >= 0, scores, -np.inf).astype(np.float32)
        order = np.lexsort((np.where(ids >= 0, ids, np.iinfo(np.int64).max), -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def estimates(self, psi: FloatArray, ids: npt.NDArray[np.int64]) -> FloatArray:
        """Estimated scores [Q, N] of the sequences `ids`, among which are all that the index holds.

        -inf stands for those that it does not hold, or that a search does not visit.
        """
        scores, found = self.search(psi, self.count)
        order = np.argsort(ids)
        query, place = np.nonzero(found >= 0)
        columns = order[np.searchsorted(ids, found[query, place], sorter=order)]
        estimated = np.full((len(psi), len(ids)), -np.inf, dtype=np.float32)
        estimated[query, columns] = scores[query, place]
        return estimated

    def _search_shards(self, psi: FloatArray, k: int) -> list[tuple[FloatArray, npt.NDArray[np.int64]]]:
        """Each shard's answer. FAISS spreads queries over threads, not codes: one query runs on one thread a shard."""

        def search(shard: Any) -> tuple[FloatArray, npt.NDArray[np.int64]]:
            return shard.search(psi, min(k, shard.ntotal))

        threads = min(faiss.omp_get_max_threads(), len(self._shards))
        if threads < 2:
            return [search(shard) for shard in self._shards]
        with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(search, self._shards))


def _open(path: Path, settings: IndexSettings) -> Any:
    """A shard; the settings' query bits apply at search time, so that they can change without a build."""
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:  # a kind that cannot be mapped, or damage
        index = _read(path)
    inner = faiss.downcast_index(index.index)
    if hasattr(inner, "qb"):
        inner.qb = settings.query_bits
    return index


def _read(path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a readable index shard ({error}); delete it and run again") from None
