"""Summaries of a rebuild and of an attribution, as markdown for the UI."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msif_core.attribution import Attribution
from msif_core.report import retrieval

Row = dict[str, Any]
DOCUMENTS = 5
"""Documents shown of each query."""
MAPS = 5
"""Maps whose factors drifted most that are shown."""
QUERIES = 20
"""Queries shown of a run."""


def generation(manifest: Row, headline: str, folder: Path, published: bool) -> str:
    """A build of the index: what changed, how much of it there is, its recall, what it took."""
    recall = manifest.get("recall") or {}
    facts = {
        "published": "yes" if published else "**no**",
        "sequences": f"{manifest['n_sequences']:,}",
        **{f"tokens of {stage}": tokens(found) for stage, found in manifest.get("tokens", {}).items()},
        "index": f"{manifest['index_bytes'] / 1e6:,.1f} MB",
        "bytes per sequence": f"{recall['bytes_per_sequence']:,.0f}" if "bytes_per_sequence" in recall else "",
        "seconds to publish": f"{manifest['seconds']:,.1f}" if "seconds" in manifest else "",
        "generation before": f"`{manifest['parent']}`" if manifest.get("parent") else "none",
        **{f"factors of {stage}": f"`{factors}`" for stage, factors in manifest.get("factors", {}).items()},
    }
    parts = [
        f"# Generation {manifest['generation']}",
        headline[:1].upper() + headline[1:],
        table(("", ""), [(name, fact) for name, fact in facts.items() if fact]),
    ]
    if changes := manifest.get("changes"):
        parts += ["## What changed", table(("", *_columns(changes)), _rows(changes))]
    if told := retrieval.sentences(recall):
        found = retrieval.table(recall, wide=True)
        verdict = told[0] if recall["verdict"] == "better" else f"**{told[0]}**"
        parts += ["## What retrieval finds", verdict, *([table(*found)] if found[1] else []), *told[1:]]
    if drift := manifest.get("drift"):
        worst = sorted(drift["maps"].items(), key=lambda item: item[1]["noise"] - item[1]["difference"])[:MAPS]
        named = [(f"all maps, {drift['sequences']:,} sequences", drift), *worst]
        head = ("", "trace, now / then", "difference", "noise of the sample")
        rows = [(name, *(f"{v[key]:.2f}" for key in ("trace", "difference", "noise"))) for name, v in named]
        parts += ["## Drift of the pinned factors", table(head, rows)]
    return "\n\n".join([*parts, f"Files: [{folder.name}]({folder.as_uri()}), `{folder}`"])


def tokens(found: Row) -> str:
    """How a stage's documents were encoded: its windows, and what of them the tokenizer does not know."""
    text, unknown = f"sequences of at most {found['max_length']:,} tokens", found["unknown"]
    if unknown is None:
        return text
    example = f", for example {unknown['example']!r} of {unknown['document']!r}" if unknown["share"] else ""
    return f"{text}; {unknown['share']:.2%} unknown to the tokenizer{example}"


def attribution(found: Attribution, page: Path) -> str:
    """The strongest documents of each query, and where the whole answer is."""
    rows, asked = found.table.to_pylist(), len(found.query_ids)
    manifest = found.manifest
    parts = [
        f"# Attribution {found.run_id}",
        f"{asked:,} {'query' if asked == 1 else 'queries'}, {manifest['n_rescored']:,} sequences scored exactly in "
        f"{manifest['seconds']:,.1f} s, generation `{manifest['generation']}`. "
        "A positive score: more training on the document would lower the loss of the answer.",
        f"Page: [{page.name}]({page.as_uri()}), `{page}`",
    ]
    for query in found.queries.to_pylist()[:QUERIES]:
        own = [row for row in rows if row["query_id"] == query["query_id"] and row["rank"] <= DOCUMENTS]
        own.sort(key=lambda row: (row["side"] == "opponent", row["rank"]))
        cells = [
            (
                row["side"],
                row["rank"],
                f"{row['score']:.4g}",
                f"{row['percentile']:.1f}",
                row["document_id"],
                shortened(found.documents[row["document_id"]].text),
            )
            for row in own
        ]
        heading = f"## {cell(shortened(query['prompt'], 80))} → {cell(shortened(query['completion'], 80))}"
        parts += [heading, table(("side", "rank", "score", "percentile", "document", "text"), cells)]
    if asked > QUERIES:
        parts.append(f"{asked - QUERIES:,} more queries are in the answer: on the page, in SQL.")
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value on one line, with what markdown would read as markup taken literally."""
    text = " ".join(str(value).split())
    if text.startswith("`") or text in ("---", "**no**"):
        return text
    for mark in ("\\", "|", "<", "*", "_", "#"):
        text = text.replace(mark, "\\" + mark if mark != "<" else "&lt;")
    return text


def shortened(text: str, length: int = 100) -> str:
    """The first characters of a text, with an ellipsis where it goes on."""
    words = " ".join(text.split())
    return words if len(words) <= length else words[: length - 1] + "…"


def _columns(changes: Row) -> list[str]:
    return list(dict.fromkeys(name for counts in changes.values() for name in counts))


def _rows(changes: Row) -> list[tuple[Any, ...]]:
    return [(what, *(counts.get(name, "–") for name in _columns(changes))) for what, counts in changes.items()]
