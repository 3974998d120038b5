"""Incremental rebuilds: what is copied, what is computed, how far the factors have drifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msif_core import corpus, dealing, index, storage
from msif_core.batching import Sequences
from msif_core.pipeline import Pipeline
from msif_core.sketch import Sketcher
from tests.tiny_project import change, column, documents, manifest, rewrite


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
    known = dealing.shard_of("again", 2) == dealing.shard_of("d07", 2)
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


def test_another_number_of_shards_still_finds_them(
    project: Path, sketched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(project, corpus={"shard_sequences": 12}).run()
    sketched.clear()
    read: list[Path] = []
    original = index.read_codes
    monkeypatch.setattr(index, "read_codes", lambda trained, path: read.append(path) or original(trained, path))
    for target, shards in ((3, 16), (24, 2)):
        read.clear()
        built = manifest(change(project, corpus={"shard_sequences": target}).run())
        assert len(built["codes"]) == shards
        assert sketched == []
        assert built["changes"]["sequences"] == {"sketched": 0, "reused": 48, "removed": 0}
        assert len(read) <= 16, "once for each pair of shards that share documents"


def test_a_publish_is_of_one_version_of_the_corpus(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_config(project)
    pipeline.run()
    rewrite(project, 47)
    pipeline.tokenize("pretrain")
    original, read = Pipeline.index_shard, []

    def index_shard(self: Pipeline, shard: int) -> Path:
        """And at the first one, somebody else tokenizes other documents."""
        path = original(self, shard)
        if self.corpus_manifest("pretrain") not in read:
            read.append(self.corpus_manifest("pretrain"))
            rewrite(project, 40)
            Pipeline.from_config(project).tokenize("pretrain")
        return path

    monkeypatch.setattr(Pipeline, "index_shard", index_shard)
    built, root = manifest(pipeline.publish_generation()), pipeline.workspace.root
    assert len(read) == 1
    assert built["n_sequences"] == 47
    _, entries = corpus.shard_entries(root / built["corpora"]["pretrain"])
    assert [Path(path).stem for path in built["codes"]] == [Path(entry["sequences"]).stem for entry in entries]
    assert len(storage.read_json(root / built["lexical"] / "documents.json")) == 47
    assert pipeline.sequence_count("pretrain") == 40, "what the next build is of"


def test_codes_of_another_trained_index_are_not_copied(project: Path) -> None:
    pipeline = change(project, index={"kind": "rabitq"})
    pipeline.run()
    trained = pipeline.codes_folder() / "trained.faiss"
    before = trained.read_bytes()
    first = [str(row["id"]) for row in documents() if dealing.shard_of(str(row["id"]), 2) == 0]
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
        rows = column(pipeline, "select document_id from quarantine", "document_id")
        assert rows == ["d10"], f"build {step}: once, whatever lies about from builds before"
        same = next(
            f"d{i:02d}" for i in range(48) if i != 10 and dealing.shard_of(f"d{i:02d}", 2) == dealing.shard_of("d10", 2)
        )
        rewrite(project, **{same: "sage: something else."})


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


def test_drift_is_noise_at_first_and_grows_with_the_corpus(project: Path) -> None:
    pipeline = Pipeline.from_config(project)
    first = manifest(pipeline.run())["drift"]
    assert first["sequences"] == 48
    assert first["difference"] < 3 * first["noise"]
    assert first["trace"] == pytest.approx(1, abs=0.5)
    rewrite(project, 1, **{f"x{i}": str(i) for i in range(1000, 1060)})  # short and all different
    second = manifest(pipeline.run())["drift"]
    assert second["difference"] > 2 * first["difference"]
    assert second["difference"] > 3 * second["noise"]
    assert set(second["maps"]) == {m.name for m in pipeline.maps("pretrain")}
    assert manifest(change(project, index={"drift_sample": 0}).run())["drift"] == {}


def test_copies_of_a_document_are_no_drift_and_no_more_than_their_share(project: Path) -> None:
    """Their labels are drawn once, so that the noise is that of one document, and not of as many."""
    rewrite(project, **{f"copy{i}": "kite kite gull kite gull kite" for i in range(60)})
    drift = manifest(change(project, index={"drift_sample": 40}, curvature={"seed": 1}).run())["drift"]
    assert drift["sequences"] == 40
    assert drift["difference"] < 3 * drift["noise"]


def test_the_trace_is_the_mean_squared_gradient(project: Path) -> None:
    """Rotations keep norms: today's trace is the mean of |G|^2, over the sample's own labels."""
    from msif_core import drift
    from msif_core.batching import batches
    from msif_core.capture import capture
    from msif_core.curvature.fit import EIGENVALUE_SEED
    from msif_core.losses import sampled_loss
    from msif_core.rows import Rows

    pipeline = Pipeline.from_config(project)
    measured = manifest(pipeline.run())["drift"]["maps"]
    sequences = [corpus.read_shard(path) for path in pipeline.shards("pretrain")]
    squares: dict[str, float] = {}
    for part in sequences:
        for batch in batches(part, 1, pipeline.device):

            def add(m: Any, captured: Rows) -> None:
                gradient = torch.einsum("ntgb,nti->ngbi", captured.d, captured.a)
                squares[m.name] = squares.get(m.name, 0) + float(gradient.square().sum()) / 48

            loss = sampled_loss("causal_lm", drift.SAMPLE_SEED + EIGENVALUE_SEED)
            capture(pipeline.model("pretrain"), pipeline.maps("pretrain"), batch, loss, add)
    for name, values in measured.items():
        pinned = float(pipeline.factors("pretrain")[name].eigenvalues.sum())
        assert values["trace"] * pinned == pytest.approx(squares[name], rel=1e-3)
