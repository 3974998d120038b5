"""Recall of retrieval against bytes per sequence, after `msif run CONFIG`.

    python -m benchmarks.recall CONFIG [OUT.png] [--texts TEXTS.jsonl]

The exact top 10 and 100 of the held-out queries are looked for among the best 0.5% to 5% of all sequences, by many
sketches (benchmarks.sketches), by BM25, by both, and by cascades. One pass over the corpus serves all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sketches import Coding, Coordinates, Folded, Learned, Signed, Sketch, TwoSided, Weights, parts_of
from msif_core import corpus, directions, index, records, storage
from msif_core.batching import Sequences, batches
from msif_core.capture import capture
from msif_core.config import Config
from msif_core.evaluation.recall import recall_at_k
from msif_core.lexical import LexicalIndex
from msif_core.losses import target_loss
from msif_core.pipeline import Pipeline
from msif_core.queries import Queries
from msif_core.rows import Rows
from msif_core.scoring import query_gradients
from msif_core.sketch import Sketcher
from msif_core.tracking import TrackedMap

SHARES = (0.005, 0.01, 0.02, 0.05)
KS = (10, 100)
LEARNING = 1024
"""Documents that directions and energies are learned from, and as many fine-tuning examples at most as proxies."""

CASCADE = 0.05
"""Share of the sequences that a cascade's second step looks at."""

CHUNK = 16
"""Sequences that are sketched together: larger tensors would cost more page faults than arithmetic."""

ONE, TWO, FOUR, FULL = Coding("1 bit", 1), Coding("2 bits", 2), Coding("4 bits", 4), Coding("float32", 32)
console = Console(width=170)


@dataclass(frozen=True)
class Found:
    """One way to retrieve: its bytes per sequence, and each query's estimated scores [Q, N]."""

    family: str
    name: str
    bytes: float
    scores: np.ndarray


def gather(pipeline: Pipeline, sequences: Sequences) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows of a batch and their gradients in the attributed stage's eigenbasis, flat: float32 [n, D]."""
    model, maps = pipeline.model(pipeline.target), pipeline.maps(pipeline.target)
    factors = pipeline.factors(pipeline.target)
    held = {m.name: factors[m.name] for m in maps}
    loss = target_loss(pipeline.config.stage(pipeline.target).task)
    for batch in batches(sequences, pipeline.batch_tokens):
        found: dict[str, torch.Tensor] = {}

        def consume(m: TrackedMap, captured: Rows, found: dict[str, torch.Tensor] = found) -> None:
            found[m.name] = held[m.name].rotate(torch.einsum("ntgb,nti->ngbi", captured.d, captured.a)).flatten(1)

        capture(model, maps, batch, loss, consume)
        yield batch.rows, torch.cat([found[m.name] for m in maps], 1)


def passed(pipeline: Pipeline, sequences: Sequences) -> torch.Tensor:
    """Queries' gradients, filtered by the stages above, in the attributed stage's eigenbasis: [Q, D]."""
    maps, chain = pipeline.maps(pipeline.target), pipeline.chain()
    task = pipeline.config.stage(pipeline.last).task
    found = query_gradients(pipeline.model(pipeline.last), maps, sequences, pipeline.batch_tokens, task=task)
    rotated = [chain.passed(m.name, found[m.name]) for m in maps]
    return torch.cat([g.flatten(1) for g in rotated if g is not None], 1)


def filters(pipeline: Pipeline, whitening: str) -> Weights:
    """The attributed stage's filter, split as the library's whitening of that name does."""
    sketcher = sketcher_of(pipeline, 1024, whitening)
    f = [sketcher.filter.attributed(sketcher.factors[m.name].eigenvalues).flatten() for m in sketcher.maps]
    return Weights(torch.cat(f), torch.cat([sketcher.document_weight(m.name).flatten() for m in sketcher.maps]))


def sketcher_of(pipeline: Pipeline, dimensions: int, whitening: str = "eigen") -> Sketcher:
    """Of every direction."""
    settings = pipeline.config.sketch.model_copy(update={"dimensions": dimensions, "whitening": whitening})
    spectral, task = pipeline.curvature(pipeline.target).filter, pipeline.config.stage(pipeline.target).task
    return Sketcher(pipeline.maps(pipeline.target), pipeline.factors(pipeline.target), spectral, settings, task)


def directed(pipeline: Pipeline, share: float, weights: Weights) -> tuple[Weights, torch.Tensor]:
    """The library's directions for that share of the rotations: the balanced split, and which coordinates are kept."""
    split, mask = torch.ones_like(weights.f), torch.zeros_like(weights.f)
    parts, maps = parts_of(pipeline.maps(pipeline.target)), pipeline.maps(pipeline.target)
    kept = directions.choose(maps, pipeline.chain(), share, 0)
    for m in maps:
        if m.name in kept:
            places = parts[m.name].start + kept[m.name].take(torch.arange(m.size).view(m.shape))
            split[places], mask[places] = kept[m.name].split, 1.0
    return Weights(weights.f, weights.document * split), mask


def learn(pipeline: Pipeline, sequences: Sequences) -> Learned:
    """From a sample of the documents, and from fine-tuning examples in the queries' place."""
    weights = filters(pipeline, "eigen")
    sketcher = sketcher_of(pipeline, 32_000)
    learned = Learned(pipeline.maps(pipeline.target), weights, Folded(sketcher, Signed(sketcher, weights)))
    sample = sequences.take(np.random.default_rng(0).permutation(len(sequences))[:LEARNING])
    for _, flat in gather(pipeline, sample):
        learned.add(flat)
    pipeline.tokenize(pipeline.last)
    proxies = corpus.read_shard(pipeline.shards(pipeline.last)[0])
    chosen = proxies.take(np.random.default_rng(0).permutation(len(proxies))[: LEARNING // 2])
    learned.set_proxies(passed(pipeline, chosen))
    return learned


def sketches(pipeline: Pipeline, learned: Learned) -> Iterator[tuple[str, Sketch, tuple[Coding, ...]]]:
    """Every sketch and the codings that its vectors are tried in."""

    def folded(dimensions: int, signed: Signed) -> Folded:
        return Folded(sketcher_of(pipeline, dimensions), signed)

    def sign(weights: Weights, kept: torch.Tensor | None = None) -> Signed:
        return Signed(sketcher_of(pipeline, 1024), weights, kept)

    weights, maps = learned.weights, learned.maps
    even, split = sign(weights), sign(learned.split())
    first = Coding("1 bit, its first 8,000", 1, 8_000)
    yield "Hadamard 32,000", folded(32_000, even), (ONE, TWO, FOUR, FULL, first)
    yield "Hadamard 65,536", folded(65_536, even), (ONE, TWO)
    for dimensions in (20_480, 8_192, 2_048):
        yield f"Hadamard {dimensions:,}", folded(dimensions, even), (ONE, FOUR, FULL)
    for whitening in ("kronecker", "none"):
        yield f"Hadamard 32,000, {whitening}", folded(32_000, sign(filters(pipeline, whitening))), (ONE,)
    yield "learned split, 32,000", folded(32_000, split), (ONE, FOUR, FULL, first)
    for dimensions in (16_384, 8_192, 2_048):
        yield f"learned split, {dimensions:,}", folded(dimensions, split), (ONE, FOUR)
    for share in (1.0, 0.5, 0.15, 0.08):
        yield f"directions {share:g}, 32,000", folded(32_000, sign(*directed(pipeline, share, weights))), (ONE,)
    balanced, mask = directed(pipeline, 0.25, weights)
    kept = sign(balanced, mask)
    yield "directions 0.25, 32,000", folded(32_000, kept), (ONE,)
    for dimensions in (65_536, 20_480, 8_192, 2_048):
        yield f"directions 0.25, {dimensions:,}", folded(dimensions, kept), (ONE, FOUR)
    yield "directions 0.25, even split, 32,000", folded(32_000, sign(weights, mask)), (ONE,)
    yield "two-sided random 48 x 48", TwoSided.random(maps, weights, 48), (ONE, FULL)
    yield "two-sided learned 32 x 32", learned.two_sided(32), (ONE, FULL)
    yield "principal components, 512", learned.principal(512), (FOUR, FULL)
    yield "8,192 coordinates", Coordinates(weights, learned.coordinates(8_192), mixed=False), (FULL,)
    yield "8,192 coordinates, mixed", Coordinates(weights, learned.coordinates(8_192), mixed=True), (ONE, FOUR)
    yield "32,768 coordinates, mixed", Coordinates(weights, learned.coordinates(32_768), mixed=True), (ONE,)
    # Mixed precision: the strongest coordinates in 4 bits, all others folded to 1 bit.
    head = learned.coordinates(2_048)
    rest = torch.ones(len(weights.f))
    rest[head] = 0
    yield "head", Coordinates(weights, head, mixed=True), (FOUR,)
    yield "tail", folded(23_800, sign(weights, rest)), (ONE,)


def estimate(pipeline: Pipeline, learned: Learned, sequences: Sequences, asked: torch.Tensor) -> list[Found]:
    """Estimated scores of all sequences by every sketch and coding."""
    tried = [(name, s, s.queries(asked), codings) for name, s, codings in sketches(pipeline, learned)]
    scores = {(name, c): np.zeros((len(asked), len(sequences)), np.float32) for name, *_, cs in tried for c in cs}
    done = 0
    for rows, batch in gather(pipeline, sequences):
        for start in range(0, len(rows), CHUNK):
            flat, part = batch[start : start + CHUNK], rows[start : start + CHUNK]
            for name, sketch, psi, codings in tried:
                phi = sketch.documents(flat)
                for coding in codings:
                    scores[name, coding][:, part] = coding.scores(phi, psi).T.numpy()
        if (done + len(rows)) // 1000 > done // 1000:
            print(f"sketched {done + len(rows):,} of {len(sequences):,}", file=sys.stderr)
        done += len(rows)
    widths = {name: psi.shape[1] for name, _, psi, _ in tried}
    found = [Found(name, c.name, c.bytes(widths[name]), table) for (name, c), table in scores.items()]
    head, tail = (next(f for f in found if f.family == part) for part in ("head", "tail"))
    mixed = Found(
        "mixed precision", "2,048 coordinates in 4 bits, the rest in 1", head.bytes + tail.bytes,
        head.scores + tail.scores,
    )  # fmt: skip
    return [f for f in found if f.family not in ("head", "tail")] + [mixed]


def cascade(name: str, first: Found, then: Found, stored: float) -> Found:
    """The best of `first` in the order of `then`."""
    kept = int(CASCADE * first.scores.shape[1])
    best = np.argsort(-first.scores, axis=1, kind="stable")[:, :kept]
    table = np.full_like(first.scores, -np.inf)
    np.put_along_axis(table, best, np.take_along_axis(then.scores, best, axis=1), axis=1)
    return Found("cascade", name, stored, table)


def cascades(found: list[Found]) -> Iterator[Found]:
    """A cheap scan, and finer codes of the survivors; the bytes are all that is stored."""
    by_name = {(f.family, f.name): f for f in found}
    for family in ("Hadamard 32,000", "learned split, 32,000"):
        one, four = by_name[family, "1 bit"], by_name[family, "4 bits"]
        scan = by_name[family, "1 bit, its first 8,000"]
        yield cascade(f"{family}: a quarter of the bits scanned, then all", scan, one, one.bytes)
        yield cascade(f"{family}: 1 bit scanned, then 4 bits", one, four, one.bytes + four.bytes)


def lexical(pipeline: Pipeline, queries: Queries, sequences: Sequences) -> Found:
    """BM25 ranks of the sequences' documents."""
    search = LexicalIndex.load(pipeline.build_lexical())
    texts = [f"{p} {c}" for p, c in zip(queries.prompts, queries.completions, strict=True)]
    table = np.full((len(queries), len(sequences)), -np.inf, np.float32)
    for row, names in enumerate(search.search(texts, len(sequences))):
        place = {name: -rank for rank, name in enumerate(names)}
        table[row] = [place.get(name, -np.inf) for name in sequences.document_ids]
    return Found("BM25", "", 0, table)


def built(pipeline: Pipeline, queries: Queries, ids: np.ndarray) -> Found:
    """What the published index finds, through FAISS."""
    shards = [pipeline.index_shard(shard) for shard in range(len(pipeline.shards(pipeline.target)))]
    opened = index.Index(shards, pipeline.config.index)
    _, names = opened.search(pipeline.query_sketches(queries), int(0.1 * len(ids)))
    table = np.full((len(queries), len(ids)), -np.inf, np.float32)
    places = np.searchsorted(ids, names, sorter=(order := np.argsort(ids)))
    np.put_along_axis(table, order[places], -np.arange(names.shape[1], dtype=np.float32)[None].repeat(len(names), 0), 1)
    return Found("the index as built (FAISS)", "", opened.bytes_per_vector, table)


def top(scores: np.ndarray, k: int, share: float) -> np.ndarray:
    """Columns of the best `share`, and k at least."""
    return np.argsort(-scores, axis=1, kind="stable")[:, : max(k, int(scores.shape[1] * share))]


def union(first: np.ndarray, second: np.ndarray, k: int, share: float) -> np.ndarray:
    """As many columns as `top` takes, from both lists in turn."""
    size = max(k, int(first.shape[1] * share))
    orders = [np.argsort(-table, axis=1, kind="stable")[:, :size] for table in (first, second)]
    turns = np.stack(orders, axis=2).reshape(len(first), -1)
    return np.array([list(dict.fromkeys(row))[:size] for row in turns.tolist()])


Cells = dict[tuple[int, float], float]
Row = tuple[str, str, float, Cells]


def measure(exact: np.ndarray, found: list[Found], words: Found) -> list[Row]:
    """Recall by (k, share) of every way to retrieve."""
    columns = np.arange(exact.shape[1])

    def cells(choose: Callable[[int, float], np.ndarray]) -> Cells:
        return {(k, s): float(recall_at_k(exact, columns, choose(k, s), k)) for k, s in product(KS, SHARES)}

    rows = [(f.family, f.name, f.bytes, cells(lambda k, s, f=f: top(f.scores, k, s))) for f in found]
    for family in ("Hadamard 32,000", "Hadamard 8,192", "learned split, 32,000"):
        f = next(f for f in found if (f.family, f.name) == (family, "1 bit"))
        both = cells(lambda k, s, f=f: union(f.scores, words.scores, k, s))
        rows.append(("with BM25, half each", f"{family}, 1 bit", f.bytes, both))
    return rows


def print_rows(rows: list[Row]) -> None:
    """The table, in Markdown."""
    heads = [f"@{k} of {s:.1%}" for k, s in product(KS, SHARES)]
    table = Table("sketch", "coding", "bytes", *heads)
    for family, name, size, cells in rows:
        numbers = [f"{cells[key]:.3f}" for key in product(KS, SHARES)]
        table.add_row(family, name, f"{size:,.0f}", *numbers)
        print("|", " | ".join((family, name, f"{size:,.0f}", *numbers)), "|")
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Recall@10 and @100 with 2% re-scored against bytes per sequence, a line a coding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [
        ("Hadamard, 1 bit", "o-", lambda f, n: f[:8] == "Hadamard" and f.count(",") < 2 and n == "1 bit"),
        ("Hadamard, 4 bits", "o--", lambda f, n: f.startswith("Hadamard") and n == "4 bits"),
        ("Hadamard, float32", "o:", lambda f, n: f.startswith("Hadamard") and n == "float32"),
        ("learned split, 1 bit", "s-", lambda f, n: f.startswith("learned split") and n == "1 bit"),
        ("learned split, 4 bits", "s--", lambda f, n: f.startswith("learned split") and n == "4 bits"),
        (
            "directions 0.25 of the rotations, 1 bit",
            "D-",
            lambda f, n: f[:16] == "directions 0.25," and f.count(",") < 3 and "even" not in f and n == "1 bit",
        ),
        ("whitening kronecker or none, 1 bit", "v", lambda f, n: f.endswith(("kronecker", "none"))),
        ("two-sided random", "x:", lambda f, n: f.startswith("two-sided random")),
        ("two-sided learned", "+:", lambda f, n: f.startswith("two-sided learned")),
        ("principal components", "d:", lambda f, n: f.startswith("principal")),
        ("chosen coordinates", "^", lambda f, n: "coordinates" in f),
        ("mixed precision", "*", lambda f, n: f == "mixed precision"),
        ("half BM25, half Hadamard or split", "P", lambda f, n: f.startswith("with BM25")),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), sharey=True)
    for axis, k in zip(axes, KS, strict=True):
        for label, style, chosen in groups:
            line = sorted((size, cells[k, 0.02]) for family, name, size, cells in rows if chosen(family, name))
            axis.plot(*zip(*line, strict=True), style, label=label, markersize=6, linewidth=1.4)
        axis.axvline(4096, color="grey", linewidth=0.8)
        words = next(cells for family, _, _, cells in rows if family == "BM25")
        axis.axhline(words[k, 0.02], color="black", linewidth=0.8, linestyle="--", label="BM25 alone")
        axis.set(xscale="log", xlabel="bytes per sequence", title=f"exact top {k}, 2% re-scored", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recall")
    axes[0].legend(fontsize=7.5, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def halves(texts: Path, queries: Path) -> Path:
    """Write queries that ask for the second half of each text, to see recall for what no stage was tuned for."""
    asked = []
    for record in records.read_list(texts):
        words = str(record["text"]).split()
        prompt, completion = " ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :])
        asked.append(json.dumps({"id": record["id"], "prompt": prompt, "completion": completion}) + "\n")
    storage.write_text(queries, "".join(asked))
    return queries


def main() -> None:
    """Measure every sketch, print the table, save the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="the plot")
    parser.add_argument("--texts", type=Path, help="ask for the second halves of these texts, not for the queries")
    options = parser.parse_args()
    config = Config.load(options.config)
    path = options.out or config.workspace / "recall.png"
    if options.texts:
        config = config.model_copy(update={"queries": halves(options.texts, config.workspace / "texts.jsonl")})
    pipeline = Pipeline(config)
    queries = pipeline.held_out()
    assert queries is not None, "set `queries` in the configuration"
    count = len(pipeline.shards(pipeline.target))
    exact = np.concatenate([np.load(pipeline.exact_shard(shard))[0] for shard in range(count)], axis=1)
    parts = [corpus.read_shard(source) for source in pipeline.shards(pipeline.target)]
    sequences = Sequences(
        [ids for part in parts for ids in part.input_ids],
        [labels for part in parts for labels in part.labels],
        [mark for part in parts for mark in part.fingerprints],
        [name for part in parts for name in part.document_ids],
        np.concatenate([part.sequence_ids for part in parts]),
    )
    learned = learn(pipeline, sequences)
    found = estimate(pipeline, learned, sequences, passed(pipeline, queries.sequences))
    words = lexical(pipeline, queries, sequences)
    found += [*cascades(found), built(pipeline, queries, sequences.sequence_ids), words]
    rows = measure(exact, found, words)
    entries = len(learned.weights.f)
    console.print(f"{len(sequences):,} sequences, {len(queries)} queries, {entries:,} gradient entries")
    print_rows(rows)
    plot(rows, path)
    console.print(f"Plot: {path}")


if __name__ == "__main__":
    main()
