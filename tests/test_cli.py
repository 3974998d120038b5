"""Commands that need no server: their messages, their exit codes, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flows import cli
from flows.changes import what_changed
from msif_core import catalog, generations, storage
from msif_core.config import IndexSettings
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.workspace import Workspace
from tests.workspace_fixture import write_workspace

RUNNER = CliRunner()


def test_every_command_has_a_help_line() -> None:
    shown = RUNNER.invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    commands = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    }
    expected = "demo run attribute score tokens rebuild sql evaluate plan report rollback prune serve settings"
    assert commands == set(expected.split())
    for name in commands:
        assert name in shown.output


@pytest.fixture
def msif(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["msif", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


def config(folder: Path, **changes: object) -> Path:
    settings = {
        "workspace": str(folder / "workspace"),
        "stages": [{"name": "pretrain", "model": "bigscience/bloom-560m", "documents": "none/*.jsonl"}],
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("command", ["run", "plan", "rollback", "prune", "rebuild", "evaluate"])
def test_a_missing_configuration_is_one_line(
    command: str, msif: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / "none.yaml"
    assert msif(command, path) == (2, f"msif: {path}: no such configuration file\n")


def test_a_wrong_key_is_named(msif: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = config(tmp_path, worksapce="here")
    code, error = msif("run", path)
    assert code == 2
    assert "worksapce: unknown key; known here: workspace, stages, " in error


def test_nothing_published_yet(msif: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = msif("rollback", config(tmp_path))
    assert (code, error) == (
        2, f"msif: {(tmp_path / 'workspace').resolve()}: no index is published yet; run `msif run CONFIG` first\n",
    )  # fmt: skip


def test_evaluate_needs_queries(msif: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = msif("evaluate", config(tmp_path))
    assert code == 2
    assert "set `queries`" in error


def test_a_server_that_does_not_answer_is_named(msif: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        code, error = msif("run", config(tmp_path))
    assert (code, error) == (
        2, "msif: PREFECT_API_URL is http://127.0.0.1:9/api, where nothing answers; start that server, or unset it\n",
    )  # fmt: skip


def test_serve_refuses_a_wrong_schedule_and_a_second_time_before_it_starts_a_server(
    msif: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import serve, server

    monkeypatch.setattr(server, "server", None)
    path = config(tmp_path)
    code, error = msif("serve", path, "--cron", "every night")
    assert (code, error[:38]) == (2, "msif: --cron 'every night': not a sche")
    with serve.alone(tmp_path / "workspace"):
        code, error = msif("serve", path)
    assert (code, "another `msif serve` serves this workspace" in error) == (2, True)


def test_attribute_checks_the_file_to_write_before_it_starts(
    msif: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "orchestrated", None)
    for out in (tmp_path / "none" / "found.parquet", tmp_path):
        found = msif("attribute", config(tmp_path), "--queries", "q.jsonl", "--out", out)
        assert found == (2, f"msif: --out {out}: name a file in a folder that exists\n")


@pytest.mark.parametrize("command", [("run",), ("attribute", "--queries", "q.jsonl"), ("serve",)])
def test_a_workspace_that_is_a_file_is_one_line(
    msif: Callable[..., tuple[int, str]], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "workspace").write_text("a file")
    code, error = msif(command[0], config(tmp_path), *command[1:])
    assert (code, error[: error.index(": a file")]) == (2, f"msif: {tmp_path / 'workspace'}")


def test_plan_refuses_a_wrong_count(msif: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = msif("plan", config(tmp_path), "--sequences", "pretrain=many")
    assert (code, error) == (
        2, "msif: --sequences pretrain=many: expected STAGE=COUNT, for example pretrain=100000\n",
    )  # fmt: skip


def test_score_writes_the_file_that_is_named_or_says_so_before_it_starts(
    msif: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "score", lambda *_: np.ones((1, 2), np.float32))
    arguments = ("score", config(tmp_path), "--queries", "q.jsonl", "--documents", "d.jsonl", "--out")
    assert msif(*arguments, tmp_path / "scores")[0] == 0
    assert np.load(tmp_path / "scores").shape == (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "scores"}
    monkeypatch.setattr(Pipeline, "score", None)
    for out in (tmp_path / "none" / "scores.npy", tmp_path):
        assert msif(*arguments, out) == (2, f"msif: --out {out}: name a file in a folder that exists\n")


def test_rollback_moves_to_the_parent_and_stops_at_the_first(
    msif: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = config(tmp_path)
    workspace = Workspace(write_workspace(tmp_path / "workspace"))
    catalog.publish(workspace.root)
    sql = "select generation from generations where published"
    assert msif("rollback", path)[0] == 0
    assert workspace.published() == "g1"
    assert catalog.query(workspace.root, sql)["generation"].to_pylist() == ["g1"], "the catalog follows"
    assert msif("rollback", path) == (2, "msif: generation g1 is the first; there is none before it\n")
    assert msif("rollback", path, "--to", "g2")[0] == 0
    assert workspace.published() == "g2"
    assert msif("rollback", path, "--to", "g9") == (
        2, "msif: generation g9 is not here or pruned (its manifest is gone); run `msif rebuild CONFIG`\n",
    )  # fmt: skip


def generation(name: str, factors: str = "f", key: str = "k", recall: float = 0.9) -> dict[str, object]:
    changes = {
        "documents": {"added": 1, "changed": 2, "removed": 3},
        "sequences": {"sketched": 4, "reused": 5_000, "removed": 6},
    }
    return {
        "generation": name, "content": name, "factors": {"pretrain": factors}, "codes_key": key, "changes": changes,
        "recall": {"found": [
            {"source": "gradient", "share": 0.01, "recall": 0.1}, {"source": "bm25", "share": 0.02, "recall": 0.1},
            {"source": "gradient", "share": 10 / 503, "recall": recall},
        ]},
    }  # fmt: skip


def test_a_rebuild_says_which_case_it_met() -> None:
    old = generation("old")
    assert what_changed(None, old).startswith("first build")
    assert what_changed(old, old).startswith("nothing changed")
    assert what_changed(old, generation("new", factors="g")).startswith("full build")
    assert what_changed(old, generation("new", key="l")).startswith("all codes anew")
    assert what_changed(old, generation("new")) == (
        "incremental, factors kept; documents: 1 added, 2 changed, 3 removed; sequences: 4 sketched, 5,000 reused, "
        "6 removed; generation new replaces old"
    )


def test_a_rebuild_says_why_it_is_not_published(tmp_path: Path) -> None:
    strict, old, new = IndexSettings(min_recall=0.8), generation("old"), generation("new", recall=0.75)
    storage.write_json(tmp_path / "good" / "manifest.json", generation("new", recall=0.8))
    storage.write_json(tmp_path / "new" / "manifest.json", new)
    assert generations.withheld(tmp_path / "good", strict) is None
    assert what_changed(old, new, generations.withheld(tmp_path / "new", strict)).endswith(
        "recall@10 of the gradient index is 0.750 at 2.0% re-scored, below index.min_recall = 0.8: generation new is "
        "kept but not published, old stays published"
    )


def test_wrong_input_is_not_retried() -> None:
    from prefect.states import Failed

    from tasks import worth_retrying

    assert not worth_retrying(None, None, Failed(data=InputError("wrong")))
    assert worth_retrying(None, None, Failed(data=OSError("busy")))
