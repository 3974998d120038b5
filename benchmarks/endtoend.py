"""One query end to end, cold and warm, with 500 candidates re-scored exactly: `python -m benchmarks.endtoend`.

Cold is a new process: imports, models, factors and index are opened by it (files may be in the page cache). Warm is
a later call in the same process.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables, workspace
from msif_core.pipeline import Pipeline

WARM, COLD = 5, 3
RERANK = ("score_sequences", "contributions", "query_contributions")
"""Functions that run the re-rank's forward and backward passes."""


def query() -> list[dict[str, Any]]:
    """One held-out query."""
    with (workspace.DATA / "queries.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(next(lines))]


def own_times(profile: cProfile.Profile) -> Iterator[tuple[str, float]]:
    """Seconds of each msif function less those of the msif functions that it calls directly, largest first."""
    stats: Any = pstats.Stats(profile)
    ours = {key: value for key, value in stats.stats.items() if "msif_core" in key[0]}
    own = {key: value[3] for key, value in ours.items()}
    for key, value in ours.items():
        for caller, (_, _, _, cumulative) in value[4].items():
            if caller in own and caller != key:
                own[caller] -= cumulative
    for (path, _, name), took in sorted(own.items(), key=lambda item: -item[1]):
        yield f"{Path(path).stem}.{name}", took


def share_of_rerank(profile: cProfile.Profile) -> float:
    """Seconds in the re-rank's model passes."""
    stats: Any = pstats.Stats(profile)
    return sum(value[3] for (path, _, name), value in stats.stats.items() if "msif_core" in path and name in RERANK)


def once(folder: Path, quick: bool) -> None:
    """What the cold process does after its imports: answer one query, and print how long that took."""
    start = time.perf_counter()
    workspace.build(folder, quick).attribute(query())
    print(time.perf_counter() - start)


def cold(folder: Path, quick: bool) -> float:
    """Wall seconds of a whole new process that answers one query."""
    command = [sys.executable, "-m", "benchmarks.endtoend", "--once", "--out", str(folder.parent)]
    start = time.perf_counter()
    subprocess.run(command + ["--quick"] * quick, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(pipeline: Pipeline, folder: Path, quick: bool) -> list[tables.Table]:
    """The table of times, and that of where they go."""
    started = [cold(folder, quick) for _ in range(COLD)]
    pipeline.attribute(query())
    took, rest, last = [], [], cProfile.Profile()
    for _ in range(WARM):
        last = cProfile.Profile()
        start = time.perf_counter()
        last.runcall(pipeline.attribute, query())
        took.append(time.perf_counter() - start)
        rest.append(took[-1] - share_of_rerank(last))
    rows: list[list[tables.Cell]] = [
        ["cold: a new process", statistics.median(started), None],
        ["warm: a later call", statistics.median(took), statistics.median(rest)],
    ]
    target = pipeline.config.attribute_to
    notes = [
        f"{pipeline.sequence_count(target)} sequences, {pipeline.config.retrieval.rerank_max} candidates and "
        f"{pipeline.config.retrieval.random_sample} random documents scored exactly; medians of {COLD} processes and "
        f"of {WARM} calls under a profiler (which slows them a little)."
    ]
    first = tables.Table(
        "One query, end to end", ["", "seconds", "of it outside the re-rank's model passes"], rows, notes
    )
    where: list[list[tables.Cell]] = [[name, 1e3 * seconds] for name, seconds in list(own_times(last))[:12]]
    return [first, tables.Table("One query, warm: where the time goes", ["function", "own milliseconds"], where)]


def main() -> None:
    """Measure, save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--once", action="store_true", help="answer one query in this process, and end")
    options = parser.parse_args()
    folder = options.out / ("workspace-quick" if options.quick else "workspace")
    if options.once:
        once(folder, options.quick)
        return
    found = measure(workspace.build(folder, options.quick), folder, options.quick)
    tables.save(options.out / "endtoend.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
