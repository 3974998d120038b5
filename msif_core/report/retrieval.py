"""The measured retrieval of a generation as a table and as sentences, for the terminal, the UI and the page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

SOURCES = {"gradient": "gradient index", "bm25": "words (BM25)", "both": "both"}
MEASURES = {
    "recall": "exact top ten found",
    "weight": "influence that stands out found",
    "best": "exact best found",
}


def table(recall: Row, errors: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each source finds, by the share that it takes; with standard errors where asked for.

    Empty where nothing was measured, or where an earlier version of the program measured it otherwise.
    """
    found = recall.get("found", [])
    shares = list(dict.fromkeys(row["share"] for row in found))
    by_place = {(row["source"], row["share"]): row for row in found}
    sources = [source for source in SOURCES if any(row["source"] == source for row in found)]
    rows = [
        ["sequences taken", SOURCES[source], *(f"{by_place[source, share]['taken']:,.0f}" for share in shares)]
        for source in sources
    ]
    rows += [
        [told, SOURCES[source], *(_value(by_place[source, share], name, errors) for share in shares)]
        for name, told in MEASURES.items()
        for source in sources
    ]
    return ["", "", *(f"{share:.1%}" for share in shares)], rows


def _value(row: Row, name: str, errors: bool) -> str:
    if row[name] is None:
        return "–"
    error = row[f"{name}_error"]
    return f"{row[name]:.2f}" if error is None or not errors else f"{row[name]:.2f} ±{error:.2f}"


def sentences(recall: Row) -> list[str]:
    """What the table means: the verdict first. Empty where `table` is."""
    if "told" not in recall:
        return []
    none = recall["queries"] - recall["standing_out"]
    told = [
        recall["told"],
        f"Measured with {recall['queries']:,} held-out queries on {recall['sequences']:,} sequences scored exactly"
        f"{_cut(recall.get('cut'))}; {recall['bytes_per_sequence']:,.0f} bytes of index a sequence. A column is the "
        "share of the sequences that each source takes: chance finds that share of anything. An answer takes "
        f"{recall['answer_share']:.1%} from each.",
        "Influence stands out where an exact score is positive and in the highest hundredth of the query's scores; "
        "what is found is a share of its sum."
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
