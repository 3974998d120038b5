"""EK-FAC factors of one stage: immutable, one safetensors file a map, memory-mapped, streamed map by map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msif_core import products, storage
from msif_core.curvature.filters import block_mean
from msif_core.errors import InputError

VERSION = 4
"""Of what the files hold: factors of another one are fitted anew."""


def rotate_gradient(V: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T V right for V [..., G, b, d_in], left [P, p, p] (as blocks on a diagonal), right [d_in, d_in]."""
    rows = products.product(V, right).view(*V.shape[:-3], *left.shape[:2], -1)
    return (left.mT @ rows).reshape(V.shape)


@dataclass(frozen=True)
class MapFactors:
    """Curvature of one map: H ~ (Q_A x Q_S) diag(Lambda) (Q_A x Q_S)^T, block by block.

    Q_A [d_in, d_in], Q_S [P, p, p], eigenvalues [G, b, d_in], with P p = G b: a block's S may be cut to diagonal
    pieces. Source: George et al. 2018; Grosse et al. 2023.
    """

    Q_A: torch.Tensor
    Q_S: torch.Tensor
    eigenvalues: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The mean eigenvalue [G, 1, 1] that relative filters refer to: that of each block."""
        return block_mean(self.eigenvalues)

    def rotate(self, V: torch.Tensor) -> torch.Tensor:
        """Into the eigenbasis: Q_S^T V Q_A."""
        return rotate_gradient(V, self.Q_S, self.Q_A)

    def unrotate(self, V: torch.Tensor) -> torch.Tensor:
        """Back from the eigenbasis: Q_S V Q_A^T."""
        return rotate_gradient(V, self.Q_S.mT, self.Q_A.mT)

    def rebase(self, V: torch.Tensor, other: Self) -> torch.Tensor:
        """V of this eigenbasis in that of another stage: one turn by Q^T Q' where that is cheaper than two."""
        (pieces, p), d_in = self.Q_S.shape[:2], len(self.Q_A)
        if V.numel() * (p + d_in) <= d_in**3 + pieces * p**3:
            return other.rotate(self.unrotate(V))
        return rotate_gradient(V, self.Q_S.mT @ other.Q_S, self.Q_A.mT @ other.Q_A)

    def rebase_squares(self, energy: torch.Tensor, other: Self) -> torch.Tensor:
        """Mean squares in another eigenbasis of coordinates that are uncorrelated in this one: by squared cosines."""
        S, A = (self.Q_S.mT @ other.Q_S).square(), (self.Q_A.mT @ other.Q_A).square()
        return rotate_gradient(energy, S.to(energy.dtype), A.to(energy.dtype))

    def apply(self, V: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """f(H) V for a function of the eigenvalues; V [..., G, b, d_in]."""
        return self.unrotate(self.rotate(V) * function(self.eigenvalues))


class StoredFactors(MapFactors):
    """Those of a map on disk: each tensor is read when it is first used, and kept with the object.

    The mean is as the fit decided: 0 for a block that nothing reached (`steps.reached_means`).
    """

    def __init__(self, read: Callable[[str, str], torch.Tensor], entry: dict[str, Any]) -> None:
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "_files", entry)

    Q_A = cached_property(lambda self: self._read(self._files["input"], "Q_A"))
    Q_S = cached_property(lambda self: self._read(self._files["bases"], "Q_S"))
    eigenvalues = cached_property(lambda self: self._read(self._files["eigenvalues"], "eigenvalues"))

    @property
    def mean(self) -> torch.Tensor:
        """The mean eigenvalue [G, 1, 1] that relative filters refer to."""
        return self.eigenvalues.new_tensor(self._files["mean"])[:, None, None]  # type: ignore[attr-defined]


class Factors:
    """The factors of a stage in a folder; nothing that was read of a map is kept here."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: str, dtype: torch.dtype | None) -> None:
        self.folder = folder
        self.maps: dict[str, dict[str, Any]] = manifest["maps"]
        self.unreached: list[str] = manifest["unreached"]
        self.mean_targets: float = manifest["mean_targets"]
        self.sequences: int = manifest["sequences"]
        self.fingerprint = folder.name
        self._device = device
        self._dtype = dtype

    @classmethod
    def open(cls, folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Factors:
        """Open finished factors; tensors come on `device`, as `dtype` if given.

        Raises:
            InputError: the fit is not finished, or was written by another version.
        """
        path = folder / "factors.json"
        if not path.exists():
            raise InputError(f"{folder}: the EK-FAC fit is not finished; run `msif run CONFIG`")
        manifest = storage.read_json(path)
        if manifest["version"] != VERSION:
            raise InputError(f"{folder}: factors of version {manifest['version']}, this msif reads {VERSION}: refit")
        return cls(folder, manifest, device, dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.maps

    def __getitem__(self, name: str) -> StoredFactors:
        return StoredFactors(self._read, self.maps[name])

    def _read(self, file: str, name: str) -> torch.Tensor:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt", device=_current(self._device)) as tensors:
                found: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            mend = f"delete the folder {self.folder} and run `msif run CONFIG`, which fits its stage again"
            raise InputError(f"{path}: the factors cannot be read ({error}); {mend}") from None
        return found.to(self._dtype) if self._dtype else found


def _current(device: str) -> str:
    """Of several accelerators the one that torch is at: to safetensors "cuda" is the first."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to `path`; the caller makes it atomic."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
