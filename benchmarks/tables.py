"""Tables of results: kept as JSON by each section, written together as one Markdown file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """One table of results; `notes` say what was compared and how."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self) -> str:
        """The table under its title, notes below."""
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row([_cell(value) for value in row]) for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Cell) -> str:
    """Three significant digits for numbers, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def save(path: Path, tables: Sequence[Table]) -> None:
    """Keep a section's tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(table) for table in tables], indent=1), encoding="utf-8")


def load(path: Path) -> list[Table]:
    """The tables of a section, none where it has left none."""
    if not path.exists():
        return []
    return [Table(**table) for table in json.loads(path.read_text(encoding="utf-8"))]
