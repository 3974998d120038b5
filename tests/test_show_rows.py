"""Rows of SQL as text: by position, and as data that steers no terminal."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from flows.plain_console import PlainConsole, visible
from flows.show_results import print_attribution
from flows.show_rows import print_rows, write_rows
from flows.terminal import Lines, quiet_log, steps_shown
from msif_core import catalog
from msif_core.errors import InputError
from tasks import progress
from tests.test_cli import config, msif  # noqa: F401  a fixture
from tests.workspace_fixture import write_workspace

ODD = "a:book:b [bold]c[/bold] \x1b[31md\x07 \x9be \u202ef\r"
SHOWN = r"a:book:b [bold]c[/bold] \x1b[31md\x07 \x9be \u202ef\r"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("rows") / "workspace")
    catalog.publish(root)
    return root


def printed(rows: pa.Table, **options: object) -> str:
    console = PlainConsole(file=io.StringIO(), color_system=None, **options)  # type: ignore[arg-type]
    print_rows(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


TWINS = (
    "SELECT i.document_id, d.document_id, d.text AS document_id FROM influences i JOIN documents d USING (document_id)"
)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "width": 200}, {"force_terminal": True, "width": 40}])
def test_columns_of_one_name_are_all_printed(workspace: Path, options: dict[str, object]) -> None:
    rows = catalog.query(workspace, TWINS).slice(0, 1)
    name, text = rows.column(0)[0].as_py(), rows.column(2)[0].as_py()
    shown = printed(rows, **options)
    assert shown.count(name) == 2
    assert shown.count(text.split()[0]) >= 1
    assert shown.count("document_id") == 3


def test_columns_of_one_name_go_to_a_csv_by_position_and_to_parquet_under_other_names(
    workspace: Path, tmp_path: Path
) -> None:
    rows = catalog.query(workspace, TWINS)
    write_rows(rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", encoding="utf-8") as handle:
        found = list(csv.reader(handle))
    assert found[0] == ["document_id"] * 3
    assert {len(line) for line in found} == {3}
    assert [line[2] for line in found[1:]] == rows.column(2).to_pylist()
    with pytest.raises(InputError, match=r"two columns are named 'document_id'; give one another: SELECT \.\.\. AS"):
        write_rows(rows, tmp_path / "rows.parquet")
    assert not (tmp_path / "rows.parquet").exists()


@pytest.mark.parametrize("value", ["interval '1 month 2 days'", "[interval '1 day']", "union_value(num := 2)"])
def test_types_that_parquet_lacks_are_named(workspace: Path, tmp_path: Path, value: str) -> None:
    rows = catalog.query(workspace, f"SELECT 1 AS one, {value} AS odd")
    with pytest.raises(InputError, match=r"no type for the column 'odd' .*: CAST\(\"odd\" AS VARCHAR\)"):
        write_rows(rows, tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []
    write_rows(catalog.query(workspace, f"SELECT CAST({value} AS VARCHAR) AS odd"), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 1


def test_an_interval_is_shown_in_words(workspace: Path) -> None:
    assert "1 months 2 days 1.5 seconds" in printed(
        catalog.query(workspace, "SELECT interval '1 month 2 days 1.5 seconds' AS odd")
    )


@pytest.mark.parametrize("value", ["date '290000-01-01'", "timestamp 'infinity'"])
def test_values_that_python_does_not_hold_are_named(workspace: Path, tmp_path: Path, value: str) -> None:
    rows = catalog.query(workspace, f"SELECT {value} AS odd")
    with pytest.raises(InputError, match=r"column 'odd' has a value that cannot be shown .*CAST\(\"odd\" AS VARCHAR\)"):
        printed(rows)
    with pytest.raises(InputError, match="column 'odd'"):
        write_rows(rows, tmp_path / "rows.csv")
    assert list(tmp_path.iterdir()) == []


def test_data_is_printed_as_data(workspace: Path) -> None:
    rows = pa.table({ODD: [ODD], ":book:": ["[/]"]})
    for options in ({}, {"force_terminal": True, "width": 400}, {"force_terminal": True, "width": 20}):
        shown = printed(rows, **options)
        assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\N{OPEN BOOK}"}
        if "width" not in options or options["width"] == 400:
            assert shown.count(SHOWN) == 2
    assert visible("tab\tline\nа́ 字 \N{OPEN BOOK} \ud800") == "tab\tline\nа́ 字 \N{OPEN BOOK} \\ud800"


def test_an_attribution_is_printed_as_data(workspace: Path) -> None:
    folder = workspace / "attributions" / "20260101-000000-aaaaaa"
    for name, column in (("influences", "document_id"), ("queries", "prompt")):
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        values = [
            ODD if value in (table[column][0].as_py(), 'Define the word "periselene".') else value
            for value in table[column].to_pylist()
        ]
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, [values]), path)
    console = PlainConsole(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    print_attribution(folder, console, top=20)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(SHOWN.removesuffix(r"\r")) >= 2  # the prompt's lines are joined
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\N{OPEN BOOK}"}


def test_steps_and_warnings_are_printed_as_data() -> None:
    for terminal in (True, False):
        console = PlainConsole(file=io.StringIO(), width=300, force_terminal=terminal, color_system=None)
        with steps_shown(console):
            progress._listener("fit [bold]:book:", 1, 1)
        assert "fit [bold]:book:" in console.file.getvalue()  # type: ignore[attr-defined]
    Lines(console)("\x1b[2J", 1, 1)
    assert r"\x1b[2J: done" in console.file.getvalue()  # type: ignore[attr-defined]
    output = io.StringIO()
    handler = PrefectConsoleHandler(stream=output)
    logger = logging.getLogger("prefect.test_data")
    logger.addHandler(handler)
    try:
        with quiet_log():
            logger.warning("%s", ODD)
    finally:
        logger.removeHandler(handler)
    assert SHOWN in output.getvalue()


def test_a_mistake_is_printed_as_data(msif, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    code, error = msif("report", tmp_path / "\x1b]0;:book:\x07.yaml", "run")
    assert (code, error) == (2, f"msif: {tmp_path}/\\x1b]0;:book:\\x07.yaml: no such configuration file\n")


def test_sql_prints_data(msif, workspace: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    path = config(workspace.parent)
    assert msif("sql", path, "SELECT ':book:', chr(27) || '[31m' AS x, 1 AS x")[0] == 0
