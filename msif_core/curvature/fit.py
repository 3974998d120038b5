"""The EK-FAC fit, shard by shard: covariance sums, eigenbases, corrected eigenvalues (METHOD section 3).

Each pass writes one file of sums for each shard and adds them in shard order, so neither restarts nor the
order in which shards finish change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import nn

from msif_core import storage
from msif_core.batching import IGNORED, Sequences, batches
from msif_core.capture import capture
from msif_core.curvature.factors import VERSION, MapFactors, write_tensors
from msif_core.errors import InputError
from msif_core.losses import sampled_loss, target_loss, uniforms
from msif_core.models import TrackedMap

EIGENVALUE_SEED = 0x5EED
"""Added to the seed of the second pass: fresh labels, independent of the first pass's."""


CHUNK_ENTRIES = 1 << 26
"""Entries of per-sequence gradients held at one time (256 MB in float32)."""


class NonFiniteError(InputError):
    """NaN or infinite gradients; names the map and lists the sequences' documents."""

    def __init__(self, name: str, documents: list[str]) -> None:
        self.map = name
        self.documents = documents
        super().__init__(
            f"{name}: NaN or infinite gradients from document {documents[0]!r} (of {len(documents)} such sequences in "
            "its batch); quarantine it, or set compute.dtype: float32"
        )


def sample_rows(fingerprints: list[str], share: float, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a random sample of about `share` of the sequences: those whose hash falls below it.

    Which sequences are taken depends on their content and the seed alone, not on shards or order.
    """
    return np.flatnonzero(uniforms(fingerprints, 1, seed ^ 0xC0FFEE)[:, 0] < share)


def sum_dtype(model: nn.Module) -> torch.dtype:
    """float64 for a float64 model, float32 for every other."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def partitions(maps: list[TrackedMap], budget_gb: float) -> Iterator[list[TrackedMap]]:
    """Consecutive maps whose statistics fit the budget together; each part is one pass over the shard."""
    part: list[TrackedMap] = []
    used = 0.0
    for tracked in maps:
        groups, block, d_in = tracked.shape
        need = 4e-9 * (d_in * d_in + groups * block * block + 2 * groups * block * d_in)
        if part and used + need > budget_gb:
            yield part
            part, used = [], 0.0
        part.append(tracked)
        used += need
    yield part


def covariance_sums(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, seed: int, batch_tokens: int
) -> dict[str, torch.Tensor]:
    """Sums over tokens: `A/<input group>` [d_in, d_in] of a a^T and `S/<map>` [G, b, b] of d d^T."""
    dtype = sum_dtype(model)
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, rows: torch.Tensor) -> None:
        rows = rows.to(dtype)
        if key not in sums:
            sums[key] = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], rows.shape[-1])
        if rows.ndim == 2:
            sums[key].addmm_(rows.mT, rows)
        else:
            sums[key].baddbmm_(rows.mT, rows)

    seen: set[str] = set()
    finite: dict[str, torch.Tensor] = {}

    def consume(tracked: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> None:
        finite[tracked.name] = finite_rows(a, d)
        if tracked.input_group not in seen:
            seen.add(tracked.input_group)
            add(f"A/{tracked.input_group}", a.flatten(0, 1))
        flat = d.flatten(0, 1)
        add(f"S/{tracked.name}", flat.squeeze(1)[None] if tracked.groups == 1 else flat.transpose(0, 1))

    device = next(model.parameters()).device
    for batch in batches(sequences, batch_tokens, device):
        seen.clear()
        capture(model, maps, batch, sampled_loss(task, seed), consume)
        table = torch.stack(list(finite.values())).cpu()
        if not bool(table.all()):
            first = int(torch.nonzero(~table.all(dim=1))[0])
            bad = batch.rows[(~table[first]).numpy()]
            raise NonFiniteError(list(finite)[first], [sequences.document_ids[row] for row in bad])
    return sums


def finite_rows(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Whether each sequence's inputs and gradients are finite: [N]."""
    return a.flatten(1).isfinite().all(dim=1) & d.flatten(1).isfinite().all(dim=1)


def finite_sequences(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, batch_tokens: int
) -> npt.NDArray[np.bool_]:
    """Whether each sequence's gradients are finite in every map, [N]; the others belong into quarantine."""
    flags = np.ones(len(sequences), dtype=np.bool_)
    for batch in batches(sequences, batch_tokens, next(model.parameters()).device):
        found: list[torch.Tensor] = []

        def consume(_: TrackedMap, a: torch.Tensor, d: torch.Tensor, found: list[torch.Tensor] = found) -> None:
            found.append(finite_rows(a, d))

        capture(model, maps, batch, target_loss(task), consume)
        flags[batch.rows] = torch.stack(found).all(dim=0).cpu().numpy()
    return flags


def eigenvalue_sums(
    model: nn.Module,
    maps: list[TrackedMap],
    factors: dict[str, MapFactors],
    sequences: Sequences,
    *,
    task: str,
    seed: int,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Sums over sequences of (Q_S^T G Q_A)^2, [G, b, d_in] for each map."""  # fmt: skip
    dtype = sum_dtype(model)
    sums = {m.name: torch.zeros(m.shape, dtype=dtype, device=next(model.parameters()).device) for m in maps}

    def consume(tracked: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> None:
        for part in gradient_chunks(tracked, len(a)):
            rotated = rotated_gradients(a[part].to(dtype), d[part].to(dtype), factors[tracked.name])
            sums[tracked.name].add_(rotated.square_().sum(dim=0))

    for batch in batches(sequences, batch_tokens, next(model.parameters()).device):
        capture(model, maps, batch, sampled_loss(task, seed + EIGENVALUE_SEED), consume)
    return sums


def gradient_chunks(tracked: TrackedMap, count: int) -> Iterator[slice]:
    """Slices of `count` sequences whose gradients of one map fit into `CHUNK_ENTRIES` together."""
    step = max(1, CHUNK_ENTRIES // tracked.size)
    return (slice(start, start + step) for start in range(0, count, step))


def rotated_gradients(a: torch.Tensor, d: torch.Tensor, factors: MapFactors) -> torch.Tensor:
    """Per-sequence gradients in the eigenbasis, [N, G, b, d_in], from a [N, T, d_in] and d [N, T, G, b].

    Rotates the tokens or the gradients, whichever takes fewer operations.
    """
    groups, block, d_in = d.shape[-2], d.shape[-1], a.shape[-1]
    tokens = a.shape[1] * (d_in * d_in + groups * block * block)
    gradients = groups * block * d_in * (block + d_in)
    if tokens <= gradients:
        return per_sequence_gradients(a @ factors.Q_A, rotate_outputs(d, factors.Q_S))
    return factors.rotate(per_sequence_gradients(a, d))


def rotate_outputs(d: torch.Tensor, Q_S: torch.Tensor) -> torch.Tensor:
    """D [N, T, G, b] times each block's Q_S [G, b, b]."""
    if Q_S.shape[0] == 1:
        return d @ Q_S[0]
    return torch.einsum("ntgb,gbc->ntgc", d, Q_S)


def per_sequence_gradients(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """sum_t d_t a_t^T of each sequence: [N, G, b, d_in]."""
    return torch.bmm(d.flatten(2).mT, a).unflatten(1, d.shape[2:])


def covariance_shard(
    model: nn.Module,
    maps: list[TrackedMap],
    sequences: Sequences,
    path: Path,
    *,
    task: str,
    seed: int,
    batch_tokens: int,
    budget_gb: float,
) -> Path:
    """Covariance sums of one shard, written to `path` unless they stand there whole."""  # fmt: skip

    def build(temporary: Path) -> None:
        sums: dict[str, torch.Tensor] = {}
        for part in partitions(maps, budget_gb):
            found = covariance_sums(model, part, sequences, task=task, seed=seed, batch_tokens=batch_tokens)
            sums |= {key: value.cpu() for key, value in found.items()}
        _check_finite(sums, path)
        sums["sequences"] = torch.tensor(len(sequences))
        sums["targets"] = torch.tensor(sum(int((labels != IGNORED).sum()) for labels in sequences.labels))
        write_tensors(temporary, sums)

    return storage.build_once(path, build)


def combine_covariances(paths: list[Path], maps: list[TrackedMap], folder: Path) -> list[Path]:
    """Add the shards' covariances and diagonalise them in float64: one file an input group and one a map."""
    shards = [safe_open(path, framework="pt") for path in paths]
    inputs = list(dict.fromkeys(m.input_group for m in maps))
    jobs = [(f"A/{g}", "Q_A", folder / input_file(g)) for g in inputs]
    jobs += [(f"S/{m.name}", "Q_S", folder / bases_file(m.name)) for m in maps]
    written = []
    for key, name, path in jobs:

        def build(temporary: Path, key: str = key, name: str = name) -> None:
            found = [shard for shard in shards if key in shard.keys()]  # noqa: SIM118
            if not found:
                raise InputError(f"{folder}: no sequence with a target fell into the fit's sample")
            total, dtype = add_up(key, found)
            write_tensors(temporary, {name: torch.linalg.eigh(total).eigenvectors.to(dtype)})

        written.append(storage.build_once(path, build))
    return written


def eigenvalue_shard(
    model: nn.Module,
    maps: list[TrackedMap],
    sequences: Sequences,
    path: Path,
    *,
    folder: Path,
    task: str,
    seed: int,
    batch_tokens: int,
    budget_gb: float,
) -> Path:
    """Sums of squared rotated gradients of one shard, in the bases that stand in `folder`."""  # fmt: skip

    def build(temporary: Path) -> None:
        device = next(model.parameters()).device
        sums: dict[str, torch.Tensor] = {}
        for part in partitions(maps, budget_gb):
            bases = {m.name: read_bases(folder, m, device) for m in part}
            found = eigenvalue_sums(model, part, bases, sequences, task=task, seed=seed, batch_tokens=batch_tokens)
            sums |= {key: value.cpu() for key, value in found.items()}
        _check_finite(sums, path)
        sums["sequences"] = torch.tensor(len(sequences))
        sums["targets"] = torch.tensor(sum(int((labels != IGNORED).sum()) for labels in sequences.labels))
        write_tensors(temporary, sums)

    return storage.build_once(path, build)


def read_bases(folder: Path, tracked: TrackedMap, device: torch.device) -> MapFactors:
    """The eigenbases of a map whose eigenvalues are still to be found (they read as empty)."""
    with safe_open(folder / input_file(tracked.input_group), framework="pt", device=str(device)) as tensors:
        Q_A = tensors.get_tensor("Q_A")
    with safe_open(folder / bases_file(tracked.name), framework="pt", device=str(device)) as tensors:
        return MapFactors(Q_A, tensors.get_tensor("Q_S"), torch.empty(0))


def combine_eigenvalues(paths: list[Path], maps: list[TrackedMap], folder: Path) -> Path:
    """Mean over sequences of the squared rotated gradients; finishes the factors and returns their folder."""
    shards = [safe_open(path, framework="pt") for path in paths]
    sequences = sum(int(shard.get_tensor("sequences")) for shard in shards)
    targets = sum(int(shard.get_tensor("targets")) for shard in shards)
    for tracked in maps:

        def build(temporary: Path, name: str = tracked.name) -> None:
            total, dtype = add_up(name, shards)
            write_tensors(temporary, {"eigenvalues": (total / sequences).to(dtype)})

        storage.build_once(folder / eigenvalues_file(tracked.name), build)
    storage.write_json(
        folder / "factors.json",
        {
            "version": VERSION,
            "sequences": sequences,
            "mean_targets": targets / sequences,
            "maps": {
                m.name: {
                    "input": input_file(m.input_group),
                    "bases": bases_file(m.name),
                    "eigenvalues": eigenvalues_file(m.name),
                }
                for m in maps
            },
        },
    )
    return folder


def add_up(key: str, shards: list[Any]) -> tuple[torch.Tensor, torch.dtype]:
    """The shards' sums of `key` added in float64, in their order and one at a time; and their own dtype."""
    first = shards[0].get_tensor(key)
    total = first.double().clone()
    for shard in shards[1:]:
        total += shard.get_tensor(key)
    return total, first.dtype


def input_file(group: str) -> str:
    """File of an input group's Q_A."""
    return f"{group}.input.safetensors"


def bases_file(name: str) -> str:
    """File of a map's Q_S."""
    return f"{name}.bases.safetensors"


def eigenvalues_file(name: str) -> str:
    """File of a map's corrected eigenvalues."""
    return f"{name}.eigenvalues.safetensors"


def _check_finite(sums: dict[str, torch.Tensor], path: Path) -> None:
    for key, value in sums.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{path.name}: NaN or infinite sums in {key}; run in float32 (compute.dtype), "
                "or look for a broken document in this shard"
            )
