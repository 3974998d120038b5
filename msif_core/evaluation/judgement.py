"""Every method held against retraining: one row a method, as Parquet for SQL and as one plot.

Columns: the linear datamodeling score, fact tracing of the gold documents, the loss change after a step on the top
documents (tail-patch), and the loss change after retraining without them (leave-some-out).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from msif_core import corpus, storage
from msif_core.curvature.factors import VERSION
from msif_core.evaluation.facts import ranks_of_scores, trace_facts
from msif_core.evaluation.lds import datamodeling, mean_and_error, noise_ceiling, paired_difference
from msif_core.evaluation.methods import Pool, all_methods
from msif_core.evaluation.retraining import LEFT_OUT, FloatArray, Retraining, Run, write_rows
from msif_core.evaluation.tail_patch import tail_patch
from msif_core.queries import Queries

METRICS = pa.schema([
    ("ground_truth", pa.string()), ("method", pa.string()), ("metric", pa.string()), ("stage", pa.string()),
    ("queries", pa.string()), ("n_queries", pa.int32()), ("value", pa.float64()), ("error", pa.float64()),
])  # fmt: skip
BEST = "multi-stage, damped"
LEFT_OUT_METHODS = (BEST, "EK-FAC, query at the last stage", "TF-IDF")
"""Methods whose top documents are left out of a retraining; each costs a training for each query."""

RANDOM_DRAWS = 3
TOP = 10
TAIL_PATCH_RATE = 0.02
Scores = Mapping[str, FloatArray]


def score_methods(retraining: Retraining) -> Path:
    """Train the reference models, score the pool by every method; [Q, N] each, columns in the pool's order.

    Methods but that "as configured" take the first and last stage's `damping`, as relative ones, and tau 1.
    """

    def build(temporary: Path) -> None:
        pool = Pool(retraining.reference(), retraining.queries)
        places = {name: i for i, name in enumerate(pool.documents)}
        order = [places[name] for name in retraining.pool_ids]
        first, later = retraining.config.stages[retraining.config.attributed_index], retraining.config.stages[-1]
        found = all_methods(pool, first.filter.damping, later.filter.damping)
        with open(temporary, "wb") as handle:
            np.savez(handle, **{name: scores[:, order] for name, scores in found.items()})  # type: ignore[arg-type]

    filters = storage.fingerprint([s.filter.model_dump() for s in retraining.config.stages])
    curvature = storage.fingerprint(VERSION, retraining.config.curvature.model_dump())
    return storage.build_once(retraining.folder / f"scores-{filters[:8]}{curvature[:8]}.npz", build)


def read_scores(path: Path) -> dict[str, FloatArray]:
    """Scores by method."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


# -- leave some out -----------------------------------------------------------------------------------


def left_out_runs(retraining: Retraining, scores: Scores) -> list[Run]:
    """The pool whole, without each method's top documents of some queries, and without random ones."""
    size, queries = retraining.settings, retraining.queries
    if not size.left_out_queries:
        return []
    names = np.array(retraining.pool_ids)
    asked = [row for row, data in enumerate(queries.metadata) if data.get("gold_doc_ids")] or list(range(len(queries)))
    runs, rows = [Run("whole", "left_out", -1, 0)], []
    for row in asked[: size.left_out_queries]:
        for method in LEFT_OUT_METHODS:
            top = tuple(sorted(names[np.argsort(-scores[method][row], kind="stable")[: size.left_out]].tolist()))
            runs.append(_without(top))
            rows.append((retraining.key, runs[-1].name, method, queries.ids[row], top))
    for draw in range(RANDOM_DRAWS):
        drawn = np.random.default_rng([size.seed, 2, draw]).permutation(names)[: size.left_out]
        runs.append(_without(tuple(sorted(drawn.tolist()))))
        rows += [
            (retraining.key, runs[-1].name, "random", queries.ids[row], runs[-1].without)
            for row in asked[: size.left_out_queries]
        ]
    write_rows(retraining.folder / "left_out.parquet", rows, LEFT_OUT)
    return list({run.name: run for run in runs}.values())


def _without(documents: tuple[str, ...]) -> Run:
    return Run(f"without-{storage.fingerprint(documents)}", "left_out", -1, 0, documents)


def left_out_changes(retraining: Retraining, stage: str, query_ids: list[str]) -> dict[str, FloatArray]:
    """By method, the rise of each query's loss after retraining without its top documents."""
    path = retraining.folder / "left_out.parquet"
    if not path.exists():
        return {}
    whole = retraining.read_run(Run("whole", "left_out", -1, 0), stage, query_ids)
    changes: dict[str, dict[str, list[float]]] = {}
    for row in corpus.read_table(path).to_pylist():
        losses = retraining.read_run(Run(row["run"], "left_out", -1, 0), stage, query_ids)
        column = query_ids.index(row["query_id"])
        changes.setdefault(row["method"], {}).setdefault(row["query_id"], []).append(losses[column] - whole[column])
    return {method: np.array([np.mean(v) for v in found.values()]) for method, found in changes.items()}


# -- the table ----------------------------------------------------------------------------------------


def judge(retraining: Retraining, scores: Scores) -> dict[str, Any]:
    """Hold every method against the ground truth; writes metrics.parquet and lds.png, and returns the table."""
    queries = retraining.queries
    gold = np.array([bool(data.get("gold_doc_ids")) for data in queries.metadata])
    groups = {name: rows for name, rows in (("all", gold | True), ("gold", gold), ("control", ~gold)) if rows.any()}
    last = retraining.config.stages[-1].name
    losses = retraining.read_losses(last, queries.ids)
    per_query = {name: datamodeling(table, losses.masks, losses.values) for name, table in scores.items()}
    rows: list[tuple[Any, ...]] = []

    def note(method: str, metric: str, group: str, count: int, value: float, error: float | None = None) -> None:
        rows.append((retraining.key, method, metric, last, group, count, value, error))

    for method, found in per_query.items():
        for group, kept in groups.items():
            note(method, "lds", group, int(kept.sum()), *mean_and_error(found[kept]))
            if method != BEST and BEST in per_query:
                against = paired_difference(per_query[BEST][kept], found[kept])
                note(method, "lds_multi_stage_minus_this", group, int(kept.sum()), *against)
    repeated = len(losses.first) / len(losses.masks)
    for group, kept in groups.items() if len(losses.first) > 1 else ():
        ceiling = noise_ceiling(losses.first[:, kept], losses.second[:, kept], repeated)
        note("noise ceiling", "lds", group, int(kept.sum()), *ceiling)
    if gold.any():
        names = [list(data.get("gold_doc_ids", [])) for data in queries.metadata]
        for method, table in scores.items():
            traced = trace_facts(ranks_of_scores(table, retraining.pool_ids, names))
            note(method, "mrr", "gold", traced.queries, traced.mrr)
            note(method, "recall_at_10", "gold", traced.queries, traced.recall[10])
    for method, change in _tail_patches(retraining, scores, queries).items():
        note(method, "tail_patch", "all", len(queries), *mean_and_error(change))
    for method, change in left_out_changes(retraining, last, queries.ids).items():
        note(method, "left_out", "gold" if gold.any() else "all", len(change), *mean_and_error(change))
    write_rows(retraining.folder / "metrics.parquet", rows, METRICS)
    plot(rows, retraining.folder / "lds.png")
    return {
        "folder": str(retraining.folder),
        "subsets": len(losses.masks),
        "repeats": len(losses.first),
        "metrics": [dict(zip(METRICS.names, row, strict=True)) for row in rows],
    }


def _tail_patches(retraining: Retraining, scores: Scores, queries: Queries) -> dict[str, FloatArray]:
    """Loss changes after one step on each method's top documents, at the reference's last model."""
    from msif_core.models import load_model

    stage = retraining.config.stage(retraining.config.attribute_to)
    sequences = retraining.sequences(stage)
    place: dict[str, list[int]] = {}
    for row, name in enumerate(sequences.document_ids):
        place.setdefault(name, []).append(row)

    def of(row: npt.NDArray[np.int64]) -> list[int]:
        return [i for column in row for i in place.get(retraining.pool_ids[column], [])]

    best = {name: np.argsort(-table, axis=1, kind="stable")[:, :TOP] for name, table in scores.items()}
    retrieved = {name: [sequences.take(of(row)) for row in rows] for name, rows in best.items()}
    model = load_model(str(retraining.folder / "reference-0" / "models" / retraining.config.stages[-1].name))
    return tail_patch(model, queries.sequences, retrieved, TAIL_PATCH_RATE)


def plot(rows: list[tuple[Any, ...]], path: Path) -> None:
    """The linear datamodeling score of each method, with errors and the noise ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [row for row in rows if row[2] == "lds"]
    groups = list(dict.fromkeys(row[4] for row in found))
    methods = [m for m in dict.fromkeys(row[1] for row in found) if m != "noise ceiling"]
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4 * len(groups) + 2, 4.2), sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        value = {row[1]: (row[6], row[7]) for row in found if row[4] == group}
        colors = ["tab:orange" if name.startswith("multi-stage") else "tab:blue" for name in methods]
        axis.barh(methods, [value[n][0] for n in methods], xerr=[value[n][1] for n in methods], color=colors)
        if "noise ceiling" in value:
            axis.axvline(value["noise ceiling"][0], color="black", linestyle="--", label="noise ceiling")
            axis.legend(loc="upper right", fontsize=8)
        axis.set_title(f"{group} queries")
        axis.set_xlabel("linear datamodeling score")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
