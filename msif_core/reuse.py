"""What earlier builds made of the same sequences: copied, not computed again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def copy_known(
    wanted: Sequence[str], earlier: Iterable[tuple[Sequence[str], npt.NDArray[Any]]], out: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Fill the rows of `out` [n, ...] whose fingerprint an earlier table knows; returns which rows those are [n].

    Args:
        wanted: fingerprints of the n rows.
        earlier: tables, each as fingerprints and rows [m, ...]; the first that knows a fingerprint counts, and none
            is read once all are known.
        out: the array to fill.
    """
    rows: dict[str, list[int]] = {}
    for row, fingerprint in enumerate(wanted):
        rows.setdefault(fingerprint, []).append(row)
    known = np.zeros(len(wanted), dtype=np.bool_)
    if not rows:
        return known
    for fingerprints, table in earlier:
        for source, fingerprint in enumerate(fingerprints):
            for row in rows.pop(fingerprint, ()):
                out[row] = table[source]
                known[row] = True
        if not rows:
            break
    return known
