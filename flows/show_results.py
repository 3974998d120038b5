"""What a command made, on the terminal: answers, builds, and comparisons of methods."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flows.changes import what_changed
from flows.plain_console import PlainConsole
from msif_core import storage
from msif_core.attribution import Attribution
from msif_core.config import Config
from msif_core.coverage import LOW
from msif_core.generations import withheld
from msif_core.pipeline import Pipeline
from msif_core.report import retrieval
from msif_core.report.page import on_one_line
from msif_core.workspace import Workspace
from tasks.summary import tokens


def print_attribution(folder: Path, console: PlainConsole, top: int) -> None:
    """A ranked table for each query."""
    attribution = Attribution.open(folder)
    texts = attribution.documents
    rows = attribution.table.to_pylist()
    for query in attribution.queries.to_pylist():
        title = f"{on_one_line(query['prompt']) or query['query_id']}  →  {query['completion']}"
        table = Table("rank", "score", "pct", "document", "text", title=title)
        for row in rows:
            if row["query_id"] == query["query_id"] and row["side"] == "proponent" and row["rank"] <= top:
                text = texts[row["document_id"]].text
                shown = (f"{row['score']:.4g}", f"{row['percentile']:.1f}", row["document_id"], text[:70])
                table.add_row(str(row["rank"]), *shown)
        console.print(table)
    console.print(f"Stored: {folder}")
    console.print(f"Page:   {folder / 'page.html'}")


def print_coverage(config: Config, console: PlainConsole) -> None:
    """What is tracked of each stage's model, and what a user should know of it."""
    pipeline = Pipeline(config)
    for stage in (stage.name for stage in config.stages):
        coverage = pipeline.coverage(stage)
        if coverage.share >= LOW:
            console.print(f"Stage {stage}: {coverage.told()}.")
        for remark in pipeline.remarks(stage, coverage):
            console.print(f"Warning: {remark}.", style="yellow")


def print_change(config: Config, before: dict[str, Any] | None, built: Path, console: PlainConsole) -> None:
    """What a build did, and why."""
    change = what_changed(before, storage.read_json(built / "manifest.json"), withheld(built, config.index))
    console.print(change[0].upper() + change[1:])


def print_encoding(config: Config, built: Path, console: PlainConsole) -> None:
    """The windows of each stage, and what of its documents its tokenizer does not know."""
    found = storage.read_json(built / "manifest.json").get("tokens", {})
    for stage in (stage.name for stage in config.stages if stage.name in found):
        console.print(f"Stage {stage}: {tokens(found[stage])}.")


def print_recall(config: Config, console: PlainConsole) -> None:
    """What the published generation's retrieval was measured to find."""
    manifest = storage.read_json(Workspace(config.workspace.resolve()).current_generation() / "manifest.json")
    recall = manifest["recall"]
    head, rows = retrieval.table(recall, wide=False)
    if rows:
        table = Table(
            *head, title="What retrieval finds, by the sequences taken", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for before, row in zip([None, *rows], rows, strict=False):
            table.add_row(row[0] if before is None or before[0] != row[0] else "", *row[1:])
        console.print(table)
    for number, sentence in enumerate(retrieval.sentences(recall)):
        console.print(sentence, style="yellow" if number == 0 and recall["verdict"] != "better" else None)


def print_retraining(result: dict[str, Any], console: PlainConsole) -> None:
    """Every method against retraining, one row a method."""
    title = f"Against retraining on {result['subsets']} subsets, {result['repeats']} of them with two seeds"
    metrics = {(m["method"], m["metric"], m["queries"]): m for m in result["metrics"]}
    groups = [group for group in ("all", "gold", "control") if any(key[1:] == ("lds", group) for key in metrics)]
    columns = [("lds", group, f"LDS\n{group}") for group in groups]
    columns += [("mrr", "gold", "MRR"), ("recall_at_10", "gold", "gold in\ntop 10")]
    columns += [("tail_patch", "all", "a step on\nthe top 10"), ("left_out", "gold", "without\nthe top")]
    table = Table("method", *(head for _, _, head in columns), title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].min_width = len("multi-stage,")
    for method in dict.fromkeys(m["method"] for m in result["metrics"]):
        cells = []
        for metric, group, _ in columns:
            found = metrics.get((method, metric, group)) or metrics.get((method, metric, "all"))
            error = "" if found is None or found["error"] is None else f" ±{found['error']:.2f}"
            cells.append("–" if found is None else f"{found['value']:.2f}{error}")
        table.add_row(method, *cells)
    console.print(table)
    console.print(f"Stored: {result['folder']}")
    console.print(f"Plot:   {result['folder']}/lds.png")


def _signed(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.3f}" if error is None else f"{value:+.3f} ± {error:.3f}"


def print_comparison(result: dict[str, Any], console: PlainConsole) -> None:
    """Fact tracing and tail-patch, one row a method."""
    title = f"{result['queries']} questions with a known source document"
    table = Table(
        "method", "MRR", "gold in top 10", "loss change after a step on the top 10", "against random", title=title
    )
    for row in result["methods"]:
        traced = ["–", "–"] if row["mrr"] is None else [f"{row['mrr']:.2f}", f"{row['recall_at_10']:.2f}"]
        changes = [_signed(row[name], row[f"{name}_error"]) for name in ("loss_change", "against_random")]
        table.add_row(row["method"], *traced, *changes)
    console.print(table)
    if result["no_tail_patch"]:
        console.print(f"No training step: {result['no_tail_patch']}")
