"""The fit's files: restarts, shards, budgets; the sample; what is stored once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from msif_core import storage
from msif_core.batching import Sequences, batches
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature import fit
from msif_core.curvature.factors import Factors, MapFactors
from msif_core.curvature.filters import Damped
from msif_core.curvature.gradients import PerSequenceGradients, RotatedGradients
from msif_core.curvature.steps import Fit
from msif_core.errors import InputError
from msif_core.losses import Loss
from msif_core.models import freeze
from msif_core.randomness import uniforms
from msif_core.tracking import TrackedMap, tracked_maps
from tests.conftest import VOCAB, make_model, make_sequences

OPTIONS: dict[str, Any] = {"task": "causal_lm", "seed": 1, "batch_tokens": 40, "budget_gb": 1.0}
PARTS = [make_sequences(6, 1), make_sequences(5, 2)]


def run(model: Any, maps: list[TrackedMap], folder: Path, order: Sequence[int] = (0, 1), **changed: Any) -> Factors:
    job = Fit(model, maps, folder, **(OPTIONS | changed))
    for part in order:
        job.covariances(part, PARTS[part])
    for part in order:
        job.eigenbases(part, 2, torch.device("cpu"))
    for part in order:
        job.eigenvalues(part, PARTS[part])
    return Factors.open(job.finish(2))


def same(one: Factors, other: Factors) -> bool:
    return all(
        torch.equal(getattr(one[name], part), getattr(other[name], part))
        for name in one.maps
        for part in ("Q_A", "Q_S", "eigenvalues")
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def maps(model: Any) -> list[TrackedMap]:
    return tracked_maps(model, CurvatureSettings())


@pytest.fixture(scope="module")
def whole(model: Any, maps: list[TrackedMap], tmp_path_factory: pytest.TempPathFactory) -> Factors:
    return run(model, maps, tmp_path_factory.mktemp("whole"))


def test_bases_are_orthonormal_and_lambda_is_a_mean_over_sequences(
    model: Any, maps: list[TrackedMap], whole: Factors
) -> None:
    name = maps[0].name
    f = whole[name]
    torch.testing.assert_close(f.Q_A.mT @ f.Q_A, torch.eye(len(f.Q_A)), atol=1e-5, rtol=0)
    sums = [
        fit.eigenvalue_sums(model, maps[:1], {name: f}, s, task="causal_lm", seed=1, batch_tokens=40)[name]
        for s in PARTS
    ]
    torch.testing.assert_close(f.eigenvalues, (sums[0] + sums[1]) / 11)
    targets = sum(int((row != -100).sum()) for s in PARTS for row in s.labels)
    assert whole.mean_targets == pytest.approx(targets / 11)
    V = torch.randn(2, *maps[0].shape)
    torch.testing.assert_close(f.unrotate(f.rotate(V)), V, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("arch", "task", "expected"), [("llama", "causal_lm", 4), ("bert", "classification", 1)])
def test_targets_are_the_labels_that_are_predicted(arch: str, task: str, expected: int, tmp_path: Path) -> None:
    """Of six tokens the first five have labels, and nothing predicts the first."""
    model = make_model(arch, 0, task, torch.float32)
    sequences = make_sequences(3, 1, task, (6, 7), prompt=0)
    job = Fit(model, tracked_maps(model, CurvatureSettings())[:1], tmp_path, task, 0, 40, 1.0)
    job.covariances(0, sequences)
    job.eigenbases(0, 1, torch.device("cpu"))
    job.eigenvalues(0, sequences)
    assert Factors.open(job.finish(1)).mean_targets == expected


def test_shards_may_finish_in_any_order(model: Any, maps: list[TrackedMap], whole: Factors, tmp_path: Path) -> None:
    assert same(run(model, maps, tmp_path, order=(1, 0)), whole)


def test_a_small_budget_takes_more_passes_and_gives_the_same_bits(
    model: Any, maps: list[TrackedMap], whole: Factors, tmp_path: Path
) -> None:
    assert len(list(fit.partitions(maps, 3e-6))) > 3
    assert [m for part in fit.partitions(maps, 3e-6) for m in part] == maps
    assert same(run(model, maps, tmp_path, budget_gb=3e-6), whole)


@pytest.mark.parametrize("stop", range(4))
def test_a_killed_run_resumes_bit_for_bit(
    model: Any, maps: list[TrackedMap], whole: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed in the first batch, two in between, and the last: what stands is kept, the rest is done again."""
    total = 2 * sum(len(list(batches(s, OPTIONS["batch_tokens"]))) for s in PARTS)
    assert total >= 6
    last, passes = 1 + (total - 1) * stop // 3, 0
    original = fit.capture

    def killed(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == last:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(fit, "capture", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, maps, tmp_path)
    assert not [path for path in tmp_path.rglob(".tmp-*") if "lock" not in path.name]
    monkeypatch.setattr(fit, "capture", original)
    assert same(run(model, maps, tmp_path), whole)


def test_a_finished_run_does_nothing_and_a_corrupt_shard_is_rebuilt(
    model: Any, maps: list[TrackedMap], whole: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, maps, tmp_path)
    path = tmp_path / "partial-1GB" / "covariance-00000-000.safetensors"
    good = storage.file_digest(path)
    original = fit.capture
    monkeypatch.setattr(fit, "capture", None)
    assert same(run(model, maps, tmp_path), whole)
    monkeypatch.setattr(fit, "capture", original)
    path.write_bytes(path.read_bytes()[:-7] + b"garbage")
    run(model, maps, tmp_path)
    assert storage.file_digest(path) == good


def test_shared_inputs_are_stored_once(maps: list[TrackedMap], whole: Factors) -> None:
    files = {entry["input"] for entry in whole.maps.values()}
    assert len(files) == 2 * 4  # q/k/v, o, gate/up, down in each of two layers
    assert len(list(whole.folder.glob("*.input.safetensors"))) == len(files) < len(maps)
    sums = load_file(whole.folder / "partial-1GB" / "covariance-00000-000.safetensors")
    assert sum(key.startswith("A/") for key in sums) == len(files)


def test_a_maps_tensors_are_read_when_first_used_and_once(
    maps: list[TrackedMap], whole: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reader = whole._read
    monkeypatch.setattr(whole, "_read", lambda file, name: read.append(name) or reader(file, name))
    chain = Chain((FilteredStage(whole, Damped(0.1)),))
    assert chain.levels(maps[0].name)
    assert set(read) == {"eigenvalues"}
    read.clear()
    assert chain.filter_back(maps[0].name, torch.ones(1, *maps[0].shape)) is not None
    assert sorted(read) == ["Q_A", "Q_S", "eigenvalues"]


def test_filtering_leaves_the_factors_as_they_are(maps: list[TrackedMap], whole: Factors) -> None:
    before = whole[maps[0].name].eigenvalues.clone()
    V = torch.ones(1, *maps[0].shape)
    f = whole[maps[0].name]
    one, two = f.apply(V, Damped(0.1).attributed), f.apply(V, Damped(0.1).attributed)
    assert torch.equal(one, two)
    assert torch.equal(f.eigenvalues, before)
    assert torch.equal(whole[maps[0].name].eigenvalues, before)


@pytest.mark.parametrize("cuts", [1, 2])
def test_tokens_or_gradients_rotated_are_the_same(cuts: int) -> None:
    def basis(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]

    m = TrackedMap("m", 6, 8, False, 2, 1, "m", cuts)
    f = MapFactors(basis(6, 6), basis(*m.pieces, m.pieces[1]), torch.empty(0))
    whole = torch.block_diag(*f.Q_S)
    for tokens in (2, 50):  # both sides of the switch
        a, d = torch.randn(3, tokens, 6, dtype=torch.float64), torch.randn(3, tokens, 2, 4, dtype=torch.float64)
        gradients = torch.einsum("ntgb,nti->ngbi", d, a)
        expected = (whole.mT @ gradients.flatten(1, 2) @ f.Q_A).view_as(gradients)
        torch.testing.assert_close(f.rotate(gradients), expected)
        torch.testing.assert_close(f.unrotate(expected), gradients)
        found = torch.zeros(3, 8, 6, dtype=torch.float64)
        for part, rows, gradients in RotatedGradients({"m": f}, torch.float64).blocks(m, a, d):
            found[part, rows] = gradients
        torch.testing.assert_close(found.unflatten(1, (2, 4)), expected)


def test_symmetric_updates_by_blocks_are_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(2, 9, 7, dtype=torch.float64)
    for width in (2, 3, 7, 100):
        monkeypatch.setattr(fit, "SYMMETRIC_BLOCK", width)
        total = torch.ones(2, 7, 7, dtype=torch.float64)
        fit.add_products(total, rows)
        fit.mirror(total)
        torch.testing.assert_close(total, 1 + rows.mT @ rows)


@pytest.mark.parametrize(("together", "counts"), [(False, (3, 3)), (True, (1, 3))])
def test_blocks_cover_every_gradient_once(
    monkeypatch: pytest.MonkeyPatch, together: bool, counts: tuple[int, int]
) -> None:
    monkeypatch.setattr("msif_core.curvature.gradients.CACHED_ENTRIES", 2 * 3 * 6)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_ROWS", 3)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_SEQUENCES", 2)
    m = TrackedMap("m", 6, 8, False, 2, 1, "m")
    a, d = torch.randn(5, 7, 6, dtype=torch.float64), torch.randn(5, 7, 2, 4, dtype=torch.float64)
    found, parts = torch.zeros(5, 8, 6, dtype=torch.float64), []
    for part, rows, gradients in PerSequenceGradients(torch.float64, together=together).blocks(m, a, d):
        found[part, rows] += gradients
        parts.append((part.start, rows.start))
    assert (len({p for p, _ in parts}), len({r for _, r in parts})) == counts
    torch.testing.assert_close(found, torch.einsum("ntgb,nti->ngbi", d, a).flatten(1, 2))


def test_gradients_are_taken_in_blocks(
    model: Any, maps: list[TrackedMap], whole: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {m.name: whole[m.name] for m in maps}
    options: dict[str, Any] = {"task": "causal_lm", "seed": 1, "batch_tokens": 1000}
    one = fit.eigenvalue_sums(model, maps, bases, PARTS[0], **options)
    monkeypatch.setattr("msif_core.curvature.gradients.CACHED_ENTRIES", 200)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_ROWS", 5)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_SEQUENCES", 2)
    many = fit.eigenvalue_sums(model, maps, bases, PARTS[0], **options)
    for name, value in one.items():
        torch.testing.assert_close(many[name], value)


def test_the_sample_depends_on_content_and_seed_alone() -> None:
    sequences = make_sequences(400, 3, lengths=(8, 12))
    chosen = {sequences.fingerprints[i] for i in fit.sample_rows(sequences.fingerprints, 0.25, 0)}
    assert 60 < len(chosen) < 140
    order = np.random.default_rng(0).permutation(400)
    mixed = sequences.take(order)
    assert {mixed.fingerprints[i] for i in fit.sample_rows(mixed.fingerprints, 0.25, 0)} == chosen
    other = {sequences.fingerprints[i] for i in fit.sample_rows(sequences.fingerprints, 0.25, 1)}
    assert other != chosen
    assert len(fit.sample_rows(sequences.fingerprints, 1.0, 0)) == 400


def test_unfinished_and_foreign_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finished"):
        Factors.open(tmp_path)
    storage.write_json(tmp_path / "factors.json", {"version": 0, "maps": {}, "mean_targets": 1.0})
    with pytest.raises(InputError, match="factors of version 0"):
        Factors.open(tmp_path)


def test_the_second_pass_draws_labels_of_its_own(
    model: Any, maps: list[TrackedMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lambda on the labels that shaped the basis would be biased: no uniform number serves both passes."""
    seeds: list[int] = []
    original = fit.sampled_loss

    def recorded(task: str, seed: int) -> Loss:
        seeds.append(seed)
        return original(task, seed)

    monkeypatch.setattr(fit, "sampled_loss", recorded)
    run(model, maps, tmp_path)
    first, second = dict.fromkeys(seeds)
    fingerprints = PARTS[0].fingerprints
    assert not np.isin(uniforms(fingerprints, 50, first), uniforms(fingerprints, 50, second)).any()


def poisoned(bad: int, parts: Sequence[Sequences]) -> None:
    """Give token 3 to `bad` sequences of the second part alone."""
    for part in parts:
        for ids in part.input_ids:
            ids[ids == 3] = 4
    for ids in parts[1].input_ids[:bad]:
        ids[1] = 3


def test_all_documents_that_left_a_part_are_told(maps: list[TrackedMap], tmp_path: Path) -> None:
    model, part = make_model("llama", dtype=torch.float32), make_sequences(8)
    for ids in part.input_ids:
        ids[np.isin(ids, [3, 5])] = 4
    part.input_ids[6][1], part.input_ids[2][1] = 3, 5
    told: list[list[str]] = []
    job = Fit(model, maps, tmp_path, **OPTIONS, quarantine=lambda _, names: told.append(names))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
        job.covariances(0, part)
        job.eigenbases(0, 1, torch.device("cpu"))
        model.get_input_embeddings().weight[5] = float("nan")
        job.eigenvalues(0, part)
    assert told == [["doc6"], ["doc2", "doc6"]]


def test_documents_with_gradients_that_are_not_finite_leave_the_sums(maps: list[TrackedMap], tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    parts = [make_sequences(6, 1), make_sequences(5, 2)]
    poisoned(2, parts)
    told: list[tuple[int, list[str]]] = []

    def fitted(folder: Path, parts: Sequence[Sequences]) -> Factors:
        job = Fit(model, maps, folder, **OPTIONS, quarantine=lambda part, names: told.append((part, names)))
        for i, part in enumerate(parts):
            job.covariances(i, part)
        for i in range(2):
            job.eigenbases(i, 2, torch.device("cpu"))
        for i, part in enumerate(parts):
            job.eigenvalues(i, part)
        return Factors.open(job.finish(2))

    without = fitted(tmp_path / "without", [parts[0], parts[1].take([2, 3, 4])])
    assert not told
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    assert same(fitted(tmp_path / "with", parts), without)
    assert told == [(1, parts[1].document_ids[:2])]
    poisoned(4, parts)
    with pytest.raises(InputError, match=r"document '.*' \(of 4 such"):
        Fit(model, maps, tmp_path / "most", **OPTIONS).covariances(1, parts[1])


def test_a_model_that_padding_makes_nan_is_told_from_a_document_that_is(tmp_path: Path) -> None:
    """In float64 the mask of Gemma 2's windows overflows where a padded row has nothing to attend to."""
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        intermediate_size=12, sliding_window=3, attn_implementation="eager",
    )  # fmt: skip
    model = freeze(transformers.Gemma2ForCausalLM(config).double())
    maps = tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(6, lengths=(4, 12))
    job = Fit(model, maps, tmp_path, "causal_lm", 0, batch_tokens=1000, budget_gb=1.0)
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM gives NaN for sequences that are padded.*batch_tokens: 1"):
        job.covariances(0, sequences)
    alone = Fit(model, maps, tmp_path, "causal_lm", 0, batch_tokens=1, budget_gb=1.0)
    (path,) = alone.covariances(0, sequences)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
