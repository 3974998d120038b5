"""The measured retrieval of a generation as a table and as sentences, for the terminal, the UI and the page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

SOURCES = {"gradient": "gradients", "bm25": "words", "both": "both"}
CHANCE = "taken (chance)"
MEASURES = {
    "recall": "exact top ten",
    "weight": "standing-out influence",
    "best": "exact best",
}


def table(recall: Row, wide: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each source finds, by what it is asked for; a `wide` one has standard errors.

    Empty where nothing was measured, or where an earlier version of the program measured it otherwise.
    """
    found = recall.get("found", [])
    asked = {row["share"]: f"{row['share'] * recall['sequences']:,.0f}" for row in found}
    by_place = {(row["source"], row["share"]): row for row in found}
    sources = [source for source in SOURCES if any(row["source"] == source for row in found)]
    rows = [
        [CHANCE, SOURCES[source], *(f"{by_place[source, share]['taken'] / recall['sequences']:.1%}" for share in asked)]
        for source in sources
    ]
    rows += [
        [told, SOURCES[source], *(_value(by_place[source, share], name, wide) for share in asked)]
        for name, told in MEASURES.items()
        for source in sources
    ]
    heads = [f"{count} ({share:.1%})" if wide else f"{count}\n{share:.1%}" for share, count in asked.items()]
    return ["", "", *heads], rows


def _value(row: Row, name: str, wide: bool) -> str:
    if row[name] is None:
        return "–"
    error = row[f"{name}_error"]
    return f"{row[name]:.1%}" if error is None or not wide else f"{row[name]:.1%} ±{100 * error:.1f}"


def sentences(recall: Row) -> list[str]:
    """What the table means: the verdict first. Empty where `table` is."""
    if "told" not in recall:
        return []
    none = recall["queries"] - recall["standing_out"]
    told = [
        recall["told"],
        f"Measured with {recall['queries']:,} held-out queries on {recall['sequences']:,} sequences scored exactly"
        f"{_cut(recall.get('cut'))}; {recall['bytes_per_sequence']:,.0f} bytes of index a sequence. A column is the "
        f"number of sequences that each source is asked for; an answer asks each for {recall['answer_share']:.1%}. "
        "Both together take whole documents, and so more. Chance finds the share that is taken.",
        "The exact top ten count by rank, standing-out influence by weight: it is the sum of the exact scores that are "
        "positive and in the highest hundredth of the query's."
        + (f" {none:,} of the queries {'has' if none == 1 else 'have'} none." if none else ""),
    ]
    if (estimate := recall["estimate"]) is not None:
        parts = ", ".join(f"{name} {_quartiles(values)}" for name, values in estimate.items())
        told.append(
            f"The index's estimates beside exact scores, medians over the queries (and quartiles): {parts}. The noise "
            "is in standard deviations of the exact scores; without bias the slope is 1."
        )
    return told


def _cut(cut: Row | None) -> str:
    return (
        f", the queries cut to rank {cut['rank']}, which loses {cut['relative_error']:.1%} of their norm" if cut else ""
    )


def _quartiles(values: list[float]) -> str:
    low, median, high = (f"{value:.2g}" for value in values)
    return f"{median} ({low} to {high})"
