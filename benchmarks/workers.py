"""From one worker to two: processes that share a workspace sketch its shards, each in an order of its own.

    python -m benchmarks.workers [--quick] [--out runs/bench]

Each worker has one thread and a model of its own, and finds what to do by the files' locks alone, as on several
machines. Imports and the loading of the model are not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import tables, workspace
from msif_core import storage
from msif_core.pipeline import Pipeline

REPEATS, SHARDS = 5, 4


def shards_of(pipeline: Pipeline) -> list[int]:
    """The first shards: a round is to take seconds."""
    return list(range(len(pipeline.shards(pipeline.target))))[:SHARDS]


def work(pipeline: Pipeline, number: int) -> None:
    """Say that all is loaded, wait for a line, sketch every shard that nobody is at, say so; until there is no line."""
    pipeline.document_sketches(pipeline.held_out().sequences.take([0]))  # type: ignore[union-attr]
    order = shards_of(pipeline)
    random.Random(number).shuffle(order)
    print("ready", flush=True)
    for _ in sys.stdin:
        storage.free_first(order, pipeline.index_shard)
        print("done", flush=True)


def start(folder: Path, quick: bool, number: int) -> subprocess.Popen[str]:
    """A worker's process, loaded."""
    command = [sys.executable, "-m", "benchmarks.workers", "--out", str(folder.parent), "--work", str(number)]
    process = subprocess.Popen(
        command + ["--quick"] * quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _wait_for(process, "ready")
    return process


def _wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    if not any(found.strip() == line for found in process.stdout):
        raise RuntimeError(f"a worker ended with {process.wait()}")


def sketch_all(workers: list[subprocess.Popen[str]], pipeline: Pipeline) -> tuple[float, list[str]]:
    """Seconds in which the workers write all codes anew, and the codes' digests."""
    codes = [pipeline.index_shard(shard) for shard in shards_of(pipeline)]
    for path in codes:
        path.unlink()
    begun = time.perf_counter()
    for process in workers:
        assert process.stdin is not None
        print("go", file=process.stdin, flush=True)
    for process in workers:
        _wait_for(process, "done")
    return time.perf_counter() - begun, [storage.file_digest(path) for path in codes]


def measure(pipeline: Pipeline, folder: Path, quick: bool) -> tables.Table:
    """One row for each number of workers."""
    workers = [start(folder, quick, number) for number in range(2)]
    times: dict[int, list[float]] = {1: [], 2: []}
    seen = []
    for turn in range(REPEATS + 1):
        for count in times:
            took, digests = sketch_all(workers[:count], pipeline)
            seen.append(digests)
            times[count] += [took] if turn else []
    for process in workers:
        process.communicate()
    assert all(digests == seen[0] for digests in seen), "the codes' bits depend on who made them"
    one, two = (statistics.median(times[count]) for count in (1, 2))
    note = (
        f"Codes of {len(seen[0])} shards of about {pipeline.config.corpus.shard_sequences} sequences, one thread a "
        f"worker; medians of {REPEATS} interleaved rounds. Every round gave the same bits."
    )
    rows: list[list[tables.Cell]] = [[1, one, 1.0], [2, two, one / two / 2]]
    return tables.Table("Workers that share a workspace", ["workers", "seconds", "efficiency"], rows, [note])


def main() -> None:
    """Measure, save the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--work", type=int, help="be the worker of that number")
    options = parser.parse_args()
    folder = options.out / ("workspace-quick" if options.quick else "workspace")
    pipeline = workspace.build(folder, options.quick)
    if options.work is not None:
        work(pipeline, options.work)
        return
    table = measure(pipeline, folder, options.quick)
    tables.save(options.out / "workers.json", [table])
    print(table.markdown())


if __name__ == "__main__":
    main()
