"""msif, kronfluence, bergson and the plain loop on the same model, data and settings: `python -m benchmarks.peers`.

EK-FAC with the empirical Fisher, damping 0.1 of the mean eigenvalue, summed losses, fused maps whole, the head left
out. The sides take turns, step by step. A peer without its environment (benchmarks/peers/install.sh) is left out and
named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from benchmarks import inputs, machine, tables
from benchmarks.peers import msif_side
from benchmarks.peers.protocol import Case, Side
from msif_core import tracking
from msif_core.curvature.fit import covariance_sums
from msif_core.work import Work

REPEATS = 5
SIDES = {"msif": None, "plain loop": None, "kronfluence": "kronfluence", "bergson": "bergson"}
MODULES = {"msif": "msif_side", "plain loop": "loop_side", "kronfluence": "kronfluence_side", "bergson": "bergson_side"}
ENVIRONMENTS = Path("runs/peers")
FLOOR = "the floor"


@dataclass(frozen=True)
class Setting:
    """A model and the data of one comparison."""

    size: inputs.Size
    train: int
    queries: int
    batch: int = 16


FULL = Setting(inputs.SIZES["3 M"], train=32, queries=8)
QUICK = Setting(inputs.Size(hidden=64, layers=2, heads=2, sequences=0, queries=0), train=64, queries=16)


def write_case(folder: Path, setting: Setting, device: str) -> Case:
    """The model (with a token-by-number tokenizer, which one peer asks for), tokens and settings."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case = Case(folder)
    setting.size.model().save_pretrained(case.model)
    words = {str(i): i for i in range(inputs.VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0").save_pretrained(
        case.model
    )
    for seed, (name, count) in enumerate((("train", setting.train), ("query", setting.queries))):
        np.save(folder / f"{name}.npy", inputs.random_tokens(count, setting.size.tokens, seed))
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    settings = {"batch": setting.batch, "damping": 0.1, "threads": threads, "device": device}
    (folder / "settings.json").write_text(json.dumps(settings))
    return case


def start(case: Case, notes: list[str]) -> dict[str, Side]:
    """The sides that can run here; why another cannot goes into `notes`."""
    started: dict[str, Side] = {}
    for name, environment in SIDES.items():
        python = Path(sys.executable) if environment is None else ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            notes.append(f"{name}: left out, no environment {python.parent.parent} (benchmarks/peers/install.sh).")
            continue
        started[name] = Side(python, f"benchmarks.peers.{MODULES[name]}", case)
    found = {}
    for name, side in started.items():
        try:
            side.load()
            found[name] = side
        except RuntimeError as error:
            notes.append(f"{name}: left out: {error}.")
    return found


@dataclass
class Rates:
    """Of this process, in the same rounds: seconds of a matrix product and of the model's eigendecompositions."""

    product: Callable[[], object]
    operations: float
    eigenbases: Callable[[], object]
    device: str
    products: list[float] = field(default_factory=list)
    decompositions: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, setting: Setting) -> Rates:
        """Of covariances that are the model's own: how long a decomposition takes depends on the spectrum."""
        device = case.settings["device"]
        model, sequences = setting.size.model(device), inputs.as_sequences(case.tokens("train"))
        maps, batch = tracking.tracked_maps(model, msif_side.CURVATURE), setting.batch * setting.size.tokens
        sums = covariance_sums(model, maps, sequences, task="causal_lm", seed=0, batch_tokens=batch)
        matrices = [matrix.double() for matrix in sums.values()]

        def eigenbases() -> object:
            return [torch.linalg.eigh(matrix) for matrix in matrices]

        return cls(*machine.matrix_product(device), eigenbases, device)

    def measure(self) -> None:
        """One round."""
        self.products += [machine.seconds(self.product, self.device) for _ in range(3)]
        self.decompositions.append(machine.seconds(self.eigenbases, self.device))

    @property
    def matrix(self) -> float:
        """Operations a second, the median."""
        return self.operations / statistics.median(self.products)


def compare(
    case: Case, rates: Rates, repeats: int, notes: list[str]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Seconds of each side's steps in interleaved rounds, after one to warm up; peaks and score matrices.

    A step's peak is the largest resident size of its process while it ran, in any round.
    """
    sides = start(case, notes)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    seen: dict[str, Any] = {name: {"peaks": {}} for name in sides}
    steps = list(dict.fromkeys(step for side in sides.values() for step in side.steps))
    for turn in range(repeats + 1):
        rates.measure()
        for step in steps:
            for name, side in list(sides.items()):
                if step not in side.steps:
                    continue
                try:
                    answer = side.run(step)
                except (RuntimeError, BrokenPipeError) as error:
                    notes.append(f"{name}: stopped at {step}: {error}.")
                    del sides[name]
                    continue
                print(f"round {turn}: {name}: {step}: {answer['seconds']:.3g} s", file=sys.stderr, flush=True)
                if turn:
                    times[name].setdefault(step, []).append(answer["seconds"])
                seen[name]["peaks"][step] = max(answer["peak"], seen[name]["peaks"].get(step, 0))
                if answer["matrix"]:
                    seen[name]["scores"] = answer["matrix"]
    for side in sides.values():
        side.close()
    return times, seen


def agreement(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Pearson correlation, and the largest difference over the largest score."""
    correlation = float(np.corrcoef(reference.ravel(), other.ravel())[0, 1])
    return correlation, float(np.abs(reference - other).max() / np.abs(reference).max())


def floors(setting: Setting, rates: Rates) -> dict[str, float]:
    """Seconds that the steps cannot do without: counted operations at the matrix rate, and eigendecompositions.

    The latter are torch's own, alone and as every side calls them.
    """
    model = setting.size.model()
    work = Work(model, tracking.tracked_maps(model, msif_side.CURVATURE), setting.size.tokens)
    gradient = work.linear() + work.gradients()
    rotated = gradient + work.rotation()
    fit = setting.train * (work.linear() + work.covariance() + rotated)
    scores = setting.queries * (rotated + work.unrotation())
    scores += setting.train * (gradient + 2.0 * work.tracked * setting.queries)
    return {"fit": fit / rates.matrix + statistics.median(rates.decompositions), "scores": scores / rates.matrix}


def tabulate(
    setting: Setting,
    times: Mapping[str, Mapping[str, list[float]]],
    seen: Mapping[str, Any],
    rates: Rates,
    notes: list[str],
) -> list[tables.Table]:
    """One row a side: milliseconds a sequence and how much slower than msif; peak memory; agreement of the scores."""
    medians = {name: {s: statistics.median(v) for s, v in steps.items()} for name, steps in times.items()}
    medians[FLOOR] = floors(setting, rates)
    steps = list(dict.fromkeys(step for found in medians.values() for step in found))
    times_rows: list[list[tables.Cell]] = []
    for name, found in medians.items():
        row: list[tables.Cell] = [name]
        for step in steps:
            row.append(1e3 * found[step] / setting.train if step in found else None)
            ours = medians["msif"].get(step)
            row.append(found[step] / ours if step in found and ours else None)
        times_rows.append(row)
    scores = {name: np.load(found["scores"]) for name, found in seen.items() if "scores" in found}
    other_rows: list[list[tables.Cell]] = []
    for name, found in seen.items():
        row = [name, *(found["peaks"][step] / 2**20 if step in found["peaks"] else None for step in steps)]
        row += list(agreement(scores["msif"], scores[name])) if {"msif", name} <= set(scores) else [None, None]
        other_rows.append(row)
    size = setting.size
    note = (
        f"GPT-NeoX {size.hidden} x {size.layers}, {setting.train} sequences of {size.tokens} tokens, "
        f"{setting.queries} queries, batches of {setting.batch}; empirical Fisher, damping 0.1 of the mean "
        "eigenvalue. Scores include the queries' gradients. msif's index: 32,000-dimensional sketches to 1-bit codes; "
        f"bergson's: gradients projected to 16 x 16 a map (or whole), never whitened. Medians of {REPEATS} "
        f"interleaved rounds. {FLOOR}: operations counted in msif_core/work.py at the matrix rate of the same "
        f"rounds, {rates.matrix / 1e9:.0f} GFLOP/s; in the fit also the eigendecompositions alone, as every side calls "
        f"them: {1e3 * statistics.median(rates.decompositions) / setting.train:.3g} ms a sequence."
    )
    columns = ["", *(part for step in steps for part in (f"{step}, ms a sequence", "times msif"))]
    others = ["", *(f"{step}, peak MiB" for step in steps)]
    others += ["correlation with msif's scores", "largest relative difference"]
    return [
        tables.Table("Peers: the same factors and scores", columns, times_rows, [note, *notes]),
        tables.Table("Memory beside the peers, and agreement of the scores", others, other_rows),
    ]


def main() -> None:
    """Compare, save the tables, print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--size", choices=inputs.SIZES, default="3 M", help="tracked parameters of the model")
    parser.add_argument("--train", type=int, help="sequences that are fitted, scored and indexed")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--tokens", type=int, help="of a sequence")
    parser.add_argument("--batch", type=int, help="sequences of a batch; the plain loop takes one whatever this says")
    parser.add_argument("--device", default="cpu", help="of every side but bergson, which takes what it finds")
    options = parser.parse_args()
    setting = QUICK if options.quick else replace(FULL, size=inputs.SIZES[options.size])
    changes = {key: value for key in ("train", "queries", "batch") if (value := getattr(options, key))}
    setting = replace(setting, **changes)
    if options.tokens:
        setting = replace(setting, size=replace(setting.size, tokens=options.tokens))
    notes: list[str] = []
    case = write_case(options.out / "peers-case", setting, options.device)
    rates = Rates.of(case, setting)
    found = tabulate(setting, *compare(case, rates, REPEATS, notes), rates, notes)
    tables.save(options.out / "peers.json", found)
    print("\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
