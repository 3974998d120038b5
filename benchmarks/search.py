"""Query time over codes that look like real ones: `python -m benchmarks.search [--quick] [--ten-million]`.

The sketches of a small trained workspace are resampled: a new vector is cos(t) of one real sketch plus sin(t) of
another, t uniform up to 30 degrees, with a random sign on the second. Norms, spectrum and score distribution stay
close to the real ones (the first table compares them), every vector is new, and its exact score is the same mixture
of the two sequences' exact scores: recall is against unsketched scores. `--ten-million` times random codes
alone, memory-mapped: 10 GB on disk at its 8,192 dimensions, 26 GB with `--dimensions 20480`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import torch

from benchmarks import machine, tables, workspace
from msif_core import corpus, index
from msif_core.config import IndexSettings
from msif_core.evaluation.recall import recall_at_k
from msif_core.pipeline import Pipeline

COUNTS = (100_000, 1_000_000)
QUICK = (10_000,)
SHARD, MIXED = 12_500, 16
"""Vectors of a shard, and how many are mixed and encoded at a time: what the cache holds."""
KEPT = 500
SEARCHES = 60
FEW = 20
"""Searches of the ten million codes."""
FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]


class Real:
    """The workspace's sketches phi [N, d], its held-out queries psi [Q, d], and their exact scores [Q, N]."""

    def __init__(self, pipeline: Pipeline) -> None:
        queries = pipeline.held_out()
        assert queries is not None, "the workspace has held-out queries"
        shards = [corpus.read_shard(path) for path in pipeline.shards(pipeline.target)]
        self.phi = np.concatenate([pipeline.document_sketches(s) for s in shards])
        self.psi = pipeline.query_sketches(queries)
        self.scores = np.concatenate([pipeline.scores(queries, s) for s in shards], axis=1)

    @property
    def fingerprint(self) -> str:
        """Of the sketches: codes that were made of others are not used."""
        return hashlib.sha256(self.phi.tobytes()).hexdigest()[:16]


class Resampled:
    """`count` mixtures of two real sketches each, a function of the seed alone."""

    def __init__(self, real: Real, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pairs = rng.integers(0, len(real.phi), (2, count))
        angle = rng.uniform(0, np.pi / 6, count)
        self.weights = np.stack([np.cos(angle), np.sin(angle) * rng.choice([-1, 1], count)]).astype(np.float32)
        self._real = real

    def vectors(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows start to stop, a few at a time."""
        phi = torch.from_numpy(self._real.phi)
        pairs, weights = torch.from_numpy(self.pairs), torch.from_numpy(self.weights)[..., None]
        for row in range(start, stop, MIXED):
            part = slice(row, min(row + MIXED, stop))
            (first, second), (w1, w2) = pairs[:, part], weights[:, part]
            yield torch.addcmul(phi[first] * w1, phi[second], w2)

    def exact(self, count: int) -> FloatArray:
        """Exact scores of the first rows [Q, count]."""
        (first, second), (w1, w2), scores = self.pairs[:, :count], self.weights[:, :count], self._real.scores
        return scores[:, first] * w1 + scores[:, second] * w2


def likeness(real: Real) -> tables.Table:
    """How close the resampled vectors come to the real ones."""
    made = Resampled(real, len(real.phi), seed=1)
    vectors = torch.cat(list(made.vectors(0, len(real.phi)))).numpy()

    def row(name: str, phi: FloatArray, scores: FloatArray) -> list[tables.Cell]:
        norms = np.linalg.norm(phi, axis=1)
        gram = phi[:512] @ phi[:512].T
        spectrum = np.linalg.eigvalsh(gram)[::-1]
        standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
        leading = spectrum[:10].sum() / spectrum.sum()
        spread = norms.std() / norms.mean()
        found = (np.median(norms), spread, leading, (standard**4).mean(), np.quantile(standard, 0.999))
        return [name, *(float(value) for value in found)]

    columns = ["", "median norm", "relative spread of norms", "share of the 10 leading directions",
               "kurtosis of exact scores", "their 99.9% quantile, standard deviations"]  # fmt: skip
    rows = [row("real", real.phi, real.scores), row("resampled", vectors, made.exact(len(real.phi)))]
    return tables.Table("Search: resampled sketches beside the real ones", columns, rows)


def encode(phi: torch.Tensor, centre: torch.Tensor) -> CodeArray:
    """One-bit RaBitQ codes of phi [n, d] for inner products: FAISS's, whose own encoder takes several times as long.

    The signs of o = phi - centre, least bit first; then as float32 |o|^2 - |phi|^2 and |o|^2 sqrt(d) / |o|_1.
    """
    o = phi - centre
    squares = o.square().sum(1)
    factors = torch.stack([squares - phi.square().sum(1), squares * phi.shape[1] ** 0.5 / o.abs().sum(1)], dim=1)
    signs = np.packbits((o > 0).numpy(), axis=1, bitorder="little")
    return np.concatenate([signs, factors.numpy().view(np.uint8)], axis=1)


def check_codes(trained: Path, phi: torch.Tensor, centre: torch.Tensor) -> None:
    """That `encode` gives the codes of FAISS, but for the rounding of their two factors: sums of squares."""
    ours, theirs = encode(phi, centre), index.encode(trained, phi.numpy())
    assert np.array_equal(ours[:, :-8], theirs[:, :-8]), "other signs than FAISS"
    factors = [np.ascontiguousarray(codes[:, -8:]).view(np.float32) for codes in (ours, theirs)]
    np.testing.assert_allclose(*factors, rtol=1e-5, atol=1e-5 * float(phi.square().sum(1).max()))


def write_shards(made: Resampled, count: int, sample: FloatArray, folder: Path) -> list[Path]:
    """RaBitQ codes of the first `count` resampled vectors, in shards that are kept between runs."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = folder / "trained.faiss"
    index.train(sample, IndexSettings(kind="rabitq"), count, trained)
    empty = faiss.read_index(str(trained))
    centre = torch.from_numpy(faiss.vector_to_array(faiss.downcast_index(empty.index).center))
    check_codes(trained, next(made.vectors(0, MIXED)), centre)
    paths = []
    for start in range(0, count, SHARD):
        ids = np.arange(start, min(start + SHARD, count))
        paths.append(folder / f"{start}-{len(ids)}.faiss")
        if not paths[-1].exists():
            rows = np.concatenate([encode(phi, centre) for phi in made.vectors(start, start + len(ids))])
            temporary = paths[-1].with_suffix(".tmp")
            index.write_shard(trained, rows, ids, temporary)
            temporary.rename(paths[-1])
    return paths


def timed(paths: list[Path], psi: FloatArray, searches: int = SEARCHES) -> dict[str, object]:
    """p50 and p99 of single searches, resident and mapped memory, of a process that does nothing else."""
    request = {"paths": [str(p) for p in paths], "searches": searches}
    np.save(paths[0].parent / "psi.npy", psi)
    command = [sys.executable, "-m", "benchmarks.search", "--search", json.dumps(request)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(answer))


def search_process(request: dict[str, object]) -> None:
    """The process that `timed` starts."""
    paths = [Path(str(p)) for p in request["paths"]]  # type: ignore[attr-defined]
    psi = np.load(paths[0].parent / "psi.npy")
    opened = time.perf_counter()
    found = index.Index(paths, IndexSettings(kind="rabitq"))
    opened = time.perf_counter() - opened
    first = time.perf_counter()
    found.search(psi[:1], KEPT)
    first = time.perf_counter() - first
    took = []
    for turn in range(int(str(request["searches"]))):
        row = turn % len(psi)
        start = time.perf_counter()
        found.search(psi[row : row + 1], KEPT)
        took.append(time.perf_counter() - start)
    print(json.dumps({
        "p50": statistics.median(took), "p99": float(np.quantile(took, 0.99)), "open": opened, "first": first,
        "peak": machine.peak_bytes(), "anonymous": machine.memory("RssAnon"), "bytes": found.bytes_per_vector,
    }))  # fmt: skip


def measure(real: Real, counts: Sequence[int], folder: Path) -> tables.Table:
    """One row for each count; the fewer are the first of the more."""
    made, settings = Resampled(real, max(counts)), IndexSettings(kind="rabitq")
    rows: list[list[tables.Cell]] = []
    for count in counts:
        paths = write_shards(made, count, real.phi[:512], folder)
        _, ids = index.Index(paths, settings).search(real.psi, KEPT)
        recall = recall_at_k(made.exact(count), np.arange(count), ids, 10)
        rows.append([f"{count:,}", *_cells(timed(paths, real.psi)), recall])
    note = (
        f"RaBitQ at one bit, {real.phi.shape[1]:,} dimensions, memory-mapped shards of {SHARD:,}, {len(real.psi)} real "
        f"queries in {settings.query_bits} bits, the best {KEPT} kept; {SEARCHES} single searches on "
        f"{faiss.omp_get_max_threads()} threads after a first one. Recall: exact top ten found among those kept. The "
        "peak counts mapped pages of codes; `anonymous` does not."
    )
    return tables.Table("Search: time of a query", ["vectors", *COLUMNS, f"recall@10 in {KEPT}"], rows, [note])


COLUMNS = ["p50, ms", "p99, ms", "open, ms", "first search, ms", "bytes a sequence", "peak GiB", "anonymous GiB"]


def _cells(found: dict[str, object]) -> list[tables.Cell]:
    values = {key: float(str(value)) for key, value in found.items()}
    milliseconds = [1e3 * values[key] for key in ("p50", "p99", "open", "first")]
    return [*milliseconds, values["bytes"], values["peak"] / 2**30, values["anonymous"] / 2**30]


def ten_million(folder: Path, dimensions: int, count: int = 10_000_000) -> tables.Table:
    """Random codes, memory-mapped, in 20 shards: timing alone, for no real vector looks like them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((64, dimensions), dtype=np.float32)
    shards = 20
    paths = []
    for shard in range(shards):
        path = folder / f"random-{count}-{dimensions}-{shard}.faiss"
        paths.append(path)
        if path.exists():
            continue
        codes = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT, 1)
        codes.train(sample)
        codes.add(sample)
        one = faiss.vector_to_array(codes.codes).reshape(64, -1)
        random = rng.integers(0, 256, (count // shards, one.shape[1]), dtype=np.uint8)
        random[:, dimensions // 8 :] = one[0, dimensions // 8 :]  # norms and corrections of a true code
        codes.reset()
        mapped = faiss.IndexIDMap2(codes)
        faiss.copy_array_to_vector(random.ravel(), codes.codes)
        codes.ntotal = len(random)
        faiss.copy_array_to_vector(np.arange(shard * len(random), (shard + 1) * len(random)), mapped.id_map)
        mapped.ntotal = len(random)
        mapped.construct_rev_map()
        faiss.write_index(mapped, str(path))
    psi = rng.standard_normal((FEW, dimensions), dtype=np.float32)
    rows: list[list[tables.Cell]] = [[f"{count:,}", *_cells(timed(paths, psi, FEW))]]
    note = (
        f"{dimensions:,} dimensions, {FEW} single searches on {faiss.omp_get_max_threads()} threads after a first one. "
        "Codes that exceed the memory are read from the disk every time."
    )
    return tables.Table("Search: random codes, for timing alone", ["vectors", *COLUMNS], rows, [note])


def main() -> None:
    """Measure, save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--ten-million", action="store_true", help="time 10,000,000 random codes, and nothing else")
    parser.add_argument("--dimensions", type=int, default=8192, help="of the ten million codes")
    parser.add_argument("--search", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        search_process(json.loads(options.search))
        return
    folder = options.out / "search"
    if options.ten_million:
        found = [ten_million(folder, options.dimensions, 100_000 if options.quick else 10_000_000)]
        tables.save(options.out / "ten-million.json", found)
    else:
        name = "workspace-quick" if options.quick else "workspace"
        real = Real(workspace.build(options.out / name, options.quick))
        found = [likeness(real), measure(real, QUICK if options.quick else COUNTS, folder / real.fingerprint)]
        tables.save(options.out / "search.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
