"""Summaries for the UI as markdown, and steps on a terminal."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from flows.plain_console import PlainConsole
from flows.terminal import Lines, quiet_log, steps_shown
from msif_core.attribution import Attribution
from msif_core.errors import InputError
from tasks import progress, summary
from tests.workspace_fixture import RECALL, write_workspace

DRIFT = {"trace": 1.1, "difference": 0.2, "noise": 0.1}


def columns(text: str) -> list[int]:
    """Cells of each table line; a `\\|` is no border."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]


def test_generation(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {
        "generation": "g2", "parent": "g1", "n_sequences": 12345, "index_bytes": 2e6, "seconds": 3.25, "recall": RECALL,
        "factors": {"pretrain": "f1"},
        "tokens": {
            "pretrain": {"max_length": 2048, "unknown": {"share": 0.0123, "document": "d|1", "example": "☃"}},
            "finetune": {"max_length": 128, "unknown": None},
        },
        "changes": {"documents": {"added": 3, "removed": 1}, "sequences": {"sketched": 7, "removed": 1}},
        "drift": {"sequences": 256, **DRIFT, "maps": {"layers.0.dense": {**DRIFT, "difference": 0.5}}},
    }  # fmt: skip
    text = summary.generation(manifest, "incremental, factors kept", tmp_path, published=False)
    assert "Incremental, factors kept" in text
    assert "| published | **no** |" in text
    assert "| sequences | 12,345 |" in text
    assert "| documents | 3 | 1 | – |" in text
    example = "1.23% unknown to the tokenizer, for example '☃' of 'd\\|1'"
    assert f"| tokens of pretrain | sequences of at most 2,048 tokens; {example} |" in text
    assert "| tokens of finetune | sequences of at most 128 tokens |" in text
    assert "## What retrieval finds\n\nThe gradient index finds more than chance.\n" in text
    assert "|  |  | 10 (1.0%) | 20 (2.0%) |" in text
    assert "| taken (chance) | words | 1.0% | 2.0% |" in text
    assert "| exact top ten | gradients | 80.0% ±1.0 | 90.0% ±1.0 |" in text
    assert "correlation 0.9 (0.8 to 0.95), slope 1 (0.7 to 1.2), noise 0.2 (0.1 to 0.5)" in text
    assert "1 of the queries has none" in text
    assert "| all maps, 256 sequences | 1.10 | 0.20 | 0.10 |" in text
    assert "| layers.0.dense | 1.10 | 0.50 | 0.10 |" in text
    assert tmp_path.as_uri() in text
    bare = summary.generation({**manifest, "changes": None, "drift": {}, "recall": {}}, "", tmp_path, True)
    assert "What changed" not in bare
    assert "bytes per sequence" in text
    assert "bytes per sequence" not in bare, "what is not known is left out"
    assert "What retrieval finds" not in bare
    poor = {**RECALL, "verdict": "chance", "told": "No more than chance."}
    assert "**No more than chance.**" in summary.generation({**manifest, "recall": poor}, "", tmp_path, True)
    earlier = {"queries": 20, "sequences": 1000, "bytes_per_sequence": 4096, "recall_at_10": {"0.02": 0.9}}
    told = summary.generation({**manifest, "recall": earlier}, "", tmp_path, True)
    assert "What retrieval finds" not in told, "a generation that an earlier version measured is shown without"


def test_attribution(tmp_path: Path) -> None:
    found = Attribution.open(write_workspace(tmp_path) / "attributions" / "20260101-000000-aaaaaa")
    text = summary.attribution(found, tmp_path / "page.html")
    assert "3 queries, 60 sequences scored exactly" in text
    assert 'Define the word "periselene".' in text
    assert "&lt;b>red water&lt;/b>" in text, "what a query says is no markup"
    assert set(columns(text)) == {7}
    assert text.count("| proponent | 1 |") == 2
    for name, document in found.documents.items():
        found.documents[name] = replace(document, text="")
    assert summary.attribution(found, tmp_path / "page.html").count("| proponent | 1 |") == 2, "tokens have no text"


def test_cells_cannot_break_a_table() -> None:
    text = summary.table(("a", "b"), [("x|y\nz", "*_#<script>"), ("kept", "")])
    assert columns(text) == [3, 3, 3, 3]
    assert "<script>" not in text


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with steps_shown(PlainConsole(file=output, width=100)), progress.whole("tokenize pretrain"):
        pass
    assert output.getvalue() == "tokenize pretrain: done in 0 s\n"
    lines = Lines(PlainConsole(file=output, width=100), every=0.0)
    for done in range(3):
        lines("sketch", done, 2)
    assert "sketch: 1 of 2 after 0 s, about 0 s left" in output.getvalue()
    assert output.getvalue().endswith("sketch: done in 0 s (2 of 2)\n")


def test_bars_on_a_terminal() -> None:
    output = io.StringIO()
    with steps_shown(PlainConsole(file=output, width=100, force_terminal=True)):
        for done in range(4):
            progress._listener("exact scores", done, 3)
    assert "exact scores" in output.getvalue()
    assert "3/3" in output.getvalue()
    progress._listener("nobody listens any more", 0, 1)
    assert "nobody" not in output.getvalue()


def test_the_terminal_hears_warnings_and_no_mistake_twice() -> None:
    output = io.StringIO()
    handler = PrefectConsoleHandler(stream=output)
    logger = logging.getLogger("prefect.test_quiet")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with quiet_log():
            logger.info("noise")
            logger.warning("worth saying")
            try:
                raise InputError("the user's mistake")
            except InputError:
                logger.exception("Encountered exception during execution")
        logger.info("afterwards")
    finally:
        logger.removeHandler(handler)
    assert "worth saying" in output.getvalue()
    assert "afterwards" in output.getvalue()
    assert not re.search("noise|mistake", output.getvalue())


def test_gather_keeps_the_order_shows_every_result_and_stops_at_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Future:
        def __init__(self, value: int) -> None:
            self.value = value

        def result(self, *_: Any, **__: Any) -> int:
            if self.value < 0:
                raise InputError("a bad shard")
            return self.value

    submitted: list[int] = []

    def submit(part: int) -> Any:
        submitted.append(part)
        return Future(part)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(progress, "step", lambda name: lambda done, total: seen.append((done, total)))
    monkeypatch.setattr(progress, "as_completed", lambda futures: iter(sorted(futures, key=lambda f: -f.value)))
    assert progress.gather("x", submit, [3, 5, 4], at_once=2) == [3, 5, 4]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    submitted.clear()
    with pytest.raises(InputError, match="a bad shard"):
        progress.gather("x", submit, [1, -1, 2])
    assert submitted == [1, -1]  # nothing is begun after the failure
    assert progress.gather("x", submit, []) == []
