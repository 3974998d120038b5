"""The rows of a SQL answer: as a table on the terminal, or as a CSV or Parquet file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from flows.plain_console import PlainConsole, visible
from msif_core import storage
from msif_core.errors import InputError

UNBROKEN = 10_000
SHORT = 24
"""Characters of a cell that is kept on one line."""
SHOWN = 100
"""Rows printed; a file takes all."""


def print_rows(rows: pa.Table, console: PlainConsole) -> None:
    """Print the first rows: numbers to the right, rounded to five digits; only long texts break over lines.

    Where the output is no terminal (a pipe, a file), no line is broken.
    """
    shown = [list(map(_shown, row)) for row in _by_position(rows.slice(0, SHOWN))]
    table = Table()
    needed = 1
    for i, field in enumerate(rows.schema):
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        longest = max(len(field.name), *(len(row[i]) for row in shown)) if shown else len(field.name)
        table.add_column(
            field.name, justify="right" if number else "left", no_wrap=longest <= SHORT, overflow="fold",
            min_width=min(longest, SHORT),
        )  # fmt: skip
        needed += min(longest, SHORT) + 3
    for row in shown:
        table.add_row(*row)
    if not console.is_terminal:
        PlainConsole(file=console.file, width=UNBROKEN).print(table)
    elif needed <= console.width:
        console.print(table)
    else:
        console.print(_records(rows.column_names, shown))
    if rows.num_rows > SHOWN:
        console.print(f"{SHOWN} of {rows.num_rows:,} rows; --out writes all of them")


def _records(names: list[str], rows: list[list[str]]) -> Table:
    """Each row as lines of name and value: for more columns than the terminal has room for."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        for name, value in zip(names, row, strict=True):
            grid.add_row(Text(visible(name), "bold"), value)
        grid.add_row("", "")
    return grid


def print_ready(queries: dict[str, str], console: PlainConsole) -> None:
    """The ready queries' names, with what each answers."""
    table = Table("ready query", "what it answers")
    for name, text in queries.items():
        table.add_row(name, text.splitlines()[0].removeprefix("-- "))
    console.print(table)


def write_rows(rows: pa.Table, path: Path) -> None:
    """Write the rows to a .csv or .parquet file.

    Raises:
        InputError: the name ends otherwise, or Parquet cannot hold the rows: two columns of one name, or a type that it
            lacks.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"--out {path}: give a name that ends in .csv or .parquet")
    if path.suffix == ".parquet":
        _check_parquet(rows.schema)
    with storage.atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(rows, temporary)
            return
        with open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(rows.column_names)
            writer.writerows(map(_plain, row) for row in _by_position(rows))


def _check_parquet(schema: pa.Schema) -> None:
    for field in schema:
        if len(schema.get_all_field_indices(field.name)) > 1:
            raise InputError(f"--out: two columns are named {field.name!r}; give one another: SELECT ... AS other_name")
        try:
            pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
        except pa.ArrowNotImplementedError:
            raise InputError(
                f"--out: Parquet has no type for the column {field.name!r} ({field.type}); write it as text: "
                f'CAST("{field.name}" AS VARCHAR)'
            ) from None


def _by_position(rows: pa.Table) -> Iterator[tuple[Any, ...]]:
    """The values of each row, whatever names its columns have.

    Raises:
        InputError: a value, such as a year of six digits, is beyond what Python holds.
    """
    return zip(*map(_values, rows.schema, rows.columns), strict=True)


def _values(field: pa.Field, column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError) as error:
        raise InputError(
            f"the column {field.name!r} has a value that cannot be shown ({error}); "
            f'ask for it as text: CAST("{field.name}" AS VARCHAR)'
        ) from None


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return visible(str(_plain(value)))


def _plain(value: Any) -> Any:
    if isinstance(value, pa.MonthDayNano):
        return f"{value.months} months {value.days} days {value.nanoseconds / 1e9:g} seconds"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
