"""Rebuilds while documents come, change and go, while queries run, and while builds are killed.

The models are in float64: then a sequence's sketch, rounded to float32, is the same in every batch, and codes that were
carried along through all rebuilds must equal those of a build from scratch bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msif_core import corpus, generations, index, storage
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from tests.forker import Forker
from tests.tiny_project import WORDS, documents, write_project

Documents = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def builder() -> Iterator[Forker]:
    with Forker() as started:
        yield started


@pytest.fixture(scope="module")
def asker() -> Iterator[Forker]:
    with Forker() as started:
        yield started


class World:
    """A corpus that changes, and what it held when each generation was published."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.path = folder / "documents.jsonl"
        self.documents: Documents = {str(row["id"]): row for row in documents()}
        self.pipeline = Pipeline.from_config(write_config(folder, "workspace"))
        self.published: dict[str, Documents] = {}

    def change(self) -> None:
        """Remove, change and add a few documents; some texts come back."""
        names = sorted(self.documents)
        for name in self.random.choice(names, self.random.integers(0, 4), replace=False):
            del self.documents[name]
        for name in self.random.choice(sorted(self.documents), self.random.integers(0, 3), replace=False):
            self.documents[name] = self.write(name)
        for _ in range(self.random.integers(1, 4)):
            name = f"n{self.random.integers(1000)}"
            self.documents[name] = self.write(name)
        storage.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.documents.values()))

    def write(self, name: str) -> dict[str, Any]:
        words = [str(word) for word in self.random.choice(WORDS, self.random.integers(2, 9))]
        return {"id": name, "text": f"{words[0]}: a thing called {' and '.join(words[1:])}."}

    def note(self) -> None:
        """Remember what the published generation was built from."""
        if (generation := self.pipeline.workspace.published()) is not None:
            self.published.setdefault(generation, dict(self.documents))

    def roll_back(self) -> None:
        """To the generation before, where there is one."""
        if storage.read_json(self.pipeline.workspace.current_generation() / "manifest.json")["parent"] is not None:
            generations.rollback(self.pipeline.workspace)


def write_config(folder: Path, workspace: str) -> Path:
    """The tiny project in float64 and with one-bit codes, in a workspace of its own."""
    if not (folder / "config.yaml").exists():
        write_project(folder)
    settings = json.loads((folder / "config.yaml").read_text())
    settings |= {"workspace": str(folder / workspace), "index": {"kind": "rabitq"}}
    settings["corpus"]["shard_sequences"] = 12
    settings["compute"]["dtype"] = "float64"
    path = folder / f"{workspace}.yaml"
    path.write_text(json.dumps(settings))
    return path


def by_name(pipeline: Pipeline) -> dict[tuple[str, int], tuple[str, bytes, bytes]]:
    """Fingerprint, code and exact scores of each sequence of the published generation, by document and window."""
    root = pipeline.workspace.root
    manifest = storage.read_json(pipeline.workspace.current_generation() / "manifest.json")
    folder, entries = corpus.shard_entries(root / manifest["corpora"]["pretrain"])
    found = {}
    for entry, path in zip(entries, manifest["codes"], strict=True):
        table = corpus.read_table(folder / entry["sequences"])
        read = index.read_codes((root / path).with_name("trained.faiss"), root / path)
        assert read is not None, "made with another trained index"
        codes = dict(zip(read[0].tolist(), read[1], strict=True))
        exact = np.load(root / manifest["exact"] / f"{Path(path).stem}.npy")
        assert len(codes) == table.num_rows
        for row, sequence in enumerate(table.to_pylist()):
            made = (sequence["fingerprint"], codes[sequence["sequence_id"]].tobytes(), exact[:, :, row].tobytes())
            found[sequence["document_id"], sequence["window"]] = made
    return found


def check_against_scratch(folder: Path, pipeline: Pipeline, builder: Forker) -> None:
    """What the rebuilds led to is what a build from scratch with the same factors and trained index gives."""
    config = write_config(folder, "scratch")
    scratch = Pipeline.from_config(config)
    for kind in ("pins", "factors"):
        shutil.copytree(pipeline.workspace.root / kind, scratch.workspace.root / kind)
    key = pipeline.codes_folder().name
    (scratch.workspace.root / "codes" / key).mkdir(parents=True)
    for path in pipeline.codes_folder().glob("trained*"):
        shutil.copy2(path, scratch.workspace.root / "codes" / key)
    assert builder.build(config)
    assert scratch.codes_folder().name == key
    ours, theirs = by_name(pipeline), by_name(scratch)
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    answers = [p.attribute(folder / "queries.jsonl").table.to_pylist() for p in (pipeline, scratch)]
    kept = ("query_id", "document_id", "rank", "score", "percentile", "side", "candidate_source")
    assert [[row[k] for k in kept] for row in answers[0]] == [[row[k] for k in kept] for row in answers[1]]


def check_answers(world: World, queries: Path) -> tuple[int, int]:
    """Every stored answer is that of one generation: its documents, their texts' exact scores. Counts both."""
    exact: dict[str, dict[tuple[str, str], float]] = {}
    names = [json.loads(line)["id"] for line in queries.read_text().splitlines()]
    answers = sorted(world.pipeline.workspace.attributions.glob("*/manifest.json"))
    for path in answers:
        generation = storage.read_json(path)["generation"]
        held = world.published[generation]
        if generation not in exact:
            scores = world.pipeline.score(queries, list(held.values()))
            exact[generation] = {
                (q, d): float(s) for q, row in zip(names, scores, strict=True) for d, s in zip(held, row, strict=True)
            }
        for row in corpus.read_table(path.with_name("influences.parquet")).to_pylist():
            expected = exact[generation][row["query_id"], row["document_id"]]
            assert row["score"] == pytest.approx(expected, rel=1e-4, abs=1e-9), (path, row)
    return len(answers), len(exact)


def run(folder: Path, builder: Forker, asker: Forker, rebuilds: int, kill_share: float, prune_every: int) -> None:
    config = write_config(folder, "workspace")
    queries, stop = folder / "queries.jsonl", folder / "stop"
    world = World(folder)
    assert builder.build(config)
    world.note()
    asker.start_asking(config, queries, stop)
    killed, seconds = 0, 1.0
    for number in range(1, rebuilds + 1):
        world.change()
        if not number % 7:
            world.roll_back()
        while True:
            started = time.monotonic()
            if number == 2 and not killed:
                finished = builder.build(config, "after", 5)  # one for certain
            elif world.random.random() < kill_share:
                finished = builder.build(config, seconds=world.random.uniform(0, seconds))
            else:
                finished = builder.build(config)
            world.note()
            if finished:
                seconds = time.monotonic() - started
                break
            killed += 1
            if world.random.random() < 0.3:
                world.change()
        if prune_every and not number % prune_every:
            prune(world.pipeline.workspace, keep=2, grace_seconds=20)
    stop.touch()
    assert asker.wait(), "the queries went through"
    answers, answered = check_answers(world, queries)
    assert answers > rebuilds / 2
    assert answered > rebuilds / 4
    assert killed
    check_against_scratch(folder, world.pipeline, builder)
    prune(world.pipeline.workspace, keep=1, grace_seconds=0)
    manifest = storage.read_json(world.pipeline.workspace.current_generation() / "manifest.json")
    assert len(list(world.pipeline.workspace.generations.glob("*/manifest.json"))) == 1
    assert len(list((world.pipeline.workspace.root / "codes").rglob("shard-*.faiss"))) == len(manifest["codes"])
    assert not list(world.pipeline.workspace.root.rglob(".tmp-*"))
    world.pipeline.attribute(queries)
    print(f"{rebuilds} rebuilds, {killed} kills, {answers} answers from {answered} generations")


def test_a_few_rebuilds(tmp_path: Path, builder: Forker, asker: Forker) -> None:
    run(tmp_path, builder, asker, rebuilds=4, kill_share=0.5, prune_every=0)


@pytest.mark.drill
def test_forty_rebuilds(tmp_path: Path, builder: Forker, asker: Forker) -> None:
    run(tmp_path, builder, asker, rebuilds=40, kill_share=0.5, prune_every=3)
