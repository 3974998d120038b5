"""Seconds of the passes, measured on this machine with models of few layers.

A pass takes time for each call and each layer, and for each sequence and each layer; so runs of one layer and of
several, with one sequence and with a batch, say what it takes of all layers and any number of sequences. Layers are
timed in models of a small vocabulary: a large one takes as long as many layers, and its noise would be taken for that
of each of them. One layer of the whole vocabulary is timed beside them. The models have the stage's widths and random
weights, the passes are the fit's, the sketcher's and the scorer's own, writing included.
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

BUDGET = 30.0
"""Seconds that all probes of a plan may take; what would take longer is counted in operations."""
SHARE_OF_MEMORY = 0.2
"""Of the machine's memory that a probe may take."""
PASSES = 4
"""That are timed."""
ROUNDS = 3
"""Rounds of all runs after one to warm up, so that a machine that slows down does so for all of them."""
LAYERS = 3
"""Layers of the deeper model: with two, one layer's time would be one difference, and so twice as noisy."""
SMALL_VOCABULARY = 1024
"""Entries of the vocabulary of models that layers are timed in."""
SHARE_OF_BUDGET = 0.2
"""Of the seconds at hand, what one round is planned to take by its operations: the passes are some times slower."""

Passes = dict[str, Callable[[int], object]]
"""The passes over some sequences, each a function of the round."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass: for each call, and for each sequence."""

    call: float
    sequence: float

    @classmethod
    def of(cls, one: float, batch: float, count: int) -> PassTime:
        """From the seconds of one sequence and of `count` together."""
        each = max(0.0, batch - one) / (count - 1)
        return cls(max(0.0, one - each), each)

    def seconds(self, calls: int, sequences: float) -> float:
        """Of so many calls over so many sequences together."""
        return calls * self.call + sequences * self.sequence

    def deeper(self, few: PassTime, many: PassTime, layers: float) -> PassTime:
        """With so many times what `many` takes longer than `few`."""
        more = (max(0.0, getattr(many, key) - getattr(few, key)) for key in ("call", "sequence"))
        return PassTime(*(own + layers * each for own, each in zip((self.call, self.sequence), more, strict=True)))


@dataclass(frozen=True)
class Size:
    """Operations of one sequence in a probe's passes: of a layer, of all that is not in layers; a layer's statistics.

    `most` is how many sequences a batch has.
    """

    layer: float
    rest: float
    entries: int
    most: int

    def counts(self, seconds: float, rate: float) -> tuple[int, int] | None:
        """Sequences in a batch of the layers and of one layer with its whole vocabulary, for a round within `seconds`.

        None where two of each take longer, or the statistics are too large.
        """
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        operations = SHARE_OF_BUDGET * seconds * rate / 2
        layers, whole = (int(operations / each) for each in ((1 + LAYERS) * self.layer, self.layer + self.rest))
        if min(layers, whole) < 3 or 16 * self.entries > SHARE_OF_MEMORY * memory:
            return None
        return max(2, min(self.most, layers - 1)), max(2, min(self.most, whole - 1))


def uniform(maps: list[tracking.TrackedMap], layers: int) -> bool:
    """Whether the maps are those of `layers` layers that are alike, so that one and two of them tell of all."""
    found: dict[str, list[tuple[int, str, tuple[int, int, int]]]] = {}
    for m in maps:
        for number in re.findall(r"\.(\d+)\.", m.name)[:1]:
            found.setdefault(number, []).append((m.cuts, m.name.replace(f".{number}.", ".", 1), m.shape))
    return len(found) == layers > 0 and len({tuple(own) for own in found.values()}) == 1


def measure(
    config: Config,
    stage: Stage,
    model: Any,
    tokens: int,
    device: str,
    counts: tuple[int, int],
    share: float = 1.0,
    seconds: float = BUDGET,
) -> dict[str, PassTime]:
    """Time of covariances, eigenvalues, sketches and scores of one query, for all layers of the meta `model`.

    `counts` are of `Size`. Sketches keep that share of the eigendirections. Takes about `seconds` at most.
    """
    layers, whole = counts
    cases = {(1, True): whole, (1, False): layers, (LAYERS, False): layers}
    ended = time.perf_counter() + seconds
    with ExitStack() as folders:
        runs: dict[Path, Passes] = {}
        of: dict[tuple[int, bool], tuple[Path, Path]] = {}
        for (depth, full), batch in cases.items():
            small = _shallow(model, depth, full).to(device, getattr(torch, config.compute.dtype))
            one, many = (Path(folders.enter_context(TemporaryDirectory())) for _ in range(2))
            of[depth, full] = one, many
            for folder, count in ((one, 1), (many, batch)):
                runs[folder] = _passes(config, stage, small, _data(small, stage, count, tokens), folder, share)
        names = list(next(iter(runs.values())))
        more = (int(tracking.text_config(model).num_hidden_layers) - 1) / (LAYERS - 1)
        result = {}
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            until = time.perf_counter() + (ended - time.perf_counter()) / left
            took = _median_seconds({folder: own[name] for folder, own in runs.items()}, device, until)
            found = {case: PassTime.of(took[one], took[many], cases[case]) for case, (one, many) in of.items()}
            result[name] = found[1, True].deeper(found[1, False], found[LAYERS, False], more)
    return result


def _shallow(model: Any, layers: int, whole: bool) -> nn.Module:
    """The same architecture with that many layers and its vocabulary, or a small one; weights random."""
    settings = copy.deepcopy(model.config)
    of_text = settings.get_text_config(decoder=True)
    of_text.num_hidden_layers = layers
    if getattr(of_text, "layer_types", None):
        of_text.layer_types = (layers * of_text.layer_types)[:layers]
    if not whole and of_text.vocab_size > SMALL_VOCABULARY:
        of_text.vocab_size = SMALL_VOCABULARY
        settings.pad_token_id = of_text.pad_token_id = 0
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


def _median_seconds(runs: dict[Path, Callable[[int], object]], device: str, until: float) -> dict[Path, float]:
    """Of each run, in rounds of all of them until that time; what a round leaves in the run's folder is removed.

    The first round warms up, and counts where there is time for no other.
    """
    times: dict[Path, list[float]] = {folder: [] for folder in runs}
    for turn in range(1 + ROUNDS):
        began = time.perf_counter()
        for folder, run in runs.items():
            started = time.perf_counter()
            run(turn)
            if device != "cpu":
                torch.cuda.synchronize()
            times[folder].append(time.perf_counter() - started)
            shutil.rmtree(folder / str(turn), ignore_errors=True)
        if 2 * time.perf_counter() - began > until:  # another round would end after it
            break
    return {folder: statistics.median(took[1:] or took) for folder, took in times.items()}
