"""Seconds of the passes, measured on this machine with a model of one and of two layers.

A pass takes time for each call and each layer, and for each sequence and each layer; so four runs of it, of one and
two layers with one sequence and with a batch, say what it takes of all layers and any number of sequences. The models
have the stage's widths and random weights, the passes are the fit's, the sketcher's and the scorer's own, writing
included.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from msif_core import directions, models, scoring, tracking
from msif_core.batching import Sequences, sequence_fingerprint
from msif_core.chain import Chain, FilteredStage
from msif_core.config import Config, Stage
from msif_core.curvature.factors import Factors, MapFactors, write_tensors
from msif_core.curvature.filters import Damped
from msif_core.curvature.steps import Fit, bases_file, eigenvalues_file, input_file
from msif_core.sketch import Sketcher

LONGEST = 30.0
"""Seconds that a probe may take; what would take longer is counted in operations."""
SHARE_OF_MEMORY = 0.2
"""Of the machine's memory that a probe may take."""
ROUNDS = 3
"""Rounds of all runs after one to warm up, so that a machine that slows down does so for all of them."""

Passes = dict[str, Callable[[int], object]]
"""The passes over some sequences, each a function of the round."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass of the whole model: for each call, and for each sequence."""

    call: float
    sequence: float

    def seconds(self, calls: int, sequences: float) -> float:
        """Of so many calls over so many sequences together."""
        return calls * self.call + sequences * self.sequence


def affordable(operations: float, entries: int, rate: float) -> bool:
    """Whether probing layers with `operations` a batch and `entries` of statistics is quick and small enough."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 20 * operations / rate < LONGEST and 16 * entries < SHARE_OF_MEMORY * memory


def uniform(maps: list[tracking.TrackedMap], layers: int) -> bool:
    """Whether the maps are those of `layers` layers that are alike, so that one and two of them tell of all."""
    found: dict[str, list[tuple[int, str, tuple[int, int, int]]]] = {}
    for m in maps:
        for number in re.findall(r"\.(\d+)\.", m.name)[:1]:
            found.setdefault(number, []).append((m.cuts, m.name.replace(f".{number}.", ".", 1), m.shape))
    return len(found) == layers > 0 and len({tuple(own) for own in found.values()}) == 1


def measure(
    config: Config, stage: Stage, model: Any, tokens: int, device: str, share: float = 1.0
) -> dict[str, PassTime]:
    """Time of covariances, eigenvalues, sketches and scores of one query, for all layers of the meta `model`.

    Sketches keep that share of the eigendirections.
    """
    many = max(2, config.compute.batch_tokens // tokens)
    with ExitStack() as folders:
        runs: dict[Path, Passes] = {}
        of: dict[tuple[int, int], Path] = {}
        for layers in (1, 2):
            small = _shallow(model, layers).to(device, getattr(torch, config.compute.dtype))
            for count in (1, many):
                of[layers, count] = folder = Path(folders.enter_context(TemporaryDirectory()))
                runs[folder] = _passes(config, stage, small, _data(small, stage, count, tokens), folder, share)
        names = list(runs[of[1, 1]])
        found = {name: _median_seconds({f: own[name] for f, own in runs.items()}, device) for name in names}
    depth = int(tracking.text_config(model).num_hidden_layers)
    result = {}
    for name, medians in found.items():
        took = {key: medians[folder] for key, folder in of.items()}
        few, batch = (took[1, count] + (depth - 1) * max(0.0, took[2, count] - took[1, count]) for count in (1, many))
        each = max(0.0, batch - few) / (many - 1)
        result[name] = PassTime(max(0.0, few - each), each)
    return result


def _shallow(model: Any, layers: int) -> nn.Module:
    """The same architecture with that many layers, weights random."""
    settings = copy.deepcopy(model.config)
    of_text = settings.get_text_config(decoder=True)
    of_text.num_hidden_layers = layers
    if getattr(of_text, "layer_types", None):
        of_text.layer_types = of_text.layer_types[:layers]
    return models.freeze(type(model)(settings))


def _data(model: Any, stage: Stage, count: int, tokens: int) -> Sequences:
    """Random tokens; every one is a target, or the first is a label."""
    ids = np.random.default_rng(0).integers(1, tracking.text_config(model).vocab_size, (count, tokens)).astype(np.int32)
    labels = ids % 2 if stage.task == "classification" else ids
    marks = [sequence_fingerprint(i, x) for i, x in zip(ids, labels, strict=True)]
    return Sequences(list(ids), list(labels), marks, [str(i) for i in range(count)], np.arange(count))


def _passes(config: Config, stage: Stage, model: nn.Module, sequences: Sequences, folder: Path, share: float) -> Passes:
    maps = tracking.tracked_maps(model, config.curvature)
    batch, budget = config.compute.batch_tokens, config.curvature.memory_budget_gb
    device = next(model.parameters()).device
    query = {m.name: torch.randn(1, *m.shape, device=device) for m in maps}
    factors = _random_factors(folder, maps, str(device))
    chain = Chain((FilteredStage(factors, Damped(0.1)),))
    # Of even eigenvalues narrow sides are kept first; of fitted ones mostly too.
    kept = directions.choose(maps, chain, share, 0)
    sketcher = Sketcher(maps, factors, Damped(0.1), config.sketch, stage.task, kept)

    def fit(turn: int) -> Fit:  # a folder of its own: what stands is not built again
        return Fit(model, maps, folder / str(turn), stage.task, 0, batch, budget)

    def corrected(turn: int) -> None:
        for m in maps:
            for file in (input_file(m.input_group), bases_file(m.name)):
                (folder / str(turn) / file).parent.mkdir(parents=True, exist_ok=True)
                if not (folder / str(turn) / file).exists():
                    (folder / str(turn) / file).symlink_to(folder / file)
        fit(turn).eigenvalues(0, sequences)
        fit(turn).finish(1)

    return {
        "covariances": lambda turn: fit(turn).covariances(0, sequences),
        "eigenvalues": corrected,
        "sketches": lambda _: sketcher.documents(model, sequences, batch, budget),
        "scores": lambda _: scoring.score_sequences(model, maps, dict(query), sequences, batch, task=stage.task),
    }


def _random_factors(folder: Path, maps: list[tracking.TrackedMap], device: str) -> Factors:
    """Factors on disk that cost the passes what fitted ones do."""
    files: dict[str, dict[str, object]] = {}
    for m in maps:
        found = MapFactors(torch.randn(m.d_in, m.d_in), torch.randn(*m.pieces, m.pieces[1]), torch.rand(m.shape))
        names = {
            "input": input_file(m.input_group),
            "bases": bases_file(m.name),
            "eigenvalues": eigenvalues_file(m.name),
        }
        write_tensors(folder / names["input"], {"Q_A": found.Q_A / m.d_in**0.5})
        write_tensors(folder / names["bases"], {"Q_S": found.Q_S / m.pieces[1] ** 0.5})
        write_tensors(folder / names["eigenvalues"], {"eigenvalues": found.eigenvalues})
        files[m.name] = names | {"mean": found.mean.flatten().tolist()}
    return Factors(folder, {"maps": files, "unreached": [], "mean_targets": 1.0, "sequences": 1}, device, None)


def _median_seconds(runs: dict[Path, Callable[[int], object]], device: str) -> dict[Path, float]:
    """Of each run, in rounds of all of them; what a round leaves in the run's folder is removed."""
    times: dict[Path, list[float]] = {folder: [] for folder in runs}
    for turn in range(1 + ROUNDS):
        for folder, run in runs.items():
            started = time.perf_counter()
            run(turn)
            if device != "cpu":
                torch.cuda.synchronize()
            times[folder].append(time.perf_counter() - started)
            shutil.rmtree(folder / str(turn), ignore_errors=True)
    return {folder: statistics.median(took[1:]) for folder, took in times.items()}
