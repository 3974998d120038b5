"""What `msif plan` says of pipelines, beside what their steps then take: seconds, memory, bytes on disk.

    python -m benchmarks.plan [--quick] [--out runs/bench] [--device cuda]
    python -m benchmarks.plan --config CONFIG.yaml      your own models and documents, built in a workspace of its own

Without a configuration the models are random GPT-NeoX, the documents random tokens. Each step is a new process; its
seconds are counted after imports and the loading of the model (a query's are those of the second one), its memory is
the largest resident size of the whole process; on an accelerator, what torch held of its memory and the context's, as
planned.
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
from msif_core import corpus, storage
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


def configuration(folder: Path, size: inputs.Size, device: str) -> Config:
    """One stage over random documents, its model without a tokenizer."""
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


def given(path: Path, folder: Path) -> Config:
    """The configuration of a file, in a new workspace of `folder`."""
    return Config.load(path).model_copy(update={"workspace": folder / "workspace"})


def steps(pipeline: Pipeline, stage: str) -> dict[str, Callable[[], object]]:
    """The stage's steps of the build as the flows call them; of the attributed one, sketches and one query too."""
    parts = range(len(pipeline.fit_parts(stage)))

    def sketches() -> None:
        pipeline.train_index()
        for shard in range(len(pipeline.shards(stage))):
            pipeline.index_shard(shard)

    def eigenvalues() -> None:
        for part in parts:
            pipeline.eigenvalue_part(stage, part)
        pipeline.combine_eigenvalues(stage)

    found: dict[str, Callable[[], object]] = {
        "covariances": lambda: [pipeline.covariance_part(stage, part) for part in parts],
        "eigenbases": lambda: [pipeline.eigenbasis_part(stage, part) for part in parts],
        "eigenvalues": eigenvalues,
    }
    if stage == pipeline.target:
        found |= {"sketches": sketches, "one query": lambda: pipeline.attribute([query(pipeline)])}
    return found


def query(pipeline: Pipeline) -> dict[str, Any]:
    """A record of the last stage, asked as a query."""
    first = corpus.read_shard(pipeline.shards(pipeline.last)[0])
    return {"id": "q", "input_ids": first.input_ids[0].tolist(), "labels": first.labels[0].tolist()}


def once(config: Config, stage: str, name: str) -> None:
    """What a step's process does: the step; seconds and peak memory are printed."""
    pipeline = Pipeline(config)
    pipeline.model(stage)
    run = steps(pipeline, stage)[name]
    if name == "one query":
        run()  # the plan is of a query to a process that has answered before
    started = time.perf_counter()
    run()
    seconds, device = time.perf_counter() - started, config.compute.device
    print(json.dumps([seconds, machine.peak_bytes(device) + (PROCESS if device != "cpu" else 0)]))


def run_step(stage: str, name: str, folder: Path) -> tuple[float, float]:
    """Seconds and bytes of a step in a new process."""
    command = [sys.executable, "-m", "benchmarks.plan", "--folder", str(folder), "--step", stage, name]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = json.loads(result.stdout.splitlines()[-1])
    return seconds, memory


def measure(label: str, config: Config, folder: Path) -> tables.Table:
    """Plan, build step by step, compare."""
    storage.write_json(folder / "config.yaml", config.model_dump(mode="json"))
    started = time.perf_counter()
    plan = make_plan(config)
    planning = time.perf_counter() - started
    pipeline = Pipeline(config)
    for own in config.stages:
        pipeline.tokenize(own.name)
    # The attributed stage last: its sketches are of all stages' factors.
    stages = sorted((stage.name for stage in config.stages), key=lambda name: name == pipeline.target)
    planned = {(step.stage, step.name): step for step in plan.steps}
    rows: list[list[tables.Cell]] = []
    for stage, name in [(own, name) for own in stages for name in steps(pipeline, own)]:
        if name == "one query":
            pipeline.publish_generation()
        seconds, memory = run_step(stage, name, folder)
        step = planned[stage, name]
        label_of = name if len(stages) == 1 else f"{name}, {stage}"
        told = (
            f"{label_of}: {step.seconds:.3g} s planned, {seconds:.3g} s; "
            f"{step.memory / 1e6:.0f} MB, {memory / 1e6:.0f} MB"
        )
        print(told, file=sys.stderr, flush=True)
        ratios = (step.seconds / seconds - 1, step.memory / 1e6, memory / 1e6, step.memory / memory - 1)
        rows.append([label_of, step.seconds, seconds, *ratios])
    rows += disk(plan, pipeline)
    found = "; ".join(
        f"{own.name} has {own.sequences} sequences, {own.tokens} tokens, {own.tracked / 1e6:.1f} M tracked parameters"
        for own in plan.stages
    )
    columns = ["", "planned, s", "measured, s", "off", "planned, MB", "measured, MB", "off"]
    title = f"Plan against measurement: {label}"
    return tables.Table(title, columns, rows, [f"As planned, {found}. Planning took {planning:.0f} s."])


def disk(plan: Plan, pipeline: Pipeline) -> list[list[tables.Cell]]:
    """Planned and found bytes of factors, of the fit's sums and of the codes."""
    folders = [pipeline.factors_folder(stage.name) for stage in plan.stages]
    codes = pipeline.codes_folder()
    found = {
        "factors on disk": (sum(s.factor_bytes for s in plan.stages), _bytes(folders, "*.safetensors")),
        "sums on disk": (sum(s.partial_bytes for s in plan.stages), _bytes(folders, "partial-*/*")),
        "codes on disk": (plan.index_bytes, _bytes([codes], "shard-*.faiss")),
    }
    nothing: list[Any] = [None, None, None]
    return [[name, *nothing, want / 1e6, has / 1e6, want / has - 1] for name, (want, has) in found.items()]


def _bytes(folders: list[Path], pattern: str) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob(pattern))


def main() -> None:
    """Measure every size, or the given configuration; save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--config", type=Path, help="a configuration to plan and build, in place of random models")
    parser.add_argument("--step", nargs=2, metavar=("STAGE", "NAME"), help="run one step in this process, and end")
    parser.add_argument("--folder", type=Path, help="of that step")
    options = parser.parse_args()
    if options.step:
        once(Config.load(options.folder / "config.yaml"), *options.step)
        return
    sizes = QUICK if options.quick else SIZES if options.device == "cpu" else LARGE
    found = []
    for label in [options.config.stem] if options.config else sizes:
        folder = options.out / f"plan-{label.replace(' ', '')}"
        shutil.rmtree(folder, ignore_errors=True)
        own = options.config
        config = given(own, folder) if own else configuration(folder, sizes[label], options.device)
        found.append(measure(label, config, folder))
        tables.save(options.out / "plan.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
