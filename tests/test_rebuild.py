"""Incremental rebuilds: what is copied, what is computed, what is published, what queries see meanwhile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msif_core import corpus, generations, index, storage
from msif_core.batching import Sequences
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.pruning import prune
from msif_core.sketch import Sketcher
from tests.tiny_project import documents, write_project, write_records


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """The tiny project with documents and a workspace of its own."""
    settings = json.loads(trained.read_text()) | {"workspace": str(tmp_path / "workspace")}
    settings["stages"][0]["documents"] = write_records(tmp_path / "documents.jsonl", documents())
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def change(config: Path, **sections: dict[str, Any]) -> Pipeline:
    """The configuration with some settings changed."""
    settings = json.loads(config.read_text())
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    config.write_text(json.dumps(settings))
    return Pipeline.from_config(config)


def rewrite(config: Path, count: int = 48, **texts: str) -> None:
    """The first `count` documents, with other texts for those named."""
    rows = [{**row, "text": texts.pop(str(row["id"]), row["text"])} for row in documents()[:count]]
    write_records(config.parent / "documents.jsonl", rows + [{"id": k, "text": v} for k, v in texts.items()])


def manifest(folder: Path) -> dict[str, Any]:
    return dict(storage.read_json(folder / "manifest.json"))


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Documents of the sequences that are sketched from now on."""
    seen: list[str] = []
    original = Sketcher.documents

    def counted(self: Sketcher, model: Any, sequences: Sequences, *rest: Any) -> Any:
        seen.extend(sequences.document_ids)
        return original(self, model, sequences, *rest)

    monkeypatch.setattr(Sketcher, "documents", counted)
    return seen


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf"])
def test_only_new_and_changed_sequences_are_sketched(project: Path, sketched: list[str], kind: str) -> None:
    pipeline = change(project, index={"kind": kind})
    first = manifest(pipeline.run())
    assert first["changes"] == {
        "documents": {"added": 48, "changed": 0, "removed": 0},
        "sequences": {"sketched": 48, "reused": 0, "removed": 0},
    }
    sketched.clear()
    rewrite(project, 46, d04="heron: something else.", new="fern: a thing.", again=str(documents()[7]["text"]))
    second = manifest(pipeline.run())
    # `again` has the text of d07: where both share a shard, it is known.
    known = corpus.shard_of("again", 2) == corpus.shard_of("d07", 2)
    assert sorted(sketched) == sorted(["d04", "new", *([] if known else ["again"])])
    assert second["changes"] == {
        "documents": {"added": 2, "changed": 1, "removed": 2},
        "sequences": {"sketched": len(sketched), "reused": 48 - len(sketched), "removed": 3},
    }
    assert second["parent"] == first["generation"]
    # Every sequence has the code of its own gradient, under its own id.
    root, target = pipeline.workspace.root, pipeline.target
    found = index.Index([root / path for path in second["codes"]], pipeline.config.index)
    sequences = [corpus.read_shard(path) for path in pipeline.shards(target)]
    phi = [pipeline.document_sketches(part) for part in sequences]
    trained = pipeline.codes_folder() / "trained.faiss"
    for part, path, vectors in zip(sequences, second["codes"], phi, strict=True):
        read = index.read_codes(trained, root / path)
        assert read is not None
        np.testing.assert_array_equal(read[0], part.sequence_ids)
        anew = index.encode(trained, vectors)
        if kind == "flat":
            np.testing.assert_allclose(read[1].view(np.float32), anew.view(np.float32), rtol=1e-3, atol=1e-3)
        else:  # rounding in other batches may turn a bit whose dimension is nearly zero
            assert np.unpackbits(read[1] ^ anew, axis=1).mean(axis=1).max() < 0.05
    assert found.count == 48


def test_exact_scores_of_known_sequences_are_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_config(project)
    pipeline.run()
    scored: list[str] = []
    original = Pipeline.exact_scores

    def counted(self: Pipeline, filtered: Any, sequences: Sequences) -> Any:
        scored.extend(sequences.document_ids)
        return original(self, filtered, sequences)

    monkeypatch.setattr(Pipeline, "exact_scores", counted)
    rewrite(project, 47, d04="heron: something else.")
    pipeline.run()
    assert scored == ["d04"]
    kept = np.concatenate([np.load(pipeline.exact_shard(s)) for s in range(2)], axis=2)
    rows = [corpus.read_shard(path) for path in pipeline.shards("pretrain")]
    names = [name for part in rows for name in part.document_ids]
    queries = pipeline.held_out()
    assert queries is not None
    anew = np.concatenate([pipeline.scores(queries, part) for part in rows], axis=1)
    assert len(names) == 47
    np.testing.assert_allclose(kept[0], anew, rtol=1e-4, atol=1e-6 * np.abs(anew).max())


def test_another_number_of_shards_still_finds_them(project: Path, sketched: list[str]) -> None:
    Pipeline.from_config(project).run()
    sketched.clear()
    pipeline = change(project, corpus={"shard_sequences": 8})
    built = manifest(pipeline.run())
    assert len(built["codes"]) == 6
    assert sketched == []
    assert built["changes"]["sequences"] == {"sketched": 0, "reused": 48, "removed": 0}


def test_codes_of_another_trained_index_are_not_copied(project: Path) -> None:
    pipeline = change(project, index={"kind": "rabitq"})
    pipeline.run()
    trained = pipeline.codes_folder() / "trained.faiss"
    before = trained.read_bytes()
    first = [str(row["id"]) for row in documents() if corpus.shard_of(str(row["id"]), 2) == 0]
    rewrite(project, **{first[0]: "sage: something else."})
    trained.write_bytes(b"damaged")
    built = manifest(pipeline.run())
    assert trained.read_bytes() != before, "trained anew, on another first shard"
    assert built["changes"]["sequences"] == {"sketched": len(first), "reused": 48 - len(first), "removed": 1}


def test_a_broken_gradient_stays_quarantined(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sketcher.documents

    def broken(self: Sketcher, model: Any, sequences: Sequences, *rest: Any) -> Any:
        phi = original(self, model, sequences, *rest)
        phi[[i for i, name in enumerate(sequences.document_ids) if name == "d10"]] = np.nan
        return phi

    monkeypatch.setattr(Sketcher, "documents", broken)
    pipeline = Pipeline.from_config(project)
    for step in range(2):
        built = manifest(pipeline.run())
        assert index.Index([pipeline.workspace.root / p for p in built["codes"]], pipeline.config.index).count == 47
        rows = Sql(pipeline).column("select document_id from quarantine", "document_id")
        assert rows == ["d10"], f"build {step}: once, whatever lies about from builds before"
        same = next(
            f"d{i:02d}" for i in range(48) if i != 10 and corpus.shard_of(f"d{i:02d}", 2) == corpus.shard_of("d10", 2)
        )
        rewrite(project, **{same: "sage: something else."})


class Sql:
    def __init__(self, pipeline: Pipeline) -> None:
        self.root = pipeline.workspace.root

    def column(self, statement: str, name: str) -> list[Any]:
        from msif_core import catalog

        return list(catalog.query(self.root, statement)[name].to_pylist())


# -- publishing ---------------------------------------------------------------------------------------


def test_a_build_of_low_recall_is_kept_and_not_published(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    first = pipeline.run()
    rewrite(project, 40)
    recall = manifest(first)["recall"]["recall_at_10"][generations.RECALL_AT]
    assert recall < 1
    strict = change(project, index={"min_recall": 1.0})
    second = strict.run()
    assert second != first
    assert strict.workspace.published() == first.name
    assert "below index.min_recall = 1: " in str(generations.withheld(second, strict.config.index))
    assert Sql(strict).column("select generation from generations where published", "generation") == [first.name]
    assert strict.run() == second, "nor is it built again"
    assert strict.attribute(asked(project)).table.num_rows
    prune(strict.workspace, keep=1, grace_seconds=0)
    assert (second / "manifest.json").exists(), "pruning keeps what waits for a decision"
    lenient = change(project, index={"min_recall": 0.0})
    assert lenient.run() == second, "a lower threshold publishes it as it is"
    assert lenient.workspace.published() == second.name


def asked(config: Path) -> list[dict[str, Any]]:
    path = Path(json.loads(config.read_text())["queries"])
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def document_text(name: str) -> str:
    return next(str(row["text"]) for row in documents() if row["id"] == name)


def test_another_model_is_refused(project: Path) -> None:
    Pipeline.from_config(project).run()
    pipeline = change(project, curvature={"max_sequences": 10})
    with pytest.raises(InputError, match="was built with other factors of stage 'pretrain'"):
        pipeline.attribute(asked(project))


def test_an_unfinished_fit_does_not_mix_documents(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    for stage in ("pretrain", "finetune"):
        pipeline.tokenize(stage)
    pipeline.covariance_part("pretrain", 0)
    before = pipeline.factors_fingerprint("pretrain")
    rewrite(project, 40)
    pipeline.run()
    assert pipeline.factors_fingerprint("pretrain") != before
    assert pipeline.factors("pretrain").sequences == 40
    finished = pipeline.factors_fingerprint("pretrain")
    rewrite(project)
    pipeline.run()
    assert pipeline.factors_fingerprint("pretrain") == finished, "finished factors stay pinned"


# -- pruning ------------------------------------------------------------------------------------------


def build_three(project: Path) -> tuple[Pipeline, list[Path]]:
    pipeline = Pipeline.from_config(project)
    folders = [pipeline.run()]
    for count in (47, 46):
        rewrite(project, count)
        folders.append(pipeline.run())
    return pipeline, folders


def test_prune_leaves_one_generation_s_files_and_no_others(project: Path) -> None:
    pipeline, folders = build_three(project)
    root = pipeline.workspace.root
    for left in (root / "codes" / ".tmp-1-x", root / "corpus" / "pretrain" / ".tmp-raw-x" / "raw"):
        left.parent.mkdir(exist_ok=True)
        left.write_text("left by a kill")
    before = pipeline.attribute(asked(project)).table
    found = prune(pipeline.workspace, keep=1, grace_seconds=0, dry_run=True)
    assert all(path.exists() for path in found.paths)
    assert prune(pipeline.workspace, keep=1, grace_seconds=0) == found
    assert [p.parent for p in pipeline.workspace.generations.glob("*/manifest.json")] == [folders[2]]
    for kind, pattern, count in (
        ("codes", "shard-*.faiss", 2), ("exact", "*.npy", 2), ("corpus/pretrain", "*.parquet", 6),
        ("corpus/pretrain", "manifest-*.json", 1), ("lexical", "*/documents.json", 1), ("", ".tmp-*", 0),
    ):  # fmt: skip
        assert len(list((root / kind).rglob(pattern))) == count, kind
    names = ["query_id", "document_id", "score"]
    assert pipeline.attribute(asked(project)).table.select(names).equals(before.select(names))
    assert prune(pipeline.workspace, keep=1, grace_seconds=0).paths == ()
    modified = {p: p.stat().st_mtime_ns for kind in ("codes", "exact", "corpus") for p in (root / kind).rglob("*")}
    assert pipeline.run() == folders[2]
    assert modified == {p: p.stat().st_mtime_ns for p in modified}, "nothing was missed"
    with pytest.raises(InputError, match=r"is not here or pruned .its manifest is gone.; run `msif rebuild CONFIG`"):
        generations.rollback(pipeline.workspace)


def test_prune_spares_what_a_query_may_still_read(project: Path) -> None:
    pipeline, folders = build_three(project)
    root = pipeline.workspace.root
    old = time.time() - 7200
    for path in root.rglob("*"):
        os.utime(path, (old, old))
    pipeline.workspace.publish(folders[1].name)  # just now, folders[2] was replaced
    pipeline.workspace.publish(folders[0].name)  # and folders[1]
    prune(pipeline.workspace, keep=1, grace_seconds=3600)
    kept = {path.parent.name for path in pipeline.workspace.generations.glob("*/manifest.json")}
    assert kept == {folder.name for folder in folders}
    for part in (part for folder in folders for part in generations.parts(manifest(folder))):
        assert (root / part).exists(), part


def test_a_half_pruned_generation_is_not_rolled_back_to(project: Path) -> None:
    pipeline, folders = build_three(project)
    (pipeline.workspace.root / manifest(folders[1])["codes"][0]).unlink()
    with pytest.raises(InputError, match=r"is not here or pruned .codes/.*faiss is gone.; run `msif rebuild CONFIG`"):
        generations.rollback(pipeline.workspace)
    assert pipeline.workspace.published() == folders[2].name


# -- drift --------------------------------------------------------------------------------------------


def test_drift_is_noise_at_first_and_grows_with_the_corpus(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    first = manifest(pipeline.run())["drift"]
    assert first["sequences"] == 48
    assert first["difference"] < 3 * first["noise"]
    assert first["trace"] == pytest.approx(1, abs=0.5)
    rewrite(project, 1, **{f"x{i}": "reed " * 20 for i in range(60)})
    second = manifest(pipeline.run())["drift"]
    assert second["difference"] > 2 * first["difference"]
    assert second["difference"] > 3 * second["noise"]
    assert set(second["maps"]) == {m.name for m in pipeline.maps("pretrain")}
    assert manifest(change(project, index={"drift_sample": 0}).run())["drift"] == {}


def test_the_trace_is_the_mean_squared_gradient(project: Path) -> None:
    """Rotations keep norms: today's trace is the mean of |G|^2, over the sample's own labels."""
    from msif_core import drift
    from msif_core.batching import batches
    from msif_core.capture import capture
    from msif_core.curvature.fit import EIGENVALUE_SEED
    from msif_core.losses import sampled_loss

    pipeline = Pipeline.from_config(project)
    measured = manifest(pipeline.run())["drift"]["maps"]
    sequences = [corpus.read_shard(path) for path in pipeline.shards("pretrain")]
    squares: dict[str, float] = {}
    for part in sequences:
        for batch in batches(part, 1):

            def add(m: Any, a: torch.Tensor, d: torch.Tensor) -> None:
                gradient = torch.einsum("ntgb,nti->ngbi", d, a)
                squares[m.name] = squares.get(m.name, 0) + float(gradient.square().sum()) / 48

            loss = sampled_loss("causal_lm", drift.SAMPLE_SEED + EIGENVALUE_SEED)
            capture(pipeline.model("pretrain"), pipeline.maps("pretrain"), batch, loss, add)
    for name, values in measured.items():
        pinned = float(pipeline.factors("pretrain")[name].eigenvalues.sum())
        assert values["trace"] * pinned == pytest.approx(squares[name], rel=1e-3)
