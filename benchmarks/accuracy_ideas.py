"""What each idea gives, one at a time: `python -m benchmarks.accuracy_ideas [CONFIG]`, after benchmarks.accuracy.

Every row changes one thing of multi-stage damped at the default settings; nothing is chosen on the numbers shown,
but the rows "together" were put together from what the rows above them showed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from rich.table import Table

from benchmarks.accuracy import CONFIG, console
from benchmarks.ideas.documents import weight_ideas
from benchmarks.ideas.embedding import embedding_ideas
from benchmarks.ideas.filters import cheap_ideas, filter_ideas, map_ideas
from benchmarks.ideas.geometry import geometry_ideas
from benchmarks.ideas.runs import block_ideas, checkpoint_ideas, fine_tuning_ideas, seed_ideas
from benchmarks.ideas.subject import Idea, Subject
from benchmarks.ideas.training import watch
from msif_core.config import Config
from msif_core.evaluation.lds import mean_and_error, paired_difference


def main() -> None:
    subject = Subject.open(Config.load(sys.argv[1] if len(sys.argv) > 1 else CONFIG))
    gold, base = subject.subsets.gold, subject.default
    table = Table("one change", "LDS, all", "LDS, gold", "against the default", title="Ideas, one at a time")

    def add(*cells: str) -> None:
        table.add_row(*cells)
        print("|", " | ".join(cells), "|", file=sys.stderr)

    value, error = mean_and_error(base)
    add("none: multi-stage, damped", f"{value:.3f} ± {error:.3f}", f"{base[gold].mean():.3f}" if gold.any() else "", "")
    trace = watch(subject)
    groups: list[Callable[[], Iterator[Idea]]] = [
        lambda: filter_ideas(subject),
        lambda: cheap_ideas(subject),
        lambda: geometry_ideas(subject, trace),
        lambda: block_ideas(subject),
        lambda: map_ideas(subject),
        lambda: embedding_ideas(subject),
        lambda: weight_ideas(subject),
        lambda: checkpoint_ideas(subject, trace),
        lambda: fine_tuning_ideas(subject),
        lambda: seed_ideas(subject),
    ]
    for group in groups:
        for name, found in group():
            value, error = mean_and_error(found)
            difference, paired = paired_difference(found, base)
            of_gold = f"{found[gold].mean():.3f}" if gold.any() else ""
            add(name, f"{value:.3f} ± {error:.3f}", of_gold, f"{difference:+.3f} ± {paired:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
