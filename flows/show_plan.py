"""A plan as tables on the terminal."""

from rich.console import Console
from rich.table import Table

from msif_core.plan import Plan, StagePlan


def print_plan(plan: Plan, console: Console) -> None:
    """Stages side by side, then the steps, then what is not known yet."""
    stages = Table("", *(stage.name for stage in plan.stages))
    lines = {
        "parameters": [_count(s.parameters) for s in plan.stages],
        "tracked": [_tracked(s) for s in plan.stages],
        "window": [_window(s) for s in plan.stages],
        "sequences": [f"{s.sequences:,}" for s in plan.stages],
        "tokens": [_count(s.tokens) for s in plan.stages],
        "weights": [_bytes(s.model_bytes) for s in plan.stages],
        "factors": [_bytes(s.factor_bytes) for s in plan.stages],
        "sums, until the fit is done": [f"{_bytes(s.partial_bytes)} in {s.parts} parts" for s in plan.stages],
        "sweeps per statistic": [str(s.passes) for s in plan.stages],
    }
    for name, values in lines.items():
        stages.add_row(name, *values)
    console.print(stages)
    steps = Table("step", "stage", "operations", "memory", "tasks", *_headings(plan.devices))
    for step in plan.steps:
        hours = [step.hours(n) for n in sorted({1, plan.devices})]
        operations = f"{step.operations:.2e}" if step.operations else "–"
        memory = _bytes(step.memory) if step.memory else "–"
        steps.add_row(step.name, step.stage, operations, memory, str(step.tasks), *map(_time, hours))
    console.print(steps)
    console.print(f"Times are for {plan.rates.device}; {_origin(plan)}. The build takes {_time(plan.hours)}.")
    if plan.devices > 1:
        console.print("Tasks are divided over the devices; a query and publishing are one process.")
    console.print("Memory is the device's; of a CPU, the process's resident size. The search is one thread's.")
    console.print(f"Index: {plan.index_kind}, {_bytes(plan.index_bytes)}.")
    if plan.recall_sweeps:
        times = "once" if plan.recall_sweeps == 1 else f"{plan.recall_sweeps} times"
        console.print(f"Measuring recall passes {times} over its sample, so that gradients fit the memory budget.")
    for stage in plan.stages:
        console.print(f"Stage {stage.name}: {stage.coverage}.")
        if stage.counted:
            console.print(f"Stage {stage.name}: times of its passes are counted operations, as {stage.counted}.")
        if stage.assumed:
            console.print(f"Stage {stage.name}: {stage.assumed}.")


def _window(stage: StagePlan) -> str:
    """Tokens of the longest document window, and of the model's context where that is longer."""
    more = f" of the {stage.positions:,} that it reads" if stage.positions and stage.positions > stage.window else ""
    return f"{stage.window:,} tokens{more}"


def _headings(devices: int) -> list[str]:
    return ["time"] if devices == 1 else ["on one", f"on {devices}"]


def _tracked(stage: StagePlan) -> str:
    return f"{_count(stage.tracked)} in {stage.maps} maps ({stage.tracked / stage.parameters:.0%} of all)"


def _origin(plan: Plan) -> str:
    measured = [step.name for step in plan.steps if step.measured]
    if not measured:
        return "counted operations over its rates"
    return f"{', '.join(dict.fromkeys(measured))} from models of few layers, the rest from its rates"


def _count(n: float) -> str:
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def _bytes(n: float) -> str:
    return _count(n) + ("B" if n >= 1e3 else " B")


def _time(hours: float) -> str:
    seconds = 3600 * hours
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.2g} s"
