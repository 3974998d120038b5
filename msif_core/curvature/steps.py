"""The EK-FAC fit of one stage on disk: sums of each part of the sample, eigenbases, corrected eigenvalues.

The sample is cut into parts. Each pass writes the sums of a part in one file for each group of maps that fits the
memory budget; the files are added up in part order, one map at a time. Eigendecompositions are dealt out to as many
parts. So neither restarts nor the order in which parts finish change a bit of the result, and never more than the
budget is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from msif_core import storage
from msif_core.batching import IGNORED, Sequences
from msif_core.curvature import fit
from msif_core.curvature.factors import VERSION, MapFactors, write_tensors
from msif_core.curvature.filters import block_mean
from msif_core.errors import InputError
from msif_core.tracking import TrackedMap

Sums = dict[str, torch.Tensor]
SumOf = Callable[[list[TrackedMap], Sequences], Sums]
Quarantine = Callable[[int, list[str]], None]


def ignore_quarantine(_part: int, _documents: list[str]) -> None:
    """For those who keep no table of documents that were set aside."""


class _Matrix(NamedTuple):
    """A covariance to diagonalise: operations (but for a factor), its key among the sums, where its eigenbasis goes."""

    cost: int
    key: str
    name: str
    file: str
    group: int


@dataclass(frozen=True)
class Fit:
    """The fit of a stage's maps into `folder`.

    `quarantine(part, documents)` is told of all documents of the part whose gradients are not finite, each time that
    there are more; they leave the sums.
    """

    model: nn.Module
    maps: list[TrackedMap]
    folder: Path
    task: str
    seed: int
    batch_tokens: int
    budget_gb: float
    quarantine: Quarantine = ignore_quarantine

    @cached_property
    def groups(self) -> list[list[TrackedMap]]:
        """The maps, in groups whose statistics fit the budget together."""
        return list(fit.partitions(self.maps, self.budget_gb))

    def covariances(self, part: int, sequences: Sequences) -> list[Path]:
        """Sums of a a^T and d d^T over one part of the sample: a file for each group of maps."""

        def sums(maps: list[TrackedMap], sequences: Sequences) -> Sums:
            return fit.covariance_sums(
                self.model, maps, sequences, task=self.task, seed=self.seed, batch_tokens=self.batch_tokens
            )

        return [self._write("covariance", part, group, sequences, sums) for group in range(len(self.groups))]

    def eigenbases(self, part: int, parts: int, device: torch.device) -> list[Path]:
        """Add up one part's share of the covariances, of all `parts`, and diagonalise them in float64: a file for each.

        The costliest are dealt out first, so that the shares are alike. The model is not used, nor by `finish`.
        """
        written = []
        for matrix in self._matrices[part::parts]:

            def build(temporary: Path, matrix: _Matrix = matrix) -> None:
                total, dtype = add_up(matrix.key, self._open("covariance", parts, matrix.group))
                write_tensors(temporary, {matrix.name: torch.linalg.eigh(total.to(device)).eigenvectors.to(dtype)})

            written.append(storage.build_once(self.folder / matrix.file, build))
        return written

    @cached_property
    def _matrices(self) -> list[_Matrix]:
        """The A of every input group and the S of every map, the costliest to diagonalise first."""
        found: dict[str, _Matrix] = {}
        for group, maps in enumerate(self.groups):
            for m in maps:
                A, S = f"A/{m.input_group}", f"S/{m.name}"
                found.setdefault(A, _Matrix(m.d_in**3, A, "Q_A", input_file(m.input_group), group))
                found[S] = _Matrix(m.pieces[0] * m.pieces[1] ** 3, S, "Q_S", bases_file(m.name), group)
        return sorted(found.values(), key=lambda matrix: (-matrix.cost, matrix.key))

    def eigenvalues(self, part: int, sequences: Sequences) -> list[Path]:
        """Sums of squared rotated gradients over one part, in the eigenbases that stand in the folder."""
        device = next(self.model.parameters()).device

        def sums(maps: list[TrackedMap], sequences: Sequences) -> Sums:
            bases = {m.name: read_bases(self.folder, m, device) for m in maps}
            return fit.eigenvalue_sums(
                self.model, maps, bases, sequences, task=self.task, seed=self.seed, batch_tokens=self.batch_tokens
            )

        return [self._write("eigenvalues", part, group, sequences, sums) for group in range(len(self.groups))]

    def finish(self, parts: int) -> Path:
        """Means over sequences of the squared rotated gradients; returns the finished factors' folder."""
        for group, maps in enumerate(self.groups):
            count = _total("sequences", self._open("eigenvalues", parts, group))
            for m in maps:

                def build(temporary: Path, name: str = m.name, group: int = group, count: int = count) -> None:
                    total, dtype = add_up(name, self._open("eigenvalues", parts, group))
                    write_tensors(temporary, {"eigenvalues": (total / count).to(dtype)})

                storage.build_once(self.folder / eigenvalues_file(m.name), build)
        first = self._open("eigenvalues", parts, 0)
        means, unreached = reached_means(self.maps, self._block_means())
        manifest = {
            "version": VERSION,
            "sequences": _total("sequences", first),
            "mean_targets": _total("targets", first) / _total("sequences", first),
            "maps": {
                m.name: {
                    "input": input_file(m.input_group),
                    "bases": bases_file(m.name),
                    "eigenvalues": eigenvalues_file(m.name),
                    "mean": means[m.name].tolist(),
                }
                for m in self.maps
            },
            "unreached": unreached,
        }
        storage.write_json(self.folder / "factors.json", manifest)
        return self.folder

    def _block_means(self) -> dict[str, torch.Tensor]:
        """Mean eigenvalue of every block of every map, [G], from the finished files."""
        found = {}
        for m in self.maps:
            with safe_open(self.folder / eigenvalues_file(m.name), framework="pt") as tensors:
                found[m.name] = block_mean(tensors.get_tensor("eigenvalues")).flatten()
        return found

    def _file(self, kind: str, part: int, group: int) -> Path:
        """A change of the budget in mid-fit groups the maps anew: its files have names of their own."""
        return self.folder / f"partial-{self.budget_gb:g}GB" / f"{kind}-{part:05d}-{group:03d}.safetensors"

    def _write(
        self,
        kind: str,
        part: int,
        group: int,
        sequences: Sequences,
        sums: Callable[[list[TrackedMap], Sequences], Sums],
    ) -> Path:
        def build(temporary: Path) -> None:
            kept, found = self._finite(part, sequences, lambda kept: sums(self.groups[group], kept))
            found["sequences"] = torch.tensor(len(kept))
            first = 0 if self.task == "classification" else 1  # nothing predicts a text's first token
            found["targets"] = torch.tensor(sum(int((labels[first:] != IGNORED).sum()) for labels in kept.labels))
            write_tensors(temporary, found)

        return storage.build_once(self._file(kind, part, group), build)

    def _open(self, kind: str, parts: int, group: int) -> list[Any]:
        """The parts' files of one group of maps, leaving out parts that the sample missed.

        Opened anew for each map: what was read of a file stays in memory as long as it is open.
        """
        files = [safe_open(self._file(kind, part, group), framework="pt") for part in range(parts)]
        found = [file for file in files if int(file.get_tensor("sequences"))]
        if not found:
            raise InputError(f"{self.folder}: no sequence with a target fell into the fit's sample")
        return found

    def _check_alone(self, sequences: Sequences, error: fit.NonFiniteError) -> None:
        """Refuse a model whose gradients are not finite because of the padding beside a sequence.

        Raises:
            InputError: a sequence's gradients are finite when it is alone.
        """
        alone = fit.finite_sequences(self.model, self.maps, sequences, task=self.task, batch_tokens=0)
        if alone.any():
            raise InputError(
                f"{type(self.model).__name__} gives NaN for sequences that are padded in their batch, which are finite "
                f"alone (document {sequences.document_ids[int(np.argmax(alone))]!r}); set compute.dtype: float32, "
                "compute.attention: sdpa, or compute.batch_tokens: 1"
            ) from error

    def _finite(self, part: int, sequences: Sequences, sums: Callable[[Sequences], Sums]) -> tuple[Sequences, Sums]:
        """The sums over the sequences whose gradients are finite, and those sequences.

        Raises:
            InputError: most of the part's sequences have gradients that are not finite.
        """
        record = self.folder / f"dropped-{part:05d}.json"
        dropped = set(storage.read_json(record)) if record.exists() else set()
        while True:
            kept = sequences.take([row for row, name in enumerate(sequences.fingerprints) if name not in dropped])
            try:
                return kept, sums(kept)
            except fit.NonFiniteError as error:
                finite = fit.finite_sequences(
                    self.model, self.maps, kept, task=self.task, batch_tokens=self.batch_tokens
                )
                self._check_alone(kept.take(np.flatnonzero(~finite)), error)
                finite[error.rows] = False
                if 2 * int(finite.sum()) < len(sequences):
                    raise
                dropped |= {kept.fingerprints[row] for row in np.flatnonzero(~finite)}
                documents = zip(sequences.document_ids, sequences.fingerprints, strict=True)
                self.quarantine(part, [document for document, name in documents if name in dropped])
                storage.write_json(record, sorted(dropped))


def reached_means(maps: list[TrackedMap], means: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The mean eigenvalues [G] that relative filters refer to, and the maps with a block that nothing reached.

    A block whose mean is at the level of rounding, beside the largest of all, has no curvature: its mean is 0. An
    expert that no token of the sample reached has none either, but documents may reach it: its mean is that of the
    experts beside it, so that it is filtered by their damping alone.
    """
    largest = max(float(mean.max()) for mean in means.values())
    rounding = torch.finfo(next(iter(means.values())).dtype).eps ** 2 * largest
    found = {name: torch.where(mean > rounding, mean, 0) for name, mean in means.items()}
    unreached = [m.name for m in maps if bool((found[m.name] == 0).any())]
    for stack in {(m.expert.module, m.expert.parameter) for m in maps if m.expert}:
        names = [m.name for m in maps if m.expert and (m.expert.module, m.expert.parameter) == stack]
        reached = [found[name] for name in names if found[name].all()]
        for name in names:
            if reached and not found[name].all():
                found[name] = torch.stack(reached).mean(dim=0)
    return found, unreached


def read_bases(folder: Path, tracked: TrackedMap, device: torch.device) -> MapFactors:
    """The eigenbases of a map whose eigenvalues are still to be found (they read as empty)."""
    with safe_open(folder / input_file(tracked.input_group), framework="pt", device=str(device)) as tensors:
        Q_A = tensors.get_tensor("Q_A")
    with safe_open(folder / bases_file(tracked.name), framework="pt", device=str(device)) as tensors:
        return MapFactors(Q_A, tensors.get_tensor("Q_S"), torch.empty(0))


def add_up(key: str, files: list[Any]) -> tuple[torch.Tensor, torch.dtype]:
    """The files' sums of `key` added in float64, in their order and one at a time; and their own dtype."""
    first = files[0].get_tensor(key)
    total = first.double().clone()
    for file in files[1:]:
        total += file.get_tensor(key)
    return total, first.dtype


def _total(key: str, files: list[Any]) -> int:
    return sum(int(file.get_tensor(key)) for file in files)


def input_file(group: str) -> str:
    """File of an input group's Q_A."""
    return f"{group}.input.safetensors"


def bases_file(name: str) -> str:
    """File of a map's Q_S."""
    return f"{name}.bases.safetensors"


def eigenvalues_file(name: str) -> str:
    """File of a map's corrected eigenvalues."""
    return f"{name}.eigenvalues.safetensors"
