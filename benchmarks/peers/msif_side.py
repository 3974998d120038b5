"""msif's side: fit, scores and, where FAISS and pydantic are, index, from the library's own functions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import inputs
from benchmarks.peers.protocol import Case, Step, serve
from msif_core import directions, models, scoring, tracking
from msif_core.chain import Chain, FilteredStage
from msif_core.curvature import fit
from msif_core.curvature.factors import Factors
from msif_core.curvature.filters import Damped
from msif_core.curvature.steps import Fit
from msif_core.losses import target_loss
from msif_core.sketch import Sketcher

BUDGET = 8.0
CURVATURE: Any = SimpleNamespace(include=".*", track_unembedding=False, block_size=None, qkv_split="none")
"""Fused maps stay whole, as both peers take them."""


def prepare(case: Case) -> Mapping[str, Step]:
    """The steps of msif."""
    settings, scratch = case.settings, case.scratch("msif_side")
    model = models.load_model(case.model, device=settings["device"])
    maps = tracking.tracked_maps(model, CURVATURE)
    train, query = (inputs.as_sequences(case.tokens(name)) for name in ("train", "query"))
    batch_tokens = settings["batch"] * case.tokens("train").shape[1]
    folder = scratch / "factors"

    def fit_factors() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        # The empirical Fisher: the data's own labels where the library samples them.
        with mock.patch.object(fit, "sampled_loss", lambda task, _seed: target_loss(task)):
            steps = Fit(model, maps, folder, "causal_lm", seed=0, batch_tokens=batch_tokens, budget_gb=BUDGET)
            steps.covariances(0, train)
            steps.eigenbases(0, 1, model.device)
            steps.eigenvalues(0, train)
            steps.finish(1)

    def scores() -> np.ndarray:
        factors = Factors.open(folder, device=settings["device"])
        chain = Chain((FilteredStage(factors, Damped(settings["damping"])),))
        gradients = scoring.query_gradients(model, maps, query, batch_tokens, task="causal_lm", factors=factors)
        filtered = chain.filter_all(gradients, rotated=True)
        return scoring.score_sequences(model, maps, filtered, train, batch_tokens, task="causal_lm")

    def build(whitening: Any = "balanced") -> None:
        from msif_core import index  # a bare GPU machine has neither
        from msif_core.config import IndexSettings, SketchSettings

        sketch, factors = SketchSettings(whitening=whitening), Factors.open(folder, device=settings["device"])
        spectral = Damped(settings["damping"])
        kept = None
        if whitening != "none":
            chain = Chain((FilteredStage(factors, spectral),))
            kept = directions.choose(maps, chain, sketch.directions, sketch.dimensions)
        sketcher = Sketcher(maps, factors, spectral, sketch, "causal_lm", kept)
        phi = sketcher.documents(model, train, batch_tokens, BUDGET)
        kind = IndexSettings(kind="rabitq")
        trained = scratch / "trained.faiss"
        index.train(phi, kind, len(phi), trained)
        index.write_shard(trained, index.encode(trained, phi), train.sequence_ids, scratch / "shard.faiss")

    steps: dict[str, Step] = {"fit": fit_factors, "scores": scores}
    if find_spec("faiss") and find_spec("pydantic"):
        steps |= {"index": build, "index, not whitened": lambda: build("none")}
    return steps


if __name__ == "__main__":
    serve(prepare)
