"""What `msif plan` says of a configuration's models, beside what one accelerator takes: memory, and time of the passes.

    python -m benchmarks.large deployments/configs/pythia-2.8b-dolly.yaml --device h100

The models have the configured sizes and random weights; tokens and eigenbases are random too. Nothing is read or
written: seconds are of the passes alone, for each sequence: of all sweeps of the memory budget, but of eigenvalues the
first one's times their number (the bases of all would not fit).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import inputs, machine, tables
from msif_core import models, scoring, tracking
from msif_core.chain import Chain, FilteredStage
from msif_core.config import Config, Stage
from msif_core.curvature import fit
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped
from msif_core.directions import Directions
from msif_core.footprint import PROCESS
from msif_core.meta_models import meta_model
from msif_core.plan import make_plan
from msif_core.sketch import Sketcher
from msif_core.tracking import TrackedMap
from msif_core.work import EIGH_FLOPS


class RandomFactors:
    """Those of maps, made when they are asked for, as a stage's are read."""

    def __init__(self, maps: list[TrackedMap], device: str) -> None:
        self._maps, self._device = {m.name: m for m in maps}, device

    def __contains__(self, name: str) -> bool:
        return name in self._maps

    def __getitem__(self, name: str) -> MapFactors:
        return inputs.random_factors([self._maps[name]], self._device)[name]


def random_model(config: Config, stage: Stage, device: str) -> Any:
    """The stage's architecture and size."""
    dtype = getattr(torch, config.compute.dtype)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(meta_model(config, stage).config, dtype=dtype)
    return models.freeze(made, tf32=config.compute.tf32)


class Passes:
    """The steps' passes over some sequences, as the steps call them."""

    def __init__(self, config: Config, device: str, count: int) -> None:
        self.config, self.device = config, device
        self.model = random_model(config, config.stages[0], device)
        self.maps = tracking.tracked_maps(self.model, config.curvature)
        self.sequences = inputs.as_sequences(inputs.random_tokens(count, int(config.corpus.max_length or 1024), 0))
        self.groups = list(fit.partitions(self.maps, config.curvature.memory_budget_gb))
        self.common: dict[str, Any] = {"task": "causal_lm", "batch_tokens": config.compute.batch_tokens}

    def covariances(self) -> None:
        """Every sweep's sums, one after the other."""
        for maps in self.groups:
            fit.covariance_sums(self.model, maps, self.sequences, seed=0, **self.common)

    def eigenvalues(self, bases: dict[str, MapFactors]) -> None:
        """The first sweep's, whose eigenbases are given."""
        fit.eigenvalue_sums(self.model, self.groups[0], bases, self.sequences, seed=0, **self.common)

    def sketches(self) -> None:
        """Of the share of the directions that is kept."""
        settings, share = self.config.sketch, self.config.sketch.directions
        kept = {m.name: Directions.even(m, share) for m in self.maps}
        factors: Any = RandomFactors(self.maps, self.device)
        sketcher = Sketcher(self.maps, factors, Damped(0.1), settings, "causal_lm", kept)
        sketcher.documents(
            self.model, self.sequences, self.config.compute.batch_tokens, self.config.curvature.memory_budget_gb
        )

    def query(self, last: Any) -> None:
        """One query through two stages, and exact scores of the sequences."""
        factors: Any = RandomFactors(self.maps, self.device)
        chain = Chain((FilteredStage(factors, Damped(0.1)), FilteredStage(factors, Damped(0.1))))
        one = self.sequences.take([0])
        for _, maps in scoring.query_groups(self.maps, 1, self.config.curvature.memory_budget_gb):
            gradients = scoring.query_gradients(last, maps, one, factors=factors, **self.common)
            filtered = chain.filter_all(gradients, rotated=True)
            scoring.score_sequences(self.model, maps, filtered, self.sequences, **self.common)


def measure(config: Config, device: str, sheet: str, count: int) -> tables.Table:
    """Each step's peak and seconds a sequence beside the plan's."""
    million = {stage.name: 1_000_000 for stage in config.stages}
    plan = {step.name: step for step in reversed(make_plan(config, sheet, million).steps)}
    passes, rows = Passes(config, device, count), list[list[tables.Cell]]()
    fitted = min(config.curvature.max_sequences, 1_000_000)

    def row(name: str, run: Callable[[], object], of: float, planned: float | None) -> None:
        whole, passes.sequences = passes.sequences, passes.sequences.take([0])
        run()  # the libraries load their kernels
        passes.sequences = whole
        machine.reset_peak(device)
        seconds = machine.seconds(run, device) / of
        peak = machine.peak_bytes(device) + (PROCESS if device != "cpu" else 0)
        memory, off = plan[name].memory, planned / seconds - 1 if planned else None
        rows.append([name, memory / 1e9, peak / 1e9, memory / peak - 1, planned, seconds, off])

    row("covariances", passes.covariances, count, plan["covariances"].seconds / fitted)
    factors = inputs.random_factors(passes.groups[0], device)
    bases = {name: replace(factors.pop(name), eigenvalues=torch.empty(0)) for name in list(factors)}
    sweeps = len(passes.groups)
    row("eigenvalues", lambda: passes.eigenvalues(bases), count / sweeps, plan["eigenvalues"].seconds / fitted)
    bases.clear()
    row("sketches", passes.sketches, count, plan["sketches"].seconds / 1_000_000)
    n = max(max(m.d_in, m.pieces[1]) for m in passes.maps)
    x = torch.randn(n, n, dtype=torch.float64)
    x += x.mT.clone()
    rate = plan["eigenbases"].operations / plan["eigenbases"].seconds
    row("eigenbases", lambda: torch.linalg.eigh(x.to(device)).eigenvectors.float(), 1, EIGH_FLOPS * n**3 / rate)
    last = random_model(config, config.stages[-1], device)
    row("one query", lambda: passes.query(last), 1, None)
    note = (
        f"{config.stages[0].model}, {config.compute.dtype}, {'TF32' if config.compute.tf32 else 'float32'} statistics, "
        f"budget {config.curvature.memory_budget_gb:g} GB ({sweeps} sweeps), {count} sequences of "
        f"{len(passes.sequences.input_ids[0])} tokens. Seconds: of a sequence; of eigenbases, of the widest ({n:,}); "
        f"of one query, in all, with {count} documents scored. Memory: torch's largest, and {PROCESS / 1e9:g} GB for "
        "the context."
    )
    columns = ["", "planned, GB", "measured, GB", "off", "planned, s", "measured, s", "off"]
    return tables.Table(f"A large model: {config.stages[0].model}", columns, rows, [note])


def main() -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--device", required=True, help="the plan's: its data sheet")
    parser.add_argument("--on", default="cuda", help="torch's device")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    found = measure(Config.load(options.config), options.on, options.device, options.sequences)
    tables.save(options.out / f"large-{options.config.stem}.json", [found])
    print(found.markdown())


if __name__ == "__main__":
    main()
