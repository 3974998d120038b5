"""What is published, what is withheld, what is rolled back, and what queries see meanwhile."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from msif_core import generations, storage
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from tests.tiny_project import asked, change, column, documents, manifest, rewrite, write_project


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is indexed, and that its tests leave so."""
    path = write_project(tmp_path_factory.mktemp("built"))
    Pipeline.from_config(path).run()
    return path


def test_a_build_of_low_recall_is_kept_and_not_published(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    first = pipeline.run()
    rewrite(project, 40)
    assert manifest(first)["recall"]["found"][0]["recall"] < 1
    strict = change(project, index={"min_recall": 1.0})
    second = strict.run()
    assert second != first
    assert strict.workspace.published() == first.name
    assert "below index.min_recall = 1: " in str(generations.withheld(second, strict.config.index))
    assert column(strict, "select generation from generations where published", "generation") == [first.name]
    assert strict.run() == second, "nor is it built again"
    assert strict.attribute(asked(project)).table.num_rows
    prune(strict.workspace, keep=1, grace_seconds=0)
    assert (second / "manifest.json").exists(), "pruning keeps what waits for a decision"
    lenient = change(project, index={"min_recall": 0.0})
    assert lenient.run() == second, "a lower threshold publishes it as it is"
    assert lenient.workspace.published() == second.name


def test_the_same_documents_again_are_another_generation(project: Path) -> None:
    """So that the generation before is always the one that was published before."""
    pipeline = Pipeline.from_config(project)
    one = pipeline.run()
    rewrite(project, 40)
    two = pipeline.run()
    rewrite(project)
    three = pipeline.run()
    assert len({one, two, three}) == 3
    assert manifest(three)["codes"] == manifest(one)["codes"]
    assert manifest(three)["changes"]["sequences"]["sketched"] == 0
    assert pipeline.run() == three
    assert generations.rollback(pipeline.workspace) == two.name
    assert generations.rollback(pipeline.workspace) == one.name
    assert pipeline.run() == one, "which holds what three does"


def test_a_rebuild_does_not_undo_a_rollback(project: Path) -> None:
    """A nightly rebuild of the same documents leaves the generation that was rolled back alone; others go on."""
    pipeline = Pipeline.from_config(project)
    one = pipeline.run()
    rewrite(project, 40)
    two = pipeline.run()
    generations.rollback(pipeline.workspace)
    assert pipeline.run() == two
    assert pipeline.workspace.published() == one.name
    reason = str(generations.withheld(two, pipeline.config.index))
    assert reason.endswith(f"`msif rollback CONFIG --to {two.name}` publishes it")
    generations.rollback(pipeline.workspace, to=two.name)
    assert pipeline.workspace.published() == two.name
    generations.rollback(pipeline.workspace)
    rewrite(project, 39)
    three = pipeline.run()
    assert pipeline.workspace.published() == three.name not in (one.name, two.name)


@pytest.mark.parametrize("changed", [{"sketch": {"dimensions": 256}}, {"curvature": {"max_sequences": 10}}])
def test_settings_that_were_rolled_back_are_told_the_way_back(
    project: Path, changed: dict[str, dict[str, int]]
) -> None:
    """A run would withhold them: what answers is the generation's name."""
    pipeline = Pipeline.from_config(project)
    pipeline.run()
    other = change(project, **changed)
    with pytest.raises(InputError, match=r"; run `msif run CONFIG` first$"):
        other.attribute(asked(project))
    second = other.run()
    generations.rollback(pipeline.workspace)
    with pytest.raises(InputError, match=f"; `msif rollback CONFIG --to {second.name}` publishes one of these"):
        other.attribute(asked(project))
    generations.rollback(pipeline.workspace, to=second.name)
    assert other.attribute(asked(project)).table.num_rows


def test_a_rebuild_does_not_undo_two_rollbacks(project: Path) -> None:
    """After another generation the same documents come under another name, which was never published."""
    pipeline = Pipeline.from_config(project)
    one = pipeline.run()
    rewrite(project, 40)
    pipeline.run()
    rewrite(project, 39)
    three = pipeline.run()
    generations.rollback(pipeline.workspace)
    generations.rollback(pipeline.workspace)
    prune(pipeline.workspace, keep=1, grace_seconds=0)
    again = pipeline.run()
    assert again != three
    assert pipeline.workspace.published() == one.name
    generations.rollback(pipeline.workspace, to=again.name)
    assert pipeline.run() == again
    assert pipeline.workspace.published() == again.name


def test_without_words_as_a_source_no_index_of_them_is_built(project: Path) -> None:
    pipeline = change(project, retrieval={"candidates": "gradient"})
    first = pipeline.run()
    assert not (pipeline.workspace.root / "lexical").exists()
    assert pipeline.attribute(asked(project)).table.num_rows
    both = change(project, retrieval={"candidates": "both"})
    with pytest.raises(InputError, match=r"it was built with retrieval\.candidates: gradient"):
        both.attribute(asked(project))
    assert both.run() != first
    assert both.attribute(asked(project)).table.num_rows


def test_another_later_stage_is_another_generation(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    first = pipeline.run()
    settings = json.loads(project.read_text())
    settings["stages"][1]["filter"] = {"kind": "identity"}
    project.write_text(json.dumps(settings))
    other = Pipeline.from_config(project)
    second = other.run()
    assert second != first
    assert manifest(second)["codes"] == manifest(first)["codes"]


def test_queries_see_the_published_generation_while_documents_and_factors_change(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    pipeline.run()
    kept = ["query_id", "document_id", "sequence_id", "score"]
    before = pipeline.attribute(asked(project)).table.select(kept)
    rewrite(project, 40, d00="oak: another.", d01="plum: another.")
    pipeline.tokenize("pretrain")
    pipeline.unpin()
    pipeline.covariance_part("pretrain", 0)  # a full build under way
    assert not pipeline.fitted("pretrain")
    answer = pipeline.attribute(asked(project))
    assert answer.table.select(kept).equals(before)
    assert all(answer.documents[name].text == document_text(name) for name in answer.document_ids)
    assert not pipeline.fitted("pretrain"), "nor did the query pin anything"


def test_a_published_generation_that_was_deleted_is_built_again(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    pipeline.run()
    rewrite(project, 40)
    shutil.rmtree(pipeline.run())
    for asking in (lambda: pipeline.attribute(asked(project)), lambda: generations.rollback(pipeline.workspace)):
        with pytest.raises(InputError, match="the published generation is gone; `msif run CONFIG` builds it again"):
            asking()
    pipeline.run()
    assert pipeline.attribute(asked(project)).table.num_rows


@pytest.mark.parametrize("content", ["", '{"recipe": ', "\0"])
@pytest.mark.parametrize("file", ["pins/pretrain.json", "corpus/pretrain/manifest.json", "generations/*/manifest.json"])
def test_a_broken_json_file_is_named_and_a_run_without_it_heals(built: Path, file: str, content: str) -> None:
    pipeline = Pipeline.from_config(built)
    (path,) = pipeline.workspace.root.glob(file)
    before = path.read_text()
    path.write_text(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*; remove it and run `msif run CONFIG`"):
        pipeline.run()
    path.unlink()
    pipeline.run()
    kept = ["fingerprint", "recipe", "factors", "content"]
    found, expected = storage.read_json(path), json.loads(before)
    assert {name: found.get(name) for name in kept} == {name: expected.get(name) for name in kept}
    assert pipeline.attribute(asked(built)).table.num_rows


def document_text(name: str) -> str:
    return next(str(row["text"]) for row in documents() if row["id"] == name)


def test_another_model_is_refused(project: Path) -> None:
    Pipeline.from_config(project).run()
    pipeline = change(project, curvature={"max_sequences": 10})
    with pytest.raises(InputError, match="was built with other factors of stage 'pretrain'"):
        pipeline.attribute(asked(project))
