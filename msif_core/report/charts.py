"""Marks of the page: token levels, the score distribution, contributions by layer. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from msif_core.attribution import FloatArray, Heatmap

LEVELS = 5
"""Steps of colour on each side of zero."""


def number(value: float | None, digits: int = 3) -> str:
    """`value` with its sign and a true minus, to `digits` significant digits or to the unit."""
    if value is None or math.isnan(value):
        return "–"
    if 10**digits - 0.5 <= abs(value) < 1e7:
        return f"{value:+,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:+#.{digits}g}".partition("e")
    text = mantissa.rstrip(".") + (f"e{int(exponent)}" if exponent else "")
    return text.replace("-", "−")


def level(value: float, strongest: float) -> str:
    """CSS class of a value: p1 to p5 for proponents, n1 to n5 for opponents, none near zero."""
    if strongest <= 0 or math.isnan(value):
        return ""
    step = round(LEVELS * min(1.0, abs(value) / strongest))
    return f"{'p' if value > 0 else 'n'}{step}" if step else ""


def token_spans(heat: Heatmap) -> Markup:
    """Tokens as coloured spans, relative to the strongest token; near-zero neighbours as plain text."""
    strongest = float(np.abs(heat.scores).max(initial=0.0))
    parts = []
    for token, score in zip(heat.tokens, heat.scores, strict=True):
        css = level(float(score), strongest)
        title = number(float(score))
        span = Markup('<i class="{}" title="{}">{}</i>')
        parts.append(span.format(css, title, token) if css else escape(token))
    return Markup("").join(parts)


def strongest_tokens(heat: Heatmap, count: int = 5) -> list[tuple[str, float]]:
    """The tokens that carry most, of either sign, with their parts: what the colours say in words."""
    order = np.argsort(-np.abs(heat.scores), kind="stable")[:count]
    return [(heat.tokens[i].strip() or "␣", float(heat.scores[i])) for i in order if heat.scores[i]]


@dataclass(frozen=True)
class Grid:
    """Contributions by layer (rows) and kind of map (columns), with the sums of both."""

    kinds: list[str]
    layers: list[str]
    cells: list[list[float | None]]
    sums: list[float]
    kind_sums: list[float]

    @property
    def strongest(self) -> float:
        """Largest magnitude of a cell."""
        return max((abs(v) for row in self.cells for v in row if v is not None), default=0.0)

    @property
    def strongest_sum(self) -> float:
        """Largest magnitude of a layer's or a kind's sum."""
        return max(map(abs, self.sums + self.kind_sums), default=0.0)

    @property
    def total(self) -> float:
        """The whole score."""
        return sum(self.sums)


def split_name(name: str) -> tuple[int | None, str]:
    """Layer number and kind of a map: "gpt_neox.layers.3.mlp.dense" is (3, "mlp.dense"). Experts are of one kind."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+?)(?:\.\d+)?$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def grid(names: Sequence[str], scores: Sequence[float]) -> Grid:
    """Sum the scores of maps into a grid of layers and kinds."""
    values: dict[tuple[int, str], float] = {}
    for name, score in zip(names, scores, strict=True):
        layer, kind = split_name(name)
        key = (-1 if layer is None else layer, kind)
        values[key] = values.get(key, 0.0) + score
    kinds = sorted({kind for _, kind in values})
    layers = sorted({layer for layer, _ in values}, key=lambda layer: (layer < 0, layer))
    cells = [[values.get((layer, kind)) for kind in kinds] for layer in layers]
    sums = [sum(v for v in row if v is not None) for row in cells]
    kind_sums = [sum(v for v in column if v is not None) for column in zip(*cells, strict=True)]
    return Grid(kinds, ["other" if layer < 0 else str(layer) for layer in layers], cells, sums, kind_sums)


@dataclass(frozen=True)
class Distribution:
    """Geometry of the score distribution in a box of WIDTH x HEIGHT; x is asinh of the score."""

    bars: list[tuple[float, float, float]]
    proponents: list[float]
    opponents: list[float]
    candidates: list[float]
    ticks: list[tuple[float, str]]
    zero: float


WIDTH, HEIGHT = 640.0, 96.0
BINS = 48


def distribution(sample: FloatArray, ranked: FloatArray, candidates: FloatArray) -> Distribution | None:
    """Histogram of the random sample with the scores of ranked documents and of all candidates; None without any."""
    sample, ranked, candidates = (part[np.isfinite(part)] for part in (sample, ranked, candidates))
    values = np.concatenate([sample, ranked, candidates]).astype(np.float64)
    if len(values) == 0 or not np.abs(values).max():
        return None
    unit = float(np.median(np.abs(sample))) if len(sample) else 0.0
    unit = unit or float(np.abs(values).max()) / 100
    low, high = min(math.asinh(values.min() / unit), -0.3), max(math.asinh(values.max() / unit), 0.3)
    margin = 0.04 * (high - low)

    def x(score: float) -> float:
        return WIDTH * (math.asinh(score / unit) - low + margin) / (high - low + 2 * margin)

    counts, edges = np.histogram([x(v) for v in sample], bins=BINS, range=(0, WIDTH))
    tallest = max(int(counts.max()), 1)
    bars = [(float(e), WIDTH / BINS - 1, HEIGHT * c / tallest) for e, c in zip(edges, counts, strict=False) if c]
    exponents = range(math.floor(math.log10(unit)), math.ceil(math.log10(np.abs(values).max())) + 1)
    powers = [10.0**e for e in exponents]
    ticks: list[tuple[float, str]] = [(x(0), "0")]
    for value in sorted([*powers, *(-p for p in powers)], key=abs, reverse=True):
        at = x(value)
        if 36 < at < WIDTH - 36 and all(abs(at - other) > 52 for other, _ in ticks):
            ticks.append((at, f"{value:+,g}".replace("-", "−")))
    marks = [(x(float(v)), v > 0) for v in ranked]
    rug = sorted({round(x(float(v)), 1) for v in candidates})
    return Distribution(bars, [m for m, up in marks if up], [m for m, up in marks if not up], rug, sorted(ticks), x(0))
