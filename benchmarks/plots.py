"""Plots of the tables, as PNG files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.tables import Table

TARGET = 1.25
"""Times the flop floor that each pass should stay under."""


def draw(found: Sequence[Table], folder: Path) -> list[Path]:
    """Ratios to the floor, ratios to msif, and search times, as far as their tables are there."""
    folder.mkdir(parents=True, exist_ok=True)
    floors = [t for t in found if t.title.startswith("Floor")]
    peers = [t for t in found if t.title.startswith("Peers")]
    searches = [t for t in found if t.title.startswith("Search: time")]
    drawn = []
    if floors:
        groups = {t.title.partition(": ")[2]: _column(t, "times the floor") for t in floors}
        drawn.append(_bars(groups, "times the flop floor", folder / "floor.png", TARGET))
    for table in peers:
        steps = [c.removesuffix(", ms a sequence") for c in table.columns if c.endswith("ms a sequence")]
        at = [i + 1 for i, c in enumerate(table.columns) if c.endswith("ms a sequence")]
        groups = {str(r[0]): {s: r[i] for s, i in zip(steps, at, strict=True)} for r in table.rows}
        drawn.append(_bars(groups, "times msif", folder / "peers.png", 1.0))
    for table in searches:
        groups = {name: _column(table, f"{name}, ms") for name in ("p50", "p99")}
        drawn.append(_bars(groups, "ms a query", folder / "search.png", None))
    return drawn


def _column(table: Table, name: str) -> dict[str, object]:
    at = list(table.columns).index(name)
    return {str(row[0]): row[at] for row in table.rows if row[at] is not None}


def _bars(groups: dict[str, dict[str, object]], label: str, path: Path, line: float | None) -> Path:
    """Grouped bars: one colour a group, one cluster a key."""
    keys = list(dict.fromkeys(key for values in groups.values() for key, value in values.items() if value is not None))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        heights = [float(str(values[k])) if values.get(k) is not None else 0.0 for k in keys]
        bars = axes.bar([x + i * width for x in range(len(keys))], heights, width, label=name)
        axes.bar_label(bars, [f"{h:.3g}" if h else "" for h in heights], fontsize=7)
    if line is not None:
        axes.axhline(line, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(keys))], keys, rotation=15, ha="right", fontsize=8)
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
