"""What `msif plan` says of small pipelines, beside what their steps then take: seconds, memory, bytes on disk.

    python -m benchmarks.plan [--quick] [--out runs/bench] [--device cuda]

The models are random GPT-NeoX, the documents random tokens. Each step is a new process; its seconds are counted after
imports and the loading of the model (a query's are those of the second one), its memory is the largest resident size
of the whole process; on an accelerator, what torch held of its memory and the context's, as planned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import inputs, machine, tables
from msif_core import storage
from msif_core.config import Config
from msif_core.footprint import PROCESS
from msif_core.pipeline import Pipeline
from msif_core.plan import Plan, make_plan

SIZES = {
    "3 M": inputs.Size(hidden=256, layers=4, heads=4, sequences=256, queries=1, tokens=128),
}
LARGE = {
    "150 M": inputs.Size(hidden=1024, layers=12, heads=16, sequences=1024, queries=1, tokens=512),
}
"""For an accelerator, in bfloat16 and TF32."""
QUICK = {"0.8 M": inputs.Size(hidden=128, layers=4, heads=4, sequences=256, queries=1)}
STEPS = ("covariances", "eigenbases", "eigenvalues", "sketches", "one query")


def configuration(folder: Path, size: inputs.Size, device: str) -> Config:
    """One stage over random documents; the model is written once, without a tokenizer."""
    if not (folder / "model").exists():
        size.model().save_pretrained(folder / "model")
    documents = folder / "documents.jsonl"
    rows = inputs.random_tokens(size.sequences, size.tokens, 0).tolist()
    lines = (json.dumps({"id": f"d{i}", "input_ids": ids, "labels": ids}) + "\n" for i, ids in enumerate(rows))
    storage.write_text(documents, "".join(lines))
    stage = {"name": "pretrain", "model": str(folder / "model"), "documents": str(documents)}
    narrow = {"dtype": "bfloat16", "tf32": True, "batch_tokens": 16_384}
    return Config.model_validate({
        "workspace": folder / "workspace", "stages": [stage],
        "corpus": {"max_length": size.tokens, "shard_sequences": size.sequences // 2},
        "sketch": {"dimensions": 16_384}, "compute": {"device": device} | (narrow if device != "cpu" else {}),
        "curvature": {"part_sequences": size.sequences // 2}, "index": {"kind": "rabitq", "drift_sample": 0},
        "retrieval": {"candidates": "gradient", "rerank_min": 100, "rerank_max": 100, "random_sample": 50},
    })  # fmt: skip


def steps(pipeline: Pipeline) -> dict[str, Callable[[], object]]:
    """The build's steps as the flows call them, and one query."""
    stage = pipeline.target
    parts = range(len(pipeline.fit_parts(stage)))

    def sketches() -> None:
        pipeline.train_index()
        for shard in range(len(pipeline.shards(stage))):
            pipeline.index_shard(shard)

    def eigenvalues() -> None:
        for part in parts:
            pipeline.eigenvalue_part(stage, part)
        pipeline.combine_eigenvalues(stage)

    ids = inputs.random_tokens(1, pipeline.max_length(stage), 1)[0].tolist()
    return {
        "covariances": lambda: [pipeline.covariance_part(stage, part) for part in parts],
        "eigenbases": lambda: [pipeline.eigenbasis_part(stage, part) for part in parts],
        "eigenvalues": eigenvalues,
        "sketches": sketches,
        "one query": lambda: pipeline.attribute([{"id": "q", "input_ids": ids, "labels": ids}]),
    }


def once(config: Config, name: str) -> None:
    """What a step's process does: the step; seconds and peak memory are printed."""
    pipeline = Pipeline(config)
    pipeline.model(pipeline.target)
    run = steps(pipeline)[name]
    if name == "one query":
        run()  # the plan is of a query to a process that has answered before
    started = time.perf_counter()
    run()
    seconds, device = time.perf_counter() - started, config.compute.device
    print(json.dumps([seconds, machine.peak_bytes(device) + (PROCESS if device != "cpu" else 0)]))


def run_step(name: str, label: str, out: Path, quick: bool, device: str) -> tuple[float, float]:
    """Seconds and bytes of a step in a new process."""
    command = [sys.executable, "-m", "benchmarks.plan", "--out", str(out), "--step", name]
    command += ["--size", label, "--device", device]
    result = subprocess.run(command + ["--quick"] * quick, check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = json.loads(result.stdout.splitlines()[-1])
    return seconds, memory


def measure(label: str, size: inputs.Size, out: Path, quick: bool, device: str) -> tables.Table:
    """Plan, build step by step, compare."""
    folder = out / f"plan-{label.replace(' ', '')}"
    shutil.rmtree(folder, ignore_errors=True)
    config = configuration(folder, size, device)
    started = time.perf_counter()
    plan = make_plan(config)
    planning = time.perf_counter() - started
    pipeline = Pipeline(config)
    pipeline.tokenize(pipeline.target)
    planned = {step.name: step for step in plan.steps}
    rows: list[list[tables.Cell]] = []
    for name in STEPS:
        if name == "one query":
            pipeline.publish_generation()
        seconds, memory = run_step(name, label, out, quick, device)
        step = planned[name]
        told = (
            f"{name}: {step.seconds:.3g} s planned, {seconds:.3g} s; {step.memory / 1e6:.0f} MB, {memory / 1e6:.0f} MB"
        )
        print(told, file=sys.stderr, flush=True)
        ratios = (step.seconds / seconds - 1, step.memory / 1e6, memory / 1e6, step.memory / memory - 1)
        rows.append([name, step.seconds, seconds, *ratios])
    rows += disk(plan, pipeline)
    note = (
        f"{size.sequences} sequences of {size.tokens} tokens, {plan.stages[0].tracked / 1e6:.1f} M tracked parameters. "
        f"Planning took {planning:.0f} s."
    )
    columns = ["", "planned, s", "measured, s", "off", "planned, MB", "measured, MB", "off"]
    return tables.Table(f"Plan against measurement: {label}", columns, rows, [note])


def disk(plan: Plan, pipeline: Pipeline) -> list[list[tables.Cell]]:
    """Planned and found bytes of factors, of the fit's sums and of the codes."""
    stage = plan.stages[0]
    factors = pipeline.factors_folder(stage.name)
    sums = sum(path.stat().st_size for path in factors.glob("partial-*/*"))
    found: dict[str, tuple[float, float]] = {
        "factors on disk": (stage.factor_bytes, sum(path.stat().st_size for path in factors.glob("*.safetensors"))),
        "sums on disk": (stage.partial_bytes, sums),
        "codes on disk": (
            plan.index_bytes, sum(path.stat().st_size for path in pipeline.codes_folder().glob("shard-*.faiss")),
        ),
    }  # fmt: skip
    nothing: list[Any] = [None, None, None]
    return [[name, *nothing, want / 1e6, has / 1e6, want / has - 1] for name, (want, has) in found.items()]


def main() -> None:
    """Measure every size, save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", choices=STEPS, help="run one step in this process, and end")
    parser.add_argument("--size", help="of that step")
    options = parser.parse_args()
    sizes = QUICK if options.quick else SIZES if options.device == "cpu" else LARGE
    if options.step:
        folder = options.out / f"plan-{options.size.replace(' ', '')}"
        once(configuration(folder, sizes[options.size], options.device), options.step)
        return
    found = []
    for label, size in sizes.items():
        found.append(measure(label, size, options.out, options.quick, options.device))
        tables.save(options.out / "plan.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
