"""The command line against a real local server: build, ask, change documents, rebuild, roll back, prune."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client

from flows.cli import main
from flows.server import limit_accelerator, server
from msif_core import storage
from msif_core.pipeline import Pipeline
from tasks import ACCELERATOR
from tests.e2e.serving import wait_for
from tests.tiny_project import documents, write_project, write_records

Msif = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def msif(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Msif:
    """The command line, in this process: imports and models are loaded once."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["msif", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def url(config: Path) -> Iterator[str]:
    with server(config.parent / "workspace") as address:
        yield address


def published(config: Path) -> str:
    return (config.parent / "workspace" / "generations" / "CURRENT").read_text().strip()


def modified(config: Path) -> dict[str, int]:
    root = config.parent / "workspace"
    kinds = ("factors", "codes", "corpus", "exact")
    return {str(p): p.stat().st_mtime_ns for kind in kinds for p in (root / kind).rglob("*") if p.is_file()}


def test_a_shared_server_keeps_the_higher_limit(url: str) -> None:
    with get_client(sync_client=True) as client:
        limit_accelerator(4)
        limit_accelerator(1)
        assert client.read_concurrency_limit_by_tag(ACCELERATOR).concurrency_limit == 4


def test_story(config: Path, url: str, msif: Msif) -> None:
    root = config.parent
    workspace = root / "workspace"

    first = msif("run", config)
    assert first.returncode == 0, first.stderr
    generation = published(config)
    before = modified(config)
    assert {p.suffix for p in (workspace / "codes").rglob("shard-*")} == {".faiss", ".sha256", ".json"}

    again = msif("run", config)
    assert again.returncode == 0, again.stderr
    assert "Nothing changed" in again.stdout
    assert published(config) == generation
    assert modified(config) == before, "a second run writes nothing anew"

    victim = next((workspace / "codes").rglob("shard-00001*.faiss"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
    assert msif("run", config).returncode == 0
    assert victim.read_bytes() == whole, "a corrupt shard is built again, byte for byte"
    runs = "select name, count(*) from task_run where name like 'sketch-shard-%' group by name order by name"
    with sqlite3.connect(f"file:{workspace / 'server' / 'prefect.db'}?mode=ro", uri=True) as database:
        expected = [("sketch-shard-00000", 1), ("sketch-shard-00001", 2)]  # a shard that stands is no task
        wait_for(lambda: database.execute(runs).fetchall() == expected, seconds=30)

    answer = msif("attribute", config, "--queries", root / "queries.jsonl", "--out", root / "out.parquet")
    assert answer.returncode == 0, answer.stderr
    assert "Stored:" in answer.stdout
    influences = pq.read_table(root / "out.parquet").to_pylist()
    run = influences[0]["run_id"]
    assert (workspace / "attributions" / run / "page.html").exists()

    write_records(root / "odd.jsonl", [{"id": "odd", "prompt": "### [/INST] kite?", "completion": "[/b]"}])
    odd = msif("attribute", config, "--queries", root / "odd.jsonl")
    assert odd.returncode == 0, odd.stderr
    assert "odd  →  [/b]" in odd.stdout, "markup is printed, not followed"

    exact = msif("score", config, "--queries", root / "queries.jsonl", "--documents", root / "documents.jsonl",
                 "--out", root / "scores.npy")  # fmt: skip
    assert exact.returncode == 0, exact.stderr
    scores = np.load(root / "scores.npy")
    queries = [json.loads(line)["id"] for line in (root / "queries.jsonl").read_text().splitlines()]
    names = [row["id"] for row in documents()]
    assert scores.shape == (len(queries), len(names))
    for row in influences:
        expected = scores[queries.index(row["query_id"]), names.index(row["document_id"])]
        assert row["score"] == pytest.approx(float(expected), rel=1e-4, abs=1e-7)

    counted = msif("sql", config, "select count(*) as n from documents")
    assert counted.returncode == 0, counted.stderr
    assert "56" in counted.stdout  # both stages
    refused = msif("sql", config, "drop table runs")
    assert refused.returncode == 2
    assert "msif:" in refused.stderr
    page = msif("report", config, run)
    assert page.returncode == 0, page.stderr

    changed = [row for row in documents() if row["id"] != "d03"]
    changed.append({"id": "new", "text": "heron: a thing called heron, made of water."})
    write_records(root / "documents.jsonl", changed)
    rebuilt = msif("rebuild", config)
    assert rebuilt.returncode == 0, rebuilt.stderr
    printed = " ".join(rebuilt.stdout.split())
    assert "Incremental, factors kept; documents: 1 added, 0 changed, 1 removed" in printed
    assert "sequences: 1 sketched, 47 reused, 1 removed" in printed
    assert published(config) != generation
    factors = {p: t for p, t in modified(config).items() if "/factors/" in p}
    assert factors == {p: t for p, t in before.items() if "/factors/" in p}, "factors stay pinned"
    present = msif("sql", config, "select document_id from documents where document_id in ('d03', 'new')")
    assert "new" in present.stdout
    assert "d03" not in present.stdout

    second = published(config)
    assert msif("rollback", config).returncode == 0
    assert published(config) == generation
    present = msif("sql", config, "select document_id from documents where document_id in ('d03', 'new')")
    assert "d03" in present.stdout
    assert "new" not in present.stdout, "SQL sees the documents of the published generation"
    old = msif("attribute", config, "--queries", root / "queries.jsonl", "--out", root / "old.parquet")
    assert old.returncode == 0, old.stderr
    ranked = ("query_id", "document_id", "sequence_id", "score")
    rows = [[row[key] for key in ranked] for row in pq.read_table(root / "old.parquet").to_pylist()]
    assert rows == [[row[key] for key in ranked] for row in influences], "the generation before answers as it did"
    assert msif("rollback", config).returncode == 2
    again = msif("rebuild", config)
    assert f"`msif rollback CONFIG --to {second}` publishes it" in " ".join(again.stdout.split())
    assert published(config) == generation, "a rebuild does not undo a rollback"
    assert msif("rollback", config, "--to", second).returncode == 0
    assert published(config) == second
    pruned = msif("prune", config, "--keep", "1", "--grace-hours", "0")
    assert pruned.returncode == 0, pruned.stderr
    assert [p.name for p in (workspace / "generations").iterdir() if p.is_dir()] == [second]
    assert not list((workspace / "factors").glob("*/partial"))
    assert msif("attribute", config, "--queries", root / "queries.jsonl").returncode == 0

    with sqlite3.connect(f"file:{workspace / 'server' / 'prefect.db'}?mode=ro", uri=True) as database:
        states = "select distinct state_type from task_run"  # recorded once a second
        wait_for(lambda: database.execute(states).fetchall() == [("COMPLETED",)], seconds=30)
        flows = {name for (name,) in database.execute("select name from flow")}
    assert {"build-index", "fit-ekfac", "tokenize-corpus", "sketch-and-publish", "attribute", "rebuild-index"} <= flows


def test_two_workers_build_what_the_library_builds(config: Path, url: str, msif: Msif, tmp_path: Path) -> None:
    """Threads share a stage's model: a pass that reads another's activations would show here."""
    built = []
    for name in ("flow", "library"):
        settings = json.loads(config.read_text()) | {"workspace": str(tmp_path / name)}
        settings["corpus"]["shard_sequences"] = 6
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(settings))
        if name == "flow":
            assert msif("run", path).returncode == 0
        else:
            Pipeline.from_config(path).run()
        files = [
            p for kind in ("factors", "codes", "exact") for p in (tmp_path / name / kind).rglob("*") if p.is_file()
        ]
        built.append({p.relative_to(tmp_path / name): storage.file_digest(p) for p in files})
    assert built[0] == built[1]


def test_retraining_keeps_its_trainings_and_goes_on(config: Path, url: str, msif: Msif, tmp_path: Path) -> None:
    size = {"vocabulary": 300, "hidden": 8, "layers": 1, "heads": 1}
    settings = json.loads(config.read_text()) | {
        "workspace": str(tmp_path / "workspace"),
        "retraining": size | {"pool": 12, "subsets": 3, "repeats": 2, "left_out": 3, "left_out_queries": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    first = msif("evaluate", path, "--retrain")
    assert first.returncode == 0, first.stderr
    assert "Against retraining on 3 subsets, 2 of them with two seeds" in first.stdout
    assert "train on subsets" in first.stdout
    assert "train without the best" in first.stdout

    (folder,) = (tmp_path / "workspace" / "evaluations" / "retraining").iterdir()
    losses = sorted(folder.glob("losses-*.parquet"))
    assert len([file for file in losses if "subset" in file.name]) == 5
    assert any("subset" not in file.name for file in losses)
    counted = msif("sql", path, "select count(distinct run) as n from retrained_losses")
    assert str(len(losses)) in counted.stdout

    before = {file: file.stat().st_mtime_ns for file in losses}
    lost = pq.read_table(losses[0]).drop(["seconds"])
    losses[0].unlink()
    again = msif("evaluate", path, "--retrain")
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in losses[1:]} == {f: t for f, t in before.items() if f != losses[0]}
    assert pq.read_table(losses[0]).drop(["seconds"]) == lost, "trained anew to the same bits"


def test_a_wrong_record_is_one_message_and_no_retry(config: Path, url: str, msif: Msif, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "fine"}\n{"id": "b", "text": \n', encoding="utf-8")
    settings = json.loads(config.read_text())
    settings["stages"][0]["documents"] = str(tmp_path / "bad.jsonl")
    settings["workspace"] = str(tmp_path / "workspace")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    failed = msif("run", path)
    assert failed.returncode == 2
    assert "bad.jsonl" in failed.stderr.splitlines()[-1]
    assert "Retrying" not in failed.stderr + failed.stdout
    assert not (tmp_path / "workspace" / "corpus" / "pretrain" / "manifest.json").exists()
