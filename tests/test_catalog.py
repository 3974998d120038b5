from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from msif_core import catalog
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.tiny_project import asked, column
from tests.workspace_fixture import MAPS, write_attribution, write_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("it's a") / "workspace")
    catalog.publish(root)
    return root


VIEWS = {
    "documents": 72, "sequences": 72, "quarantine": 2, "factors": 2, "generations": 2, "queries": 3,
    "influences": 16, "layers": 16 * len(MAPS), "samples": 120, "candidates": 60,
    "runs": 1, "shards": 2, "recall": 6, "stages": 2, "answers": 16,
}  # fmt: skip


@pytest.mark.parametrize(("view", "rows"), VIEWS.items())
def test_views_hold_every_row(workspace: Path, view: str, rows: int) -> None:
    assert catalog.query(workspace, f"SELECT count(*) AS n FROM {view}")["n"].to_pylist() == [rows]


ASKED_WITH_WORDS = ("search_and_influence", "what_changed")
"""Tried with their parameters in test_ready_queries."""


@pytest.mark.parametrize("name", catalog.ready_queries())
def test_ready_queries_run(workspace: Path, tmp_path: Path, name: str) -> None:
    assert catalog.ready_queries()[name].startswith("-- ")
    if name not in ASKED_WITH_WORDS:
        assert catalog.query(workspace, name).num_rows > 0
    catalog.publish(tmp_path)
    assert catalog.query(tmp_path, catalog.ready_queries()[name]).num_rows == 0


def test_one_statement_a_file_with_a_comment() -> None:
    import duckdb

    assert len(catalog.statements()) > 30
    for name, text in catalog.statements().items():
        assert text.startswith("-- "), name
        assert len(duckdb.extract_statements(text)) == 1, name


def test_values(workspace: Path) -> None:
    top = catalog.query(workspace, "top_documents").to_pylist()
    first = [row for row in top if row["query_id"] == "q-000"]
    assert [row["rank"] for row in first] == [1, 2, 3, 4, 5, 6]
    assert all(row["text"] for row in top)
    assert catalog.query(workspace, "queries_with_little_support")["query_id"][0].as_py() == "q-002"
    sources = catalog.query(workspace, "influence_by_source").to_pylist()
    assert {row["source"]: row["n_documents"] for row in sources} == {
        "shakespeare": 20, "wordnet": 20, "(none given)": 20,
    }  # fmt: skip
    layers = catalog.query(workspace, "influence_by_layer").to_pylist()
    assert [row["layer"] for row in layers] == [0, 1, 2]
    total = catalog.query(workspace, "SELECT sum(score) AS s FROM influences WHERE side = 'proponent'")["s"][0].as_py()
    assert sum(row["total_score"] for row in layers) == pytest.approx(total, rel=1e-4)
    factors = catalog.query(workspace, "SELECT stage, n_maps FROM factors ORDER BY stage").to_pylist()
    assert factors == [{"stage": "finetune", "n_maps": 12}, {"stage": "pretrain", "n_maps": 12}]
    year = "SELECT metadata ->> '$.year' AS y FROM documents WHERE document_id = 'pr-0001'"
    assert catalog.query(workspace, year)["y"].to_pylist() == ["1901"]
    targets = "SELECT DISTINCT n_tokens - n_targets AS d FROM sequences"
    assert catalog.query(workspace, targets)["d"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("COPY (SELECT 1) TO 'x.csv'", "only SELECT statements are accepted, this is COPY"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO 'x.csv'", "only SELECT"),
        ("SET threads = 1", "only SELECT"),
        ("ATTACH ':memory:' AS other", "only SELECT"),
        ("DROP TABLE runs", "only SELECT"),
        ("PRAGMA version", "only SELECT"),
        ("SELECT 1; SELECT 2", "expected one SELECT statement, got 2"),
        ("-- nothing", "expected one SELECT statement, got 0"),
        ("COPY (PIVOT documents ON source USING count(*)) TO 'x.csv'", "only SELECT .*; a PIVOT may be one"),
        ("CREATE TABLE x AS PIVOT documents ON source USING count(*)", "only SELECT"),
        ("PIVOT documents ON source USING count(*); SELECT 1", "expected one SELECT statement, got 2"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("SELECT * FROM rows_of_python", "rows_of_python"),
        ("SELECT * FROM read_text('/etc/hostname')", "disabled by configuration"),
        ("SELECT * FROM glob('/etc/*')", "disabled by configuration"),
        ("WITH t AS (INSERT INTO runs VALUES ('a') RETURNING *) SELECT * FROM t", "SQL: "),
        ("SELECT * FROM enable_logging('QueryLog', storage = 'file')", "locked"),
    ],
)
def test_only_select(workspace: Path, sql: str, message: str) -> None:
    before = sorted(workspace.rglob("*"))
    rows_of_python = pa.table({"a": [1]})  # noqa: F841  a table that DuckDB would otherwise find
    with pytest.raises(InputError, match=message):
        catalog.query(workspace, sql)
    assert sorted(workspace.rglob("*")) == before


PIVOT = "PIVOT (SELECT stage, source FROM documents) ON source USING count(*) ORDER BY stage DESC"


@pytest.mark.parametrize(
    "sql", [PIVOT, PIVOT + ";\n", f"SELECT * FROM ({PIVOT})", f"WITH p AS ({PIVOT}) FROM p -- all"]
)
def test_a_pivot_is_answered(workspace: Path, sql: str) -> None:
    assert catalog.query(workspace, sql).to_pylist() == [
        {"stage": "pretrain", "shakespeare": 20, "wordnet": 20},
        {"stage": "finetune", "shakespeare": 4, "wordnet": 4},
    ]


def test_a_statement_with_a_pivot_has_its_parameters(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"a PIVOT has to name its columns: PIVOT \.\.\. ON x IN"):
        catalog.query(workspace, f"SELECT * FROM ({PIVOT}) WHERE stage = $stage", {"stage": "finetune"})
    named = PIVOT.replace("ON source", "ON source IN ('wordnet')")
    sql = f"SELECT * FROM ({named}) WHERE stage = $stage"
    assert catalog.query(workspace, sql, {"stage": "finetune"})["wordnet"].to_pylist() == [4]


NAMES = ["ws[v1]", "ws 100%#1?x*y", "?", "*", "[!a]'\"", "[", "{a,b}:;~$HOME", "ключ\n字"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str) -> None:
    for sibling in ("v", "wsv", "ws 100%#1.x.y"):  # what the name would match as a pattern
        write_attribution(tmp_path / sibling, "20260102-000000-bbbbbb", [f"pr-{i:04d}" for i in range(60)])
    root = write_workspace(tmp_path / name)
    catalog.publish(root)
    for view, rows in VIEWS.items():
        assert catalog.query(root, f"SELECT count(*) AS n FROM {view}")["n"].to_pylist() == [rows], view
    assert catalog.query(root, "SELECT DISTINCT run_id FROM influences").num_rows == 1
    assert sorted(path.name for path in (root / "catalog").iterdir()) == ["CURRENT", "catalog-1.duckdb"]


def test_a_build_in_a_folder_of_any_name(project: Path, tmp_path: Path) -> None:
    settings = json.loads(project.read_text()) | {"workspace": str(tmp_path / "ws [v1] 100%#1?x*y")}
    pipeline = Pipeline(Config.model_validate(settings))
    pipeline.run()
    answered = pipeline.attribute(asked(project)[:1])
    pipeline.publish_catalog()
    assert column(pipeline, "SELECT DISTINCT run_id FROM answers", "run_id") == [answered.run_id]
    answered.to_html(answered.folder / "page.html")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "documents.jsonl", "ws [v1] 100%#1?x*y"}


def test_the_workspace_and_nothing_else_is_readable(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("secret")
    inside = str(workspace / "generations" / "CURRENT").replace("'", "''")
    assert catalog.query(workspace, f"SELECT content FROM read_text('{inside}')").num_rows == 1
    for path in (tmp_path / "x.txt", workspace / ".." / "workspace2" / "x"):
        with pytest.raises(InputError, match="disabled"):
            catalog.query(workspace, f"SELECT * FROM read_text('{str(path).replace(chr(39), chr(39) * 2)}')")


def test_not_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no catalog is published yet; run `msif run CONFIG` first"):
        catalog.query(tmp_path, "SELECT 1")


def test_a_moved_workspace_is_told(tmp_path: Path) -> None:
    catalog.publish(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(InputError, match="run `msif run CONFIG` to publish it again"):
        catalog.query(tmp_path / "b", "SELECT 1")
    catalog.publish(tmp_path / "b")
    assert catalog.query(tmp_path / "b", "SELECT 1").num_rows == 1


def test_publish_moves_the_pointer_while_readers_read(tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    first = catalog.publish(root)
    with catalog.connect(root) as reader:
        ids = [f"pr-{i:04d}" for i in range(60)]
        write_attribution(root, "20260102-000000-bbbbbb", ids, seed=1)
        for _ in range(4):
            last = catalog.publish(root)
        assert reader.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]
        # The views' files grew; the reader still sees only the runs that its catalog lists.
        assert reader.execute("SELECT count(*) FROM influences").fetchall() == [(16,)]
    assert catalog.query(root, "SELECT count(*) AS n FROM influences")["n"].to_pylist() == [32]
    latest = catalog.query(root, "SELECT run_id FROM latest_run")["run_id"].to_pylist()
    assert latest == ["20260102-000000-bbbbbb"]
    assert not first.exists()
    assert last.name == (root / "catalog" / "CURRENT").read_text().strip() == "catalog-5.duckdb"
    names = sorted(path.name for path in (root / "catalog").iterdir())
    assert names == ["CURRENT", "catalog-3.duckdb", "catalog-4.duckdb", "catalog-5.duckdb"]


def test_unfinished_runs_are_not_seen(tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    (root / "attributions" / "20260101-000000-aaaaaa" / "manifest.json").unlink()
    catalog.publish(root)
    assert catalog.query(root, "SELECT * FROM influences").num_rows == 0


def test_stale_shards_are_not_seen(tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    for kind in ("shard", "documents"):
        shutil.copy(root / f"corpus/pretrain/{kind}-00000.parquet", root / f"corpus/pretrain/{kind}-00001.parquet")
    catalog.publish(root)
    assert catalog.query(root, "SELECT * FROM documents WHERE stage = 'pretrain'").num_rows == 60
    assert catalog.query(root, "SELECT * FROM sequences WHERE stage = 'pretrain'").num_rows == 60


def test_threads_share_a_catalog(workspace: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: catalog.query(workspace, "SELECT * FROM influences").num_rows, range(16)))
    assert counts == [16] * 16


def test_publishers_at_the_same_time(tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: catalog.publish(root), range(4)))
    assert len(set(paths)) == 4
    assert catalog.query(root, "SELECT * FROM influences").num_rows == 16


def test_sql_is_found_from_any_folder(tmp_path: Path) -> None:
    code = "from msif_core import catalog; print(len(catalog.ready_queries()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(len(catalog.ready_queries())), done.stderr
