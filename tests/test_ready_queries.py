"""The ready queries on a real attribution, each against the same answer computed from the files in Python."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.plain_console import PlainConsole
from flows.show_rows import print_rows, write_rows
from msif_core import catalog, storage
from msif_core.attribution import Attribution
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.tiny_project import documents, write_project, write_records
from tests.workspace_fixture import write_corpus

Rows = list[dict[str, Any]]


def described() -> Rows:
    """The tiny project's documents, with one of more sources than are ranked, and (two of three) a license."""
    licenses = ("CC0", "MIT", None)
    return [
        {**row, "source": f"shelf {i % 24}", **({"license": name} if (name := licenses[i % 3]) else {})}
        for i, row in enumerate(documents())
    ]


@pytest.fixture(scope="module")
def attribution(tmp_path_factory: pytest.TempPathFactory) -> Attribution:
    folder = tmp_path_factory.mktemp("project")
    config = write_project(folder)
    write_records(folder / "documents.jsonl", described())
    pipeline = Pipeline.from_config(config)
    pipeline.run()
    pipeline.attribute(folder / "queries.jsonl")  # an older run: the ready queries look at the newest
    time.sleep(1)  # a run's time is in seconds
    found = pipeline.attribute(folder / "queries.jsonl")
    pipeline.publish_catalog()
    return found


def ask(attribution: Attribution, query: str, **parameters: str) -> Rows:
    rows: Rows = catalog.query(attribution.folder.parents[1], query, parameters).to_pylist()
    return rows


def influences(attribution: Attribution, side: str = "proponent") -> Rows:
    return [row for row in attribution.table.to_pylist() if row["side"] == side]


def test_top_documents_and_opponents(attribution: Attribution) -> None:
    for name, side in (("top_documents", "proponent"), ("opponents", "opponent")):
        rows = ask(attribution, name)
        expected = [(r["query_id"], r["rank"], r["document_id"]) for r in influences(attribution, side)]
        assert [(r["query_id"], r["rank"], r["document_id"]) for r in rows] == sorted(expected)
        assert rows[0]["text"].startswith(attribution.documents[rows[0]["document_id"]].text)


def test_by_source_and_license(attribution: Attribution) -> None:
    for name, field in (("influence_by_source", "source"), ("influence_by_license", "license")):
        of = {row["id"]: row.get(field, "(none given)") for row in described()}
        total: dict[str, float] = defaultdict(float)
        for row in influences(attribution):
            total[str(of[row["document_id"]])] += row["score"]
        found = {row[field]: row["total_score"] for row in ask(attribution, name)}
        assert found == pytest.approx(total, rel=1e-5)


def test_lift_compares_with_all_documents(attribution: Attribution) -> None:
    of = {str(row["id"]): row["source"] for row in described()}
    found, shelves = Counter(of[row["document_id"]] for row in influences(attribution)), Counter(of.values())
    assert len(found) < len(shelves), "every source is ranked: the test shows nothing"
    expected = {s: (n / found.total()) / (shelves[s] / shelves.total()) for s, n in found.items()}
    rows = ask(attribution, "influence_by_source")
    assert {row["source"]: row["lift"] for row in rows} == pytest.approx(expected)
    assert {row["source"]: row["n_documents"] for row in rows} == {s: shelves[s] for s in found}


def test_by_length_and_layer(attribution: Attribution) -> None:
    lengths = [attribution.documents[row["document_id"]].n_tokens for row in influences(attribution)]
    classes = Counter(2 ** int(math.log2(n)) for n in lengths)
    assert {row["from_tokens"]: row["n_ranked"] for row in ask(attribution, "influence_by_length")} == classes
    proponents = {(row["query_id"], row["document_id"]) for row in influences(attribution)}
    parts = [r for r in attribution.layers.to_pylist() if (r["query_id"], r["document_id"]) in proponents]
    [layer] = ask(attribution, "influence_by_layer")  # the tiny model has one
    assert (layer["layer"], layer["share"]) == (0, pytest.approx(1))
    assert layer["total_score"] == pytest.approx(sum(r["score"] for r in parts), rel=1e-4)


def test_documents_of_many_queries(attribution: Attribution) -> None:
    queries: dict[str, set[str]] = defaultdict(set)
    for row in influences(attribution):
        queries[row["document_id"]].add(row["query_id"])
    many = {name: len(of) for name, of in queries.items() if len(of) > 1}
    assert many, "the tiny project has no such document: the test shows nothing"
    assert {r["document_id"]: r["n_queries"] for r in ask(attribution, "influential_across_queries")} == many


def test_little_support_is_measured_against_random_documents(attribution: Attribution) -> None:
    random: dict[str, list[float]] = defaultdict(list)
    for row in attribution.samples.to_pylist():
        random[row["query_id"]].append(row["score"])
    best: dict[str, float] = defaultdict(lambda: -math.inf)
    for row in influences(attribution):
        best[row["query_id"]] = max(best[row["query_id"]], row["score"])
    rows = ask(attribution, "queries_with_little_support")
    for row in rows:
        scores = random[row["query_id"]]
        mean = sum(scores) / len(scores)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
        expected = (best[row["query_id"]] - mean) / deviation
        assert row["deviations_above_random"] == pytest.approx(expected, rel=1e-3)
    above = [row["deviations_above_random"] for row in rows]
    assert above == sorted(above)


def test_cost_of_runs_names_both(attribution: Attribution) -> None:
    newest, older = ask(attribution, "cost_of_runs")
    assert newest["run_id"] == attribution.run_id != older["run_id"]
    assert newest["seconds"] == attribution.manifest["seconds"]


def bm25(texts: dict[str, str], words: str) -> dict[str, float]:
    """BM25 written out, over documents whose length is their text's."""
    split = {name: re.findall(r"\w+", text.lower()) for name, text in texts.items()}
    average = sum(map(len, texts.values())) / len(texts)
    scores: dict[str, float] = defaultdict(float)
    for term in set(re.findall(r"\w+", words.lower())):
        holding = [name for name, tokens in split.items() if term in tokens]
        weight = math.log(1 + (len(texts) - len(holding) + 0.5) / (len(holding) + 0.5))
        for name in holding:
            frequency = split[name].count(term)
            scores[name] += weight * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * len(texts[name]) / average))
    return scores


def test_search_is_bm25_joined_to_influence(attribution: Attribution) -> None:
    words = "What is a PLUM, made of loom?"
    expected = bm25({row["id"]: row["text"] for row in documents()}, words)
    found = ask(attribution, f"SELECT document_id, match FROM search('{words}') WHERE stage = 'pretrain'")
    assert {row["document_id"]: row["match"] for row in found} == pytest.approx(expected, rel=1e-6)
    rows = ask(attribution, "search_and_influence", words="plum")
    assert len(rows) == 4
    plum = {row["document_id"]: row["total_score"] for row in rows}
    for row in influences(attribution):
        if row["query_id"] == "q-plum" and row["document_id"] in plum:
            assert plum[row["document_id"]] is not None
    assert ask(attribution, "search_and_influence") == []
    with pytest.raises(InputError, match=r"no parameter \$word in this statement; it has words"):
        ask(attribution, "search_and_influence", word="plum")


def test_what_changed(tmp_path: Path) -> None:
    write_corpus(tmp_path, "pretrain", 4)
    folder = tmp_path / "corpus" / "pretrain"
    table = pq.read_table(folder / "documents-00000.parquet")
    rows = table.to_pylist()[1:]  # pr-0000 leaves
    rows[0]["fingerprint"] = "another text"
    rows.append({**rows[1], "document_id": "new"})
    pq.write_table(table.from_pylist(rows, schema=table.schema), folder / "documents-00001.parquet")
    entry = storage.read_json(folder / "manifest.json")
    for number, (name, parent) in enumerate((("g1", None), ("g2", "g1"))):
        shard = {**entry["shards"][0], "documents": f"documents-{number:05d}.parquet"}
        storage.write_json(folder / f"manifest-{name}.json", {**entry, "shards": [shard]})
        storage.write_json(tmp_path / "generations" / name / "manifest.json", {
            "generation": name, "created": f"2026-01-0{number + 1}T00:00:00+00:00", "parent": parent,
            "corpus": "c", "factors": {}, "n_sequences": 4, "index_bytes": 1, "seconds": 1.0, "recall": {},
            "settings": {}, "corpora": {"pretrain": f"corpus/pretrain/manifest-{name}.json"},
        })  # fmt: skip
    storage.write_text(tmp_path / "generations" / "CURRENT", "g2\n")
    storage.write_json(folder / "manifest.json", {**entry, "shards": [shard]})
    catalog.publish(tmp_path)
    changed = {"pr-0000": "removed", "pr-0001": "changed", "new": "added"}
    found = catalog.query(tmp_path, "what_changed").to_pylist()
    assert {row["document_id"]: row["change"] for row in found} == changed
    same = catalog.query(tmp_path, "what_changed", {"before": "g1", "after": "g2"}).to_pylist()
    assert same == found
    back = catalog.query(tmp_path, "what_changed", {"before": "g2", "after": "g1"}).to_pylist()
    assert {row["document_id"]: row["change"] for row in back} == {**changed, "pr-0000": "added", "new": "removed"}
    unknown: list[dict[str, str]] = [{"before": "g9"}, {"after": "g9"}, {"after": "g1"}]  # g1 is the first
    assert [catalog.query(tmp_path, "what_changed", names).num_rows for names in unknown] == [0, 0, 0]
    (tmp_path / "generations" / "g1" / "manifest.json").unlink()  # pruned
    catalog.publish(tmp_path)
    assert catalog.query(tmp_path, "what_changed").num_rows == 0


def test_rows_go_to_the_terminal_and_to_files(attribution: Attribution, tmp_path: Path) -> None:
    top = catalog.query(attribution.folder.parents[1], "top_documents")
    words = catalog.query(attribution.folder.parents[1], "search_and_influence", {"words": "plum"})
    for name, table in (("top", top), ("words", words)):
        write_rows(table, tmp_path / f"{name}.parquet")
        assert pq.read_table(tmp_path / f"{name}.parquet").equals(table)
        write_rows(table, tmp_path / f"{name}.csv")
        with open(tmp_path / f"{name}.csv", encoding="utf-8") as handle:
            found = list(csv.DictReader(handle))
        assert [row["document_id"] for row in found] == table["document_id"].to_pylist()
    assert json.loads(found[0]["terms"]) == ["plum"]
    with pytest.raises(InputError, match=r"ends in \.csv or \.parquet"):
        write_rows(top, tmp_path / "x.xlsx")
    terminal, pipe = (
        PlainConsole(file=io.StringIO(), width=80, force_terminal=t, color_system=None) for t in (True, False)
    )
    for console in (terminal, pipe):
        print_rows(top, console)
        assert top["document_id"][0].as_py() in console.file.getvalue()
    assert max(map(len, terminal.file.getvalue().splitlines())) <= 80 < max(map(len, pipe.file.getvalue().splitlines()))


READER = """
import sys, duckdb
from pathlib import Path
folder = Path(sys.argv[1]) / "catalog"
print("ready", flush=True)
for line in sys.stdin:
    with duckdb.connect(str(folder / (folder / "CURRENT").read_text().strip()), read_only=True) as connection:
        print(connection.execute("SELECT count(*) FROM runs").fetchone()[0], flush=True)
"""


def test_another_process_reads_while_this_one_writes(attribution: Attribution) -> None:
    """What the `duckdb` shell, Python and a BI tool do: open the current file read-only, any time."""
    workspace = attribution.folder.parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(workspace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for _ in range(5):
            reader.stdin.write("\n")
            reader.stdin.flush()
            catalog.publish(workspace)  # while it reads
            assert reader.stdout.readline() == "2\n"
        reader.stdin.close()
    assert reader.returncode == 0
