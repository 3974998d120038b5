"""One DuckDB catalog over a workspace: views over its Parquet files, small tables from its manifests.

`publish` builds a new file and moves a pointer; readers open the file that the pointer names, read-only
and locked, at any time. This module is the only place that opens DuckDB; its statements are in sql/.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa

from msif_core import storage
from msif_core.errors import InputError
from msif_core.generations import manifest_of
from msif_core.workspace import Workspace

SQL = Path(__file__).resolve().parents[1] / "sql"
"""Folder of the statements: beside this package in a checkout, an editable and a plain install."""

CORPUS = ("documents", "sequences", "quarantine")
PARQUET = {
    "queries": "attributions/*/queries.parquet",
    "influences": "attributions/*/influences.parquet",
    "layers": "attributions/*/layers.parquet",
    "tokens": "attributions/*/tokens.parquet",
    "samples": "attributions/*/samples.parquet",
    "candidates": "attributions/*/candidates.parquet",
    "versions": "corpus/*/documents-*.parquet",
    "metrics": "evaluations/retraining/*/metrics.parquet",
    "retrained_losses": "evaluations/retraining/*/losses-*.parquet",
}
KEPT = 3
"""Catalog files that stay: readers may still be opening an older one."""

Row = dict[str, Any]
_connecting = threading.Lock()
_publishing = threading.Lock()


@cache
def statements() -> dict[str, str]:
    """All statements of sql/, by the file's stem."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(SQL.glob("*.sql"))}


def ready_queries() -> dict[str, str]:
    """The queries that come with msif, by name; each starts with a comment on what it answers."""
    setup = ("schema_", "table_", "view_", "macro_")
    return {name: text for name, text in statements().items() if not name.startswith(setup)}


# -- writing ------------------------------------------------------------------------------------------


def publish(workspace: Path) -> Path:
    """Build a catalog over all that is complete in `workspace` and move the pointer to it.

    Returns the new file, catalog/catalog-<n>.duckdb. Readers of the file before are not disturbed.
    """
    with _publishing, storage.told(Path(workspace) / "catalog"):
        return _publish(Path(workspace).resolve())


def _publish(workspace: Path) -> Path:
    folder = workspace / "catalog"
    storage.make_folder(folder)
    target = _claim(folder)
    try:
        # DuckDB takes what follows a ? in a path for options of the file, so it writes where no folder's name has one.
        with TemporaryDirectory(prefix="msif-catalog-") as elsewhere, storage.atomic_path(target) as temporary:
            built = Path(elsewhere) / "catalog.duckdb"
            with storage.told(built.parent):
                _build(workspace, built)
            shutil.copyfile(built, temporary)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    current = _current(folder)
    if current is None or _number(current) < _number(target):
        storage.write_text(folder / "CURRENT", target.name + "\n")
    for old in sorted(folder.glob("catalog-*.duckdb"), key=_number)[:-KEPT]:
        if old != _current(folder):
            old.unlink(missing_ok=True)
    return target


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("catalog-")
    return int(digits) if digits.isdigit() else -1


def _claim(folder: Path) -> Path:
    """Create the empty file of the next number; two publishers at a time get two numbers."""
    number = max(map(_number, folder.glob("catalog-*.duckdb")), default=0) + 1
    while True:
        path = folder / f"catalog-{number}.duckdb"
        try:
            path.open("x").close()
        except FileExistsError:
            number += 1
        else:
            return path


def _current(folder: Path) -> Path | None:
    pointer = folder / "CURRENT"
    return folder / pointer.read_text().strip() if pointer.exists() else None


def _build(workspace: Path, path: Path) -> None:
    """Write the catalog's schema, views and small tables to the new file `path`."""
    sql = statements()
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA columns")
        connection.execute("CREATE SCHEMA stored")
        # Attributions of runs to come are found by a pattern; a corpus is that of the published generation.
        found = {
            name: [f"{_literal(workspace)}/{pattern}"]
            for name, pattern in PARQUET.items()
            if next(workspace.glob(pattern), None) is not None
        } | {name: [_literal(path) for path in files] for name, files in _corpus_files(workspace).items()}
        for table in (*CORPUS, *PARQUET):
            connection.execute(sql[f"schema_{table}"])
            source = f"CREATE VIEW stored.{table} AS SELECT * FROM columns.{table}"
            if table in found:
                files = ", ".join(map(_quoted, found[table]))
                # BY NAME: a file written before a column was added reads as NULL there.
                source += (
                    f" UNION ALL BY NAME SELECT * FROM read_parquet([{files}], union_by_name = true,"
                    f" filename = {str('filename' in sql[f'schema_{table}']).lower()})"
                )
            connection.execute(source)
        for table, rows in _small_tables(workspace).items():
            connection.execute(sql[f"table_{table}"])
            _insert(connection, table, rows)
        views = [text for name, text in sql.items() if name.startswith("view_")]
        # `answers` reads other views, so it comes after them.
        for text in sorted(views, key=lambda text: "CREATE VIEW answers" in text):
            connection.execute(text)
        for text in (text for name, text in sql.items() if name.startswith("macro_")):
            connection.execute(text)
        connection.execute("CREATE TABLE columns.workspace AS SELECT ? AS root", [str(workspace)])


def _literal(path: Path) -> str:
    """A pattern that matches that path alone: what DuckDB would read as part of a pattern stands in brackets."""
    return re.sub(r"[\[*?]", r"[\g<0>]", str(path))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: list[Row]) -> None:
    names = [column[0] for column in connection.execute(f"SELECT * FROM {table} LIMIT 0").description or []]
    values = [[_cell(row.get(name)) for name in names] for row in rows]
    if values:
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", values)


def _cell(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _manifests(folder: Path, name: str = "manifest.json") -> Iterator[tuple[Path, Row]]:
    """Folders below `folder` that are complete, with their manifests."""
    for path in sorted(folder.glob(f"[!.]*/{name}")):
        yield path.parent, dict(storage.read_json(path))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("[!.]*") if path.is_file())


def _small_tables(workspace: Path) -> dict[str, list[Row]]:
    """Rows of the tables that come from manifests, by table."""
    corpora = _corpora(workspace)
    generations = list(_manifests(workspace / "generations"))
    published = Workspace(workspace).published()
    return {
        "stages": [_stage_row(folder, manifest) for folder, manifest in corpora],
        "shards": [
            {**shard, "stage": folder.name, "shard": number}
            for folder, manifest in corpora
            for number, shard in enumerate(manifest["shards"])
        ],
        "factors": _factors_rows(workspace),
        "generations": [_generation_row(folder, m, published) for folder, m in generations],
        "generation_shards": [
            row for folder, m in generations for row in _generation_shard_rows(workspace, folder.name, m)
        ],
        "recall": [row for folder, m in generations for row in _recall_rows(folder.name, m.get("recall") or {})],
        "runs": [_run_row(folder, manifest) for folder, manifest in _manifests(workspace / "attributions")],
    }


def _corpora(workspace: Path) -> list[tuple[Path, Row]]:
    """Each stage's folder with its manifest: of the published generation's version, or the newest before a publish."""
    published = manifest_of(Workspace(workspace), Workspace(workspace).published()) or {}
    versions = {stage: workspace / path for stage, path in published.get("corpora", {}).items()}
    return [
        (folder, dict(storage.read_json(versions[folder.name])) if folder.name in versions else newest)
        for folder, newest in _manifests(workspace / "corpus")
    ]


def _corpus_files(workspace: Path) -> dict[str, list[Path]]:
    """Files of the corpora by table, whatever other versions lie beside them.

    The fit's quarantine is that of the published generation's factors, or of the pinned ones before a publish.
    """
    found: dict[str, list[Path]] = {name: [] for name in CORPUS}
    pinned = {pin.stem: storage.read_json(pin)["factors"] for pin in (workspace / "pins").glob("*.json")}
    published = manifest_of(Workspace(workspace), Workspace(workspace).published()) or {}
    factors = pinned | published.get("factors", {})
    for folder, manifest in _corpora(workspace):
        for shard in manifest["shards"]:
            for name in CORPUS:
                if name in shard:
                    found[name].append(folder / shard[name])
            found["quarantine"] += folder.glob(f"quarantine-gradients-{Path(shard['sequences']).stem}.parquet")
        found["quarantine"] += sorted(folder.glob(f"quarantine-fit-{factors.get(folder.name)}-*.parquet"))
    return {name: files for name, files in found.items() if files}


def _stage_row(folder: Path, manifest: Row) -> Row:
    counts = ("n_documents", "n_sequences", "n_quarantined")
    return {
        **manifest,
        **{name: sum(shard.get(name, 0) for shard in manifest["shards"]) for name in counts},
        "stage": folder.name,
        "n_shards": len(manifest["shards"]),
        "bytes": sum((folder / s[k]).stat().st_size for s in manifest["shards"] for k in CORPUS if k in s),
    }


def _factors_rows(workspace: Path) -> list[Row]:
    users: dict[str, list[str]] = {}
    for pin in sorted((workspace / "pins").glob("*.json")):
        users.setdefault(str(storage.read_json(pin)["factors"]), []).append(pin.stem)
    rows = []
    for folder, manifest in _manifests(workspace / "factors", "factors.json"):
        rows.append({
            "fingerprint": folder.name,
            "stage": ", ".join(users.get(folder.name, [])) or None,
            "n_sequences": manifest["sequences"],
            "mean_targets": manifest["mean_targets"],
            "n_maps": len(manifest["maps"]),
            "maps": sorted(manifest["maps"]),
            "bytes": _bytes(folder),
        })  # fmt: skip
    return rows


def _generation_row(folder: Path, manifest: Row, published: str | None) -> Row:
    recall = manifest.get("recall") or {}
    return {
        **manifest,
        "generation": folder.name,
        "published": folder.name == published,
        "bytes_per_sequence": recall.get("bytes_per_sequence"),
        "recall_queries": recall.get("queries"),
        "recall_sequences": recall.get("sequences"),
        "estimate": recall.get("estimate"),
        "verdict": recall.get("told"),
    }


def _generation_shard_rows(workspace: Path, generation: str, manifest: Row) -> Iterator[Row]:
    """Files of the corpora that a generation was built from, as far as they are kept."""
    for stage, version in (manifest.get("corpora") or {}).items():
        if (path := workspace / version).exists():
            for shard in storage.read_json(path)["shards"]:
                yield {"generation": generation, "stage": stage, "documents": shard["documents"]}


def _recall_rows(generation: str, recall: Row) -> Iterator[Row]:
    for row in recall.get("found", []):
        yield {**row, "generation": generation, "sequences": recall["sequences"]}


def _run_row(folder: Path, manifest: Row) -> Row:
    stage = (manifest.get("settings") or {}).get("attribute_to")
    return {**manifest, "run_id": folder.name, "attributed_stage": stage}


# -- reading ------------------------------------------------------------------------------------------


def connect(workspace: Path) -> duckdb.DuckDBPyConnection:
    """Open the current catalog: read-only, no files but the workspace's, settings locked.

    Raises:
        InputError: there is no catalog yet, or the workspace was moved since it was built.
    """
    workspace = Path(workspace).resolve()
    path = _current(workspace / "catalog")
    if path is None or not path.exists():
        raise InputError(f"{workspace}: no catalog is published yet; run `msif run CONFIG` first")
    # Connections of one process to one file share their settings: the first one locks them for all.
    with _connecting:
        connection = duckdb.connect(str(path), read_only=True)
        if not _value(connection, "SELECT current_setting('lock_configuration')"):
            # DuckDB holds a view's patterns against this list as well as the files that they match.
            allowed = ", ".join(_quoted(f"{root}/") for root in (str(workspace), _literal(workspace)))
            connection.execute(f"SET allowed_directories = [{allowed}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET python_enable_replacements = false")  # Python variables are not tables
            connection.execute("SET lock_configuration = true")
    built_at = _value(connection, "SELECT root FROM columns.workspace")
    if built_at != str(workspace):
        connection.close()
        raise InputError(
            f"{workspace}: its catalog was built at {built_at}, so its views read files there; "
            "run `msif run CONFIG` to publish it again here"
        )
    return connection


def _value(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
    rows = connection.execute(sql).fetchall()  # all: an unread result would block the connection
    return rows[0][0] if rows else None


def query(workspace: Path, sql: str, parameters: Mapping[str, str] | None = None) -> pa.Table:
    """Answer one SELECT statement over the current catalog.

    `sql` is a statement, or the name of a ready query (see `ready_queries`). `parameters` are the values of
    its $names; one that is not given is NULL.

    Raises:
        InputError: not exactly one SELECT, a parameter that it does not have, or DuckDB rejects it; the message
            is DuckDB's.
    """
    sql = ready_queries().get(sql.strip(), sql)
    given = dict(parameters or {})
    with connect(workspace) as connection:
        names = _check_select(connection, sql)
        if unknown := sorted(given.keys() - names):
            has = ", ".join(sorted(names)) or "none"
            raise InputError(f"SQL: no parameter ${unknown[0]} in this statement; it has {has}")
        try:
            return connection.sql(sql, params={name: given.get(name) for name in names}).to_arrow_table()
        except duckdb.Error as error:
            raise InputError(f"SQL: {error}") from None


def _check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Refuse all but one SELECT: a read-only connection could still COPY into the workspace; names its parameters."""
    try:
        found = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise InputError(f"SQL: {error}") from None
    if len(found) != 1:
        raise InputError(f"SQL: expected one SELECT statement, got {len(found)} statements")
    kind = found[0].type
    if kind == duckdb.StatementType.MULTI:  # a PIVOT that finds out its columns first, or a statement with one in it
        if not _is_subquery(connection, found[0].query):
            raise InputError("SQL: only SELECT statements are accepted; a PIVOT may be one, or stand within one")
        if found[0].named_parameters:
            raise InputError("SQL: with a parameter, a PIVOT has to name its columns: PIVOT ... ON x IN ('a', 'b') ...")
    elif kind != duckdb.StatementType.SELECT:
        raise InputError(f"SQL: only SELECT statements are accepted, this is {kind.name}")
    return set(found[0].named_parameters)


def _is_subquery(connection: duckdb.DuckDBPyConnection, sql: str) -> bool:
    """Whether a statement may stand in a FROM clause, where the grammar has no place for one that writes."""
    try:
        return len(connection.extract_statements(f"SELECT * FROM (\n{sql.rstrip().removesuffix(';')}\n)")) == 1
    except duckdb.Error:
        return False
