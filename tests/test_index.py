"""The FAISS index: kinds, ids, shards, memory mapping, determinism, and RaBitQ's recall at low signal."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from msif_core import index
from msif_core.config import IndexSettings
from msif_core.errors import InputError
from msif_core.evaluation.recall import recall_at_k

N, D = 600, 64
IDS = (np.arange(N, dtype=np.int64) % 3 << 40) | np.arange(N, dtype=np.int64)


def vectors(count: int, width: int = D, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def write(trained: Path, phi: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], path: Path) -> None:
    index.write_shard(trained, index.encode(trained, phi), ids, path)


def build(folder: Path, phi: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], shards: int = 3,
          **options: object) -> index.Index:  # fmt: skip
    settings = IndexSettings(**options)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    index.train(phi, settings, len(phi), folder / "trained.faiss")
    paths = []
    for number in range(shards):
        rows = np.arange(number, len(phi), shards)
        paths.append(folder / f"shard-{number:05d}.faiss")
        write(folder / "trained.faiss", phi[rows], ids[rows], paths[-1])
    return index.Index(paths, settings)


def test_auto_goes_by_size():
    settings = IndexSettings()
    assert [index.kind_for(settings, n) for n in (1_000, 1_001, 10**9)] == ["flat", "rabitq", "rabitq"]
    assert index.kind_for(IndexSettings(kind="flat"), 10**9) == "flat"


def test_flat_is_exact_and_ids_above_2_to_the_40_survive(tmp_path: Path):
    phi, psi = vectors(N), vectors(5, seed=1)
    scores, ids = build(tmp_path, phi, IDS, kind="flat").search(psi, 7)
    exact = psi @ phi.T
    order = np.argsort(-exact, axis=1)[:, :7]
    np.testing.assert_array_equal(ids, IDS[order])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, axis=1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf"])
def test_shards_do_not_change_the_answer(tmp_path: Path, kind: str):
    phi, psi = vectors(N), vectors(4, seed=1)
    one = build(tmp_path / "1", phi, IDS, shards=1, kind=kind).search(psi, 20)
    many = build(tmp_path / "5", phi, IDS, shards=5, kind=kind).search(psi, 20)
    np.testing.assert_array_equal(one[1], many[1])
    np.testing.assert_allclose(one[0], many[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf"])
def test_a_build_is_the_same_bytes_twice(tmp_path: Path, kind: str):
    phi = vectors(N)
    for name in ("a", "b"):
        build(tmp_path / name, phi, IDS, kind=kind)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(("kind", "bits", "recall"), [("rabitq", 1, 0.5), ("rabitq", 4, 0.9), ("ivf", 4, 0.3)])
def test_codes_find_most_of_the_exact_best(tmp_path: Path, kind: str, bits: int, recall: float):
    phi, psi = vectors(N), vectors(20, seed=1)
    _, ids = build(tmp_path, phi, IDS, kind=kind, bits=bits).search(psi, 20)
    assert recall_at_k(psi @ phi.T, IDS, ids, 10) > recall


def test_query_bits_can_change_without_a_build(tmp_path: Path):
    phi, psi = vectors(N, 256), vectors(3, 256, seed=1)
    build(tmp_path, phi, IDS, shards=1, kind="rabitq")
    paths = [tmp_path / "shard-00000.faiss"]
    exact, _ = index.Index(paths, IndexSettings(query_bits=0)).search(psi, N)
    coarse, _ = index.Index(paths, IndexSettings(query_bits=8)).search(psi, N)
    assert not np.array_equal(exact, coarse)
    assert np.corrcoef(exact.ravel(), coarse.ravel())[0, 1] > 0.999


def test_bytes_per_vector_follow_the_bits(tmp_path: Path):
    phi = vectors(N, 2048)
    one = build(tmp_path / "1", phi, IDS, shards=1, kind="rabitq").bytes_per_vector
    flat = build(tmp_path / "f", phi, IDS, shards=1, kind="flat").bytes_per_vector
    assert 2048 / 8 < one < 2048 / 8 + 64
    assert flat >= 4 * 2048


def test_fewer_vectors_than_asked_for_are_padded(tmp_path: Path):
    scores, ids = build(tmp_path, vectors(4), IDS[:4], shards=2, kind="flat").search(vectors(2, seed=1), 6)
    assert ids.shape == scores.shape == (2, 6)
    assert (ids[:, 4:] == -1).all()
    assert np.isneginf(scores[:, 4:]).all()
    assert sorted(ids[0, :4]) == sorted(IDS[:4])


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf"])
def test_a_sample_with_broken_rows_or_none_still_trains(tmp_path: Path, kind: str):
    settings = IndexSettings(kind=kind)  # type: ignore[arg-type]
    broken = vectors(50)
    broken[3, 5], broken[7, 1] = np.nan, np.inf
    for number, sample in enumerate((broken, vectors(0))):
        trained, path = tmp_path / f"trained-{number}", tmp_path / f"shard-{number}"
        index.train(sample, settings, N, trained)
        write(trained, vectors(N), IDS, path)
        assert np.isfinite(index.Index([path], settings).search(vectors(2, seed=1), 5)[0]).all()


def test_an_empty_index_and_empty_shards_answer_nothing(tmp_path: Path):
    assert (index.Index([], IndexSettings()).search(vectors(2), 3)[1] == -1).all()
    found = build(tmp_path, vectors(2), IDS[:2], shards=3, kind="flat")  # the third shard is empty
    assert found.count == 2
    assert sorted(found.search(vectors(1), 2)[1][0]) == sorted(IDS[:2])


def test_equal_scores_go_by_id(tmp_path: Path):
    phi = np.repeat(vectors(1), 6, axis=0)
    _, ids = build(tmp_path, phi, np.array([5, 3, 4, 0, 2, 1]), shards=2, kind="flat").search(vectors(1, seed=1), 6)
    np.testing.assert_array_equal(ids[0], np.arange(6))


def test_another_width_is_an_input_error(tmp_path: Path):
    found = build(tmp_path, vectors(N), IDS, kind="flat")
    with pytest.raises(InputError, match="the index holds 64 dimensions, the queries have 32: rebuild it"):
        found.search(vectors(1, 32), 3)
    with pytest.raises(InputError, match="trained for 64 dimensions, the sketches have 32: refit"):
        write(tmp_path / "trained.faiss", vectors(3, 32), IDS[:3], tmp_path / "x.faiss")


def test_a_damaged_shard_is_an_input_error(tmp_path: Path):
    path = tmp_path / "shard-00000.faiss"
    path.write_bytes(b"not an index")
    with pytest.raises(InputError, match=r"shard-00000.faiss: not a readable index shard .*; delete it and run again"):
        index.Index([path], IndexSettings())


def test_one_bit_finds_weak_signals_in_many_dimensions(tmp_path: Path):
    """Gradient-like data: the best products are a few hundredths of |phi| |psi|, far below what 64 dimensions see."""
    width = 8_192
    generator = np.random.default_rng(0)
    psi = vectors(8, width, seed=1)
    shares = generator.standard_normal((400, 8)).astype(np.float32) * 0.05
    phi = vectors(400, width, seed=2) + shares @ psi
    phi *= generator.uniform(0.3, 3, (400, 1)).astype(np.float32)  # lengths differ, as those of gradients do
    _, ids = build(tmp_path, phi, IDS[:400], kind="rabitq", bits=1).search(psi, 40)
    assert recall_at_k(psi @ phi.T, IDS[:400], ids, 10) > 0.9
