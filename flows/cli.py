"""The command line: `msif COMMAND`. Each flow command brings a server up, runs, and prints what was made."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flows import prefect_defaults
from flows.plain_console import PlainConsole, visible
from msif_core.config import Config
from msif_core.errors import InputError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = PlainConsole(soft_wrap=False)

DEMO = Path(__file__).parent.parent / "deployments" / "configs" / "demo.yaml"
ConfigFile = Annotated[Path, typer.Argument(help="The configuration, a YAML file.", metavar="CONFIG")]
QueriesFile = Annotated[Path, typer.Option("--queries", help="Queries, a jsonl file.")]
KeepServer = Annotated[bool, typer.Option("--keep-server", help="Leave the local Prefect server running.")]


def main() -> None:
    """Entry point: a mistake of the user's is one message and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    prefect_defaults()
    logging.disable(logging.DEBUG)
    logging.raiseExceptions = False  # what cannot be logged, as on a full disk, is no error of its own
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except InputError as error:
        print(visible(f"msif: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def _leave(signum: int, _frame: object) -> None:
    """End by way of every `finally`, so that a local server is stopped too."""
    raise SystemExit(128 + signum)


@contextmanager
def orchestrated(config: Config, keep: bool) -> Iterator[None]:
    """A server for the flows inside; prints where their runs can be watched, and shows their steps."""
    import transformers

    from flows.runners import model_tasks
    from flows.server import limit_accelerator, server
    from flows.terminal import quiet_log, steps_shown
    from msif_core import storage

    workspace = config.workspace.resolve()
    storage.check_room(workspace)
    transformers.utils.logging.disable_progress_bar()
    with server(config.workspace, keep) as url:
        console.print(f"Prefect: {url.removesuffix('/api')}/runs")
        limit_accelerator(model_tasks(config))
        with quiet_log(), steps_shown(console):
            try:
                with storage.told(workspace):
                    yield
            except InputError:
                raise
            except Exception:
                storage.check_room(workspace)  # a full disk stops a local server too, which does not say so
                raise


@app.command()
def demo(keep_server: KeepServer = False) -> None:
    """Train two small stages on the shipped texts, fit, index, attribute ten questions, compare methods."""
    from flows.demo import demo as flow
    from flows.show_results import print_attribution, print_comparison, print_recall

    config = Config.load(DEMO)
    with orchestrated(config, keep_server):
        run, comparison = flow(config)
    print_attribution(run, console, top=3)
    print_recall(config, console)
    print_comparison(comparison, console)


@app.command()
def run(config: ConfigFile, keep_server: KeepServer = False) -> None:
    """Tokenize, fit and index. A second run finds everything in place and says so."""
    from flows.build_index import build_index
    from flows.show_results import print_change, print_coverage, print_encoding, print_recall

    settings = Config.load(config)
    before = published(settings)
    with orchestrated(settings, keep_server):
        built = build_index(settings)
    print_coverage(settings, console)
    print_change(settings, before, built, console)
    print_encoding(settings, built, console)
    print_recall(settings, console)


@app.command()
def attribute(
    config: ConfigFile,
    queries: QueriesFile,
    top_k: Annotated[int, typer.Option(min=0, help="Documents in each answer; 0: as the configuration says.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the influences to this Parquet file.")] = None,
    keep_server: KeepServer = False,
) -> None:
    """Rank pre-training documents for each query, with exact multi-stage scores."""
    import pyarrow.parquet as pq

    from flows.attribute import attribute as flow
    from flows.show_results import print_attribution
    from msif_core import storage
    from msif_core.attribution import Attribution

    settings = Config.load(config)
    if out is not None:
        check_file(out)
    with orchestrated(settings, keep_server):
        folder = flow(settings, queries_file=str(queries), top_k=top_k)
    if out is not None:
        with storage.atomic_path(out) as temporary:
            pq.write_table(Attribution.open(folder).table, temporary)
    print_attribution(folder, console, top=5)


@app.command()
def score(
    config: ConfigFile,
    queries: QueriesFile,
    documents: Annotated[Path, typer.Option(help="Documents, a jsonl file.")],
    out: Annotated[Path, typer.Option(help=r"Where to write float32 \[n_queries, n_documents], .npy.")],
) -> None:
    """Exhaustive exact scores, no index and no server."""
    from msif_core import storage
    from msif_core.pipeline import Pipeline

    check_file(out)
    scores = Pipeline.from_config(config).score(queries, documents)
    with storage.atomic_path(out) as temporary, open(temporary, "wb") as handle:
        np.save(handle, scores)
    console.print(f"{out}: float32 {list(scores.shape)}")


@app.command()
def tokens(
    config: ConfigFile,
    stage: Annotated[str, typer.Option(help="This stage's documents; without it every stage's, or queries.")] = "",
    queries: Annotated[Path | None, typer.Option(help="These queries, a jsonl file.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Records of each.")] = 3,
) -> None:
    """The first records as the models will see them, token by token, those with a loss marked. Builds nothing."""
    from flows.show_tokens import print_tokens
    from msif_core.pipeline import Pipeline

    pipeline = Pipeline.from_config(config)
    every = [stage.name for stage in pipeline.config.stages] if queries is None else []
    for name in [stage] if stage else every:
        found = pipeline.tokens(name, count=count)
        console.print(f"Stage {name}, windows of {pipeline.max_length(name):,} tokens at most\n")
        print_tokens(found, console)
    if queries is not None:
        found = pipeline.tokens(queries=queries, count=count)
        console.print(f"Queries of stage {pipeline.last}, {pipeline.query_length():,} tokens at most\n")
        print_tokens(found, console)


@app.command()
def rebuild(
    config: ConfigFile,
    refit: Annotated[bool, typer.Option(help="Fit the factors anew on the corpus as it is.")] = False,
    keep_server: KeepServer = False,
) -> None:
    """The periodic rebuild: factors stay pinned, only changed shards are sketched."""
    from flows.rebuild_index import rebuild_index
    from flows.show_results import print_change

    settings = Config.load(config)
    before = published(settings)
    with orchestrated(settings, keep_server):
        built = rebuild_index(settings, refit)
    print_change(settings, before, built, console)


@app.command()
def sql(
    config: ConfigFile,
    statement: Annotated[
        str, typer.Argument(help="One SELECT statement; without one, the ready queries are listed.")
    ] = "",
    ready: Annotated[str, typer.Option(help="A ready query instead of a statement, for example top_documents.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of a $name in the query; can be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all rows to this .csv or .parquet file.")] = None,
) -> None:
    """Ask the catalog; read-only, at any time."""
    from flows.show_rows import print_ready, print_rows, write_rows
    from msif_core import catalog

    known = catalog.ready_queries()
    if ready and statement:
        raise InputError("give a statement or --ready, not both")
    if ready and ready not in known:
        raise InputError(f"--ready {ready}: no such query; there are {', '.join(known)}")
    if not (ready or statement):
        print_ready(known, console)
        return
    pairs = [pair.partition("=") for pair in set_ or []]
    if bad := [name for name, sign, _ in pairs if not sign]:
        raise InputError(f"--set {bad[0]}: expected NAME=VALUE")
    rows = catalog.query(
        Config.load(config).workspace.resolve(), ready or statement, {name: value for name, _, value in pairs}
    )
    if out is None:
        print_rows(rows, console)
    else:
        write_rows(rows, out)
        console.print(f"{out}: {rows.num_rows:,} rows", soft_wrap=True)


@app.command()
def report(
    config: ConfigFile,
    run: Annotated[str, typer.Argument(help="Name of the attribution's run.")],
    query: Annotated[
        list[str] | None, typer.Option(help="Id of a query to show; can be repeated. The first 100 without.")
    ] = None,
) -> None:
    """Write an attribution as one self-contained HTML page."""
    from msif_core.attribution import Attribution
    from msif_core.workspace import Workspace

    folder = Workspace(Config.load(config).workspace.resolve()).attributions / run
    console.print(str(Attribution.open(folder).to_html(folder / "page.html", query or ())), soft_wrap=True)


@app.command()
def rollback(
    config: ConfigFile,
    to: Annotated[str | None, typer.Option(help="Another generation to publish, by its id.")] = None,
) -> None:
    """Publish the generation before the current one, which rebuilds then leave alone until its documents change."""
    from msif_core import catalog, generations
    from msif_core.workspace import Workspace

    workspace = Workspace(Config.load(config).workspace.resolve())
    published = generations.rollback(workspace, to)
    catalog.publish(workspace.root)
    console.print(f"Published: {published}")


@app.command()
def evaluate(
    config: ConfigFile,
    tail_patch_rate: Annotated[
        float, typer.Option(min=1e-12, help="Learning rate of the tail-patch's single step.")
    ] = 0.02,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Retrain all stages on subsets of the documents and compare with that.")
    ] = False,
    keep_server: KeepServer = False,
) -> None:
    """Influence beside other methods: recall, fact tracing and tail-patch on the index, or against retraining."""
    from flows.evaluate import evaluate as flow
    from flows.retrain import retrain as ground_truth
    from flows.show_results import print_comparison, print_recall, print_retraining

    settings = Config.load(config)
    if settings.queries is None:
        raise InputError(f"{config}: set `queries` to a jsonl file of held-out queries with gold_doc_ids")
    if retrain:
        with orchestrated(settings, keep_server):
            print_retraining(ground_truth(settings), console)
        return
    with orchestrated(settings, keep_server):
        comparison = flow(settings, tail_patch_rate)
    print_recall(settings, console)
    print_comparison(comparison, console)


@app.command()
def plan(
    config: ConfigFile,
    device: Annotated[str, typer.Option(help="measure (this machine), a100, h100 or h200.")] = "measure",
    sequences: Annotated[
        list[str] | None, typer.Option(help="STAGE=COUNT where a stage's documents are not at hand.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Accelerators, or machines, that share the work.")] = 1,
) -> None:
    """What it will take: parameters tracked, bytes, memory, operations and hours of each step. Builds nothing."""
    from flows.show_plan import print_plan
    from msif_core.plan import make_plan

    pairs = [pair.partition("=") for pair in sequences or []]
    if bad := [pair for pair in pairs if not pair[2].isdigit() or not int(pair[2])]:
        raise InputError(f"--sequences {''.join(bad[0])}: expected STAGE=COUNT, for example pretrain=100000")
    given = {name: int(count) for name, _, count in pairs}
    print_plan(make_plan(Config.load(config), device, given, devices), console)


@app.command()
def prune(
    config: ConfigFile,
    keep: Annotated[int, typer.Option(min=1, help="Generations to keep: the published one and those before it.")] = 3,
    grace_hours: Annotated[float, typer.Option(min=0, help="Files younger than this stay.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Drop old generations and what only they used: codes, factors, partial sums. Answers stay."""
    from msif_core import catalog
    from msif_core.pruning import prune as drop
    from msif_core.workspace import Workspace

    workspace = Workspace(Config.load(config).workspace.resolve())
    found = drop(workspace, keep, 3600 * grace_hours, dry_run)
    if found.paths and not dry_run:
        catalog.publish(workspace.root)
    for path in found.paths:
        console.print(str(path), soft_wrap=True)
    console.print(f"{'Would free' if dry_run else 'Freed'} {found.bytes / 1e6:,.1f} MB in {len(found.paths)} places")


@app.command()
def settings() -> None:
    """Print every setting of the configuration with its default, as Markdown."""
    from flows.show_settings import markdown

    print(markdown(), end="")


@app.command()
def serve(
    config: ConfigFile,
    cron: Annotated[str | None, typer.Option(help="When to rebuild, in UTC, for example '0 3 * * *'.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the machine's accelerator.")] = 1,
    keep_server: KeepServer = False,
) -> None:
    """Register the deployments and run what the UI, the schedule or an event asks for, until interrupted."""
    from flows.runners import model_tasks
    from flows.serve import alone, check_cron, serve_flows
    from flows.server import limit_accelerator, server
    from msif_core import storage

    settings = Config.load(config)
    name = deployment_name(settings.workspace)
    if cron is not None:
        check_cron(cron)
    storage.check_room(settings.workspace.resolve())
    with alone(settings.workspace), server(settings.workspace, keep_server) as url:
        limit_accelerator(model_tasks(settings))
        console.print(f"Prefect: {url.removesuffix('/api')}/deployments", soft_wrap=True)
        console.print(f"Events that re-index: msif.corpus.updated, msif.model.updated of msif.workspace.{name}")
        serve_flows(config, name, cron, limit)


def deployment_name(workspace: Path) -> str:
    """The workspace's name, without what Prefect refuses in a name, and the * that stands for any event."""
    return re.sub("[/%&<>*]", "-", workspace.name)


def check_file(out: Path) -> None:
    """Refuse a file that could not be written, before the work for it."""
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out}: name a file in a folder that exists")


def published(config: Config) -> dict[str, Any] | None:
    """Manifest of the published generation, None before the first."""
    from msif_core.generations import manifest_of
    from msif_core.workspace import Workspace

    workspace = Workspace(config.workspace.resolve())
    return manifest_of(workspace, workspace.published())
