"""Scores against retraining: `python -m benchmarks.accuracy [CONFIG]`.

Trains what is missing of the ground truth (deployments/configs/retrain.yaml: minutes to an hour), prints the table
of methods at the default settings, then sweeps damping, alpha and tau over decades: the setting is chosen on one
half of the subsets and of the queries and reported on the other half of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from flows.show_results import print_retraining
from msif_core.chain import Chain, FilteredStage
from msif_core.config import Config
from msif_core.curvature.filters import Damped, Identity, SpectralFilter, Unrolled
from msif_core.evaluation.judgement import judge, left_out_runs, read_scores, score_methods
from msif_core.evaluation.lds import FloatArray, mean_and_error, noise_ceiling, paired_difference, spearman
from msif_core.evaluation.methods import Gradients, Pool, single_stage
from msif_core.evaluation.retraining import Losses, Retraining

CONFIG = Path(__file__).parents[1] / "deployments" / "configs" / "retrain.yaml"
DECADES = [10.0**k for k in range(-4, 4)]
DEFAULT = 0.1
console = Console(width=150)


@dataclass(frozen=True)
class Subsets:
    """The pool's gradients summed over each subset: all that a linear datamodeling score needs of them.

    `sums` holds [M, d_out d_in] of each map, `losses` the ground truth, `gold` which queries have a source document.
    """

    pool: Pool
    sums: Gradients
    losses: Losses
    gold: np.ndarray

    @classmethod
    def of(
        cls, pool: Pool, retraining: Retraining, losses: Losses, gold: np.ndarray, weights: FloatArray | None = None
    ) -> Subsets:
        """Sum the gradients, each sequence's multiplied by its weight."""
        return cls.summing(pool, pool.document_gradients(pool.target), retraining, losses, gold, weights)

    @classmethod
    def summing(
        cls,
        pool: Pool,
        found: Gradients,
        retraining: Retraining,
        losses: Losses,
        gold: np.ndarray,
        weights: FloatArray | None = None,
    ) -> Subsets:
        """Sum other gradients of the pool's sequences."""
        masks = sequence_masks(pool, retraining, losses)
        if weights is not None:
            masks = masks * torch.from_numpy(weights.astype(np.float32))
        sums = {name: masks.to(gradients.device) @ gradients.flatten(1) for name, gradients in found.items()}
        return cls(pool, sums, losses, gold)

    def lds(self, filters: Mapping[str, SpectralFilter], query_model: str | None = None) -> FloatArray:
        """Score of a chain of filters for each query, over all subsets."""
        return self.score(self.total(filters, query_model))

    def score(self, predicted: FloatArray) -> FloatArray:
        """Score of summed influences [M, Q], for each query."""
        return spearman(predicted, -self.losses.values)

    def total(self, filters: Mapping[str, SpectralFilter], query_model: str | None = None) -> FloatArray:
        """Summed scores of each subset: [M, Q]."""
        return np.sum(list(self.predicted(filters, query_model).values()), axis=0)

    def predicted(self, filters: Mapping[str, SpectralFilter], query_model: str | None = None) -> dict[str, FloatArray]:
        """Summed scores of each subset, map by map: [M, Q]."""
        links = tuple(FilteredStage(self.pool.stages.factors(name), spectral) for name, spectral in filters.items())
        return self.through(Chain(links), self.pool.query_gradients(query_model or self.pool.last))

    def through(self, chain: Chain, queries: Gradients) -> dict[str, FloatArray]:
        """The same through any chain, for any gradients of the queries."""
        filtered = chain.filter_all(dict(queries))
        return {
            name: (self.sums[name] @ gradients.flatten(1).T).double().cpu().numpy()
            for name, gradients in filtered.items()
        }


def sequence_masks(pool: Pool, retraining: Retraining, losses: Losses) -> torch.Tensor:
    """Which of the pool's sequences were in each subset: float32 [M, S]."""
    places = {name: i for i, name in enumerate(retraining.pool_ids)}
    columns = [places[name] for name in pool.sequences.document_ids]
    return torch.from_numpy(losses.masks[:, columns].astype(np.float32))


def ground_truth(config: Config) -> Retraining:
    """The ground truth, trained as far as it is missing."""
    retraining = Retraining(config)
    retraining.prepare()
    missing = retraining.missing(retraining.subset_runs())
    for done, run in enumerate(missing, 1):
        retraining.train(run)
        print(f"subsets: {done}/{len(missing)}", file=sys.stderr)
    return retraining


def table_of_methods(retraining: Retraining) -> None:
    """Every method at the default settings, all subsets, all queries; the table of `msif evaluate --retrain`."""
    scores = read_scores(score_methods(retraining))
    for run in left_out_runs(retraining, scores):
        retraining.train(run)
    print_retraining(judge(retraining, scores), console)


def families(subsets: Subsets, alone: Subsets) -> Iterator[tuple[str, str, FloatArray]]:
    """(Family, setting, score of each query) of every point of the sweep."""
    target, last = subsets.pool.target, subsets.pool.last
    for d in DECADES:
        yield "EK-FAC, pre-trained model", f"damping {d:g}", subsets.lds({target: Damped(d)}, target)
        yield "EK-FAC, fine-tuned model", f"damping {d:g}", alone.lds({target: Damped(d)})
        yield "EK-FAC, query at the last stage", f"damping {d:g}", subsets.lds({target: Damped(d)})
    yield "gradient dot product", "", subsets.lds({target: Identity()})
    for d, a in product(DECADES, DECADES):
        yield "multi-stage, damped", f"damping {d:g}, alpha {a:g}", subsets.lds({target: Damped(d), last: Damped(a)})
    for first, later in product(DECADES[2:], DECADES[2:]):
        unrolled = {target: Unrolled(first), last: Unrolled(later)}
        yield "multi-stage, unrolled", f"tau {first:g}, {later:g}", subsets.lds(unrolled)


def sweep(subsets: Subsets, alone: Subsets) -> dict[str, dict[str, tuple[FloatArray, FloatArray]]]:
    """Family to setting to the scores on the choosing half and on the reporting half of subsets and queries."""
    curves: dict[str, dict[str, tuple[FloatArray, FloatArray]]] = {}
    halves = [halved(subsets, alone, half) for half in (0, 1)]
    for points in zip(*(families(*half) for half in halves), strict=True):
        (family, setting, choosing), (_, _, reporting) = points
        curves.setdefault(family, {})[setting] = (choosing[0::2], reporting[1::2])
    return curves


def halved(subsets: Subsets, alone: Subsets, half: int) -> tuple[Subsets, Subsets]:
    """Every second subset."""
    losses = subsets.losses
    part = Losses(losses.masks[half::2], losses.values[half::2], losses.first[half::2], losses.second[half::2])
    return tuple(  # type: ignore[return-value]
        Subsets(whole.pool, {name: value[half::2] for name, value in whole.sums.items()}, part, whole.gold)
        for whole in (subsets, alone)
    )


def print_sweep(curves: dict[str, dict[str, tuple[FloatArray, FloatArray]]]) -> None:
    """Each family's chosen setting, reported on the other half, and beside the best multi-stage setting."""
    chosen = {family: max(points, key=lambda s: points[s][0].mean()) for family, points in curves.items()}
    best = curves["multi-stage, damped"][chosen["multi-stage, damped"]][1]
    table = Table(
        "family", "chosen", "LDS where chosen", "LDS reported", "multi-stage damped minus this", "worst and best point",
        title="Chosen on half of the subsets and queries, reported on the other half of both",
    )  # fmt: skip
    for family, setting in chosen.items():
        points = curves[family]
        choosing, reporting = points[setting]
        value, error = mean_and_error(reporting)
        difference, paired = paired_difference(best, reporting)
        spread = [found[1].mean() for found in points.values()]
        table.add_row(
            family, setting, f"{choosing.mean():.3f}", f"{value:.3f} ± {error:.3f}",
            f"{difference:+.3f} ± {paired:.3f}", f"{min(spread):.3f} … {max(spread):.3f}",
        )  # fmt: skip
    console.print(table)


def plot_sweep(curves: dict[str, dict[str, tuple[FloatArray, FloatArray]]], path: Path) -> None:
    """All points: damping (tau) on the x axis, one line an alpha (a later tau)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4), sharey=True)
    single = [f for f in curves if f.startswith("EK-FAC")]
    for family in single:
        axes[0].plot(DECADES, [found[1].mean() for found in curves[family].values()], "o-", label=family)
    axes[0].axhline(curves["gradient dot product"][""][1].mean(), color="grey", label="gradient dot product")
    for axis, family, xs in (
        (axes[1], "multi-stage, damped", DECADES),
        (axes[2], "multi-stage, unrolled", DECADES[2:]),
    ):
        values = np.array([found[1].mean() for found in curves[family].values()]).reshape(len(xs), len(xs))
        for column, level in enumerate(xs):
            axis.plot(xs, values[:, column], "o-", label=f"{'alpha' if 'damped' in family else 'later tau'} {level:g}")
    for axis, title, label in zip(
        axes, ("one stage", "multi-stage, damped", "multi-stage, unrolled"), ("damping", "damping", "tau"), strict=True
    ):
        axis.set(xscale="log", title=title, xlabel=f"{label} of the attributed stage (relative)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("LDS, reporting half")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def open_subsets(retraining: Retraining) -> Subsets:
    """The reference models' gradients, summed over subsets."""
    queries = retraining.queries
    gold = np.array([bool(data.get("gold_doc_ids")) for data in queries.metadata])
    losses = retraining.read_losses(retraining.config.stages[-1].name, queries.ids)
    return Subsets.of(Pool(retraining.reference(), queries), retraining, losses, gold)


def open_alone(subsets: Subsets, retraining: Retraining) -> Subsets:
    """The same of the fine-tuned model, as if its only stage were the attributed one."""
    pool = Pool(single_stage(subsets.pool.stages.config), subsets.pool.queries)
    return Subsets.of(pool, retraining, subsets.losses, subsets.gold)


def main() -> None:
    config = Config.load(sys.argv[1] if len(sys.argv) > 1 else CONFIG)
    retraining = ground_truth(config)
    table_of_methods(retraining)
    subsets = open_subsets(retraining)
    alone = open_alone(subsets, retraining)
    curves = sweep(subsets, alone)
    print_sweep(curves)
    losses = subsets.losses
    if len(losses.first) > 1:
        repeated = len(losses.first) / len(losses.masks)
        ceiling, error = noise_ceiling(losses.first[:, 1::2], losses.second[:, 1::2], repeated)
        console.print(f"Noise ceiling of the reporting half's queries: {ceiling:.3f} ± {error:.3f}")
    path = retraining.folder / "sweep.png"
    plot_sweep(curves, path)
    console.print(f"Plot: {path}")


if __name__ == "__main__":
    main()
