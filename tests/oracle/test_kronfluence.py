"""Agreement with kronfluence, the reference EK-FAC library: the same model, tokens, Fisher and damping.

kronfluence runs in an environment of its own, `benchmarks/peers/install.sh kronfluence`, which makes runs/peers
(or the folder that MSIF_PEERS names); without it the test is skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.__main__ import QUICK, write_case
from benchmarks.peers.protocol import Case, Side

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("MSIF_PEERS", ROOT / "runs" / "peers")).resolve()
RELATIVE_ERROR = 1e-3

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(
        not (PEERS / "kronfluence" / ".ok").exists(),
        reason=f"no {PEERS}/kronfluence: run benchmarks/peers/install.sh kronfluence, or set MSIF_PEERS",
    ),
]


def scores_of(python: Path, module: str, case: Case) -> np.ndarray:
    """Fit and score in a process of that side; float64 [queries, documents]."""
    side = Side(python, f"benchmarks.peers.{module}", case)
    side.load()
    try:
        side.run("fit")
        return np.load(side.run("scores")["matrix"]).astype(np.float64)
    finally:
        side.close()


def test_factors_give_kronfluences_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)  # the sides import benchmarks
    case = write_case(tmp_path / "case", QUICK, "cpu")
    theirs = scores_of(PEERS / "kronfluence" / "bin" / "python", "kronfluence_side", case)
    ours = scores_of(Path(sys.executable), "msif_side", case)
    assert ours.shape == theirs.shape == (QUICK.queries, QUICK.train)
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error < RELATIVE_ERROR, f"relative error {error:.1e}"
    assert np.abs(ours - theirs).max() < RELATIVE_ERROR * np.abs(theirs).max()
