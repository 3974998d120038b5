"""The pause between two shards: what the workspace's Prefect server takes before the next one begins.

    python -m benchmarks.pauses [--out runs/bench]

Empty shards go through the same flows, tags and limit as a build's. Beside msif's settings of the local server
(flows/__init__.py), Prefect's default: each task run recorded by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import tables
from flows import prefect_defaults

prefect_defaults()

from prefect import flow, task  # noqa: E402 (reads its settings when it is imported)

from flows.runners import share  # noqa: E402
from flows.server import limit_accelerator, server  # noqa: E402
from msif_core.config import Config  # noqa: E402
from tasks import ACCELERATOR  # noqa: E402

SHARDS, SECONDS = 30, 0.3


def pauses(batch: int) -> list[float]:
    """Seconds between the end of a shard and the beginning of the next, with that many task runs recorded together."""
    os.environ["PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE"] = str(batch)
    moments: list[float] = []

    @task(tags=[ACCELERATOR])
    def shard(_config: Any, number: int, wait: bool) -> int:
        moments.append(time.perf_counter())
        time.sleep(SECONDS)
        moments.append(time.perf_counter())
        return number

    @flow
    def build(config: Config) -> None:
        share(config, "shards", shard, parts=range(SHARDS))

    with TemporaryDirectory() as folder:
        stage = {"name": "none", "model": "none", "documents": "none"}
        config = Config.model_validate({"workspace": folder, "stages": [stage]})
        with server(config.workspace):
            limit_accelerator(1)
            build(config)
    return [begun - ended for ended, begun in zip(moments[1::2], moments[2::2], strict=False)]


def main() -> None:
    """Measure, save the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[list[tables.Cell]] = []
    for name, batch in (("as msif sets it", 50), ("each by itself", 1)):
        found = pauses(batch)
        rows.append([name, statistics.mean(found), statistics.median(found), max(found)])
    note = f"Local server on SQLite, {SHARDS} shards of {SECONDS} s one after another."
    columns = ["task runs are recorded", "mean pause, s", "median, s", "longest, s"]
    table = tables.Table("Pauses between shards", columns, rows, [note])
    tables.save(options.out / "pauses.json", [table])
    print(table.markdown())


if __name__ == "__main__":
    main()
