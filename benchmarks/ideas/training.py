"""The reference models' training once more, watched: checkpoints on the way, and Adam's second moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.ideas.subject import Subject
from msif_core.evaluation.methods import Gradients
from msif_core.evaluation.retraining import recipe
from msif_core.tracking import TrackedMap
from msif_core.training import new_model, optimize, step_count

SHARES = (0.25, 0.5, 0.75)
"""Checkpoints of the attributed stage, as shares of its steps; the finished model comes on top."""


@dataclass
class Trace:
    """What was seen.

    Attributes:
        checkpoints: parameters on the way of the attributed stage.
        last: Adam's second moments at the end of each stage, map to [G, b, d_in].
        mean: their mean over the second half of each stage's steps.
    """

    checkpoints: list[dict[str, torch.Tensor]] = field(default_factory=list)
    last: dict[str, Gradients] = field(default_factory=dict)
    mean: dict[str, Gradients] = field(default_factory=dict)


@dataclass
class Watcher:
    """Looks at a model and its optimizer after each of `steps` steps; keeps copies of the model at `stops`."""

    model: torch.nn.Module
    steps: int
    stops: list[int]
    done: int = 0
    checkpoints: list[dict[str, torch.Tensor]] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)
    mean: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = {id(p): name for name, p in self.model.named_parameters()}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.done += 1
        if self.done in self.stops:
            self.checkpoints.append({name: value.clone() for name, value in self.model.state_dict().items()})
        if 2 * self.done > self.steps:
            for parameter, state in optimizer.state.items():
                name, v = self._names[id(parameter)], state["exp_avg_sq"]
                self.mean[name] = self.mean.get(name, 0) + v / (self.steps - self.steps // 2)
                self.last[name] = v


def watch(subject: Subject) -> Trace:
    """Train again what the reference models came from; the same bits come out, or it stops."""
    retraining, trace = subject.retraining, Trace()
    stages = retraining.config.stages
    model = new_model(retraining.tokenizer, retraining.architecture, recipe(stages[0], 0).seed)
    for stage in stages:
        sequences, settings = retraining.sequences(stage), recipe(stage, 0)
        steps = step_count(len(sequences), settings)
        watched = stage.name == subject.pool.target
        watcher = Watcher(model, steps, [round(share * steps) for share in SHARES] if watched else [])
        handle = register_optimizer_step_post_hook(watcher)
        try:
            optimize(model, sequences, settings)
        finally:
            handle.remove()
        reference = subject.pool.stages.model(stage.name).state_dict()
        differing = [name for name, value in model.state_dict().items() if not torch.equal(value, reference[name])]
        assert not differing, f"trained again, {stage.name} differs from the reference model at {differing[0]}"
        trace.checkpoints += watcher.checkpoints
        trace.last[stage.name] = {m.name: of_map(watcher.last, m) for m in subject.maps}
        trace.mean[stage.name] = {m.name: of_map(watcher.mean, m) for m in subject.maps}
    return trace


def of_map(values: dict[str, torch.Tensor], m: TrackedMap) -> torch.Tensor:
    """Values of a map's weight and bias, laid out as its gradient [G, b, d_in]."""
    table = values[f"{m.name}.weight"]
    if m.bias:
        table = torch.cat([table, values[f"{m.name}.bias"][:, None]], 1)
    return table[m.blocks(torch.arange(m.d_out)).flatten()].reshape(m.shape)
