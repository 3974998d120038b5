"""Passes over the ranks of torchrun: the shares of the sequences add up, and FSDP changes no result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msif_core import index, models, sharded, tokenizers, torchrun, tracking
from msif_core.config import Config, CurvatureSettings
from msif_core.curvature import fit
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.conftest import make_model, make_sequences
from tests.tiny_project import change, manifest, write_project

RANKS = min(2, torch.cuda.device_count()) or 2
"""Of torchrun: processes on a CPU; on a machine with one GPU, that one over NCCL."""


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (6, 3), (1, 2)])
def test_shares_add_up_and_cut_the_same_batches(count: int, ranks: int) -> None:
    model = make_model("gpt_neox")
    maps = tracking.tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(count)
    options = {"task": "causal_lm", "seed": 3, "batch_tokens": 16}
    whole = fit.covariance_sums(model, maps, sequences, **options)  # type: ignore[arg-type]
    shares = [sharded.share(sequences, rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(ids) for ids in part.input_ids) for part, _ in shares}) == 1
    assert sorted(row for _, rows in shares for row in rows if row >= 0) == list(range(count))
    parts = [fit.covariance_sums(model, maps, part, **options) for part, _ in shares]  # type: ignore[arg-type]
    for name, expected in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), expected)


def test_a_step_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"workspace": tmp_path, "stages": [{"name": "a", "model": "m", "documents": "d"}], "compute": {"ranks": 2}}
    )
    with pytest.raises(InputError, match="attribute: not a step that sharded models run"):
        torchrun.run_step(config, "attribute")


def same_sums(found: list[Path], expected: list[Path]) -> None:
    """Of two processes and of one: equal but for the order of float32 sums."""
    for a, b in zip(found, expected, strict=True):
        sums, whole = load_file(a), load_file(b)
        assert set(sums) == set(whole)
        for name, value in whole.items():
            torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.drill
def test_ranks_fit_sketch_and_score_as_one_process(tmp_path: Path) -> None:
    settings = json.loads(write_project(tmp_path).read_text())
    settings["index"] = {"kind": "flat"}
    one = Pipeline(Config.model_validate(settings | {"workspace": str(tmp_path / "one")}))
    two = Pipeline(Config.model_validate(settings | {"workspace": str(tmp_path / "two"), "compute": {"ranks": RANKS}}))

    def both(step: str, *arguments: str | int) -> tuple[list[Path], list[Path]]:
        return torchrun.run_step(two.config, step, *arguments), getattr(one, step)(*arguments)

    for stage in (stage.name for stage in one.config.stages):
        for pipeline in (one, two):
            pipeline.tokenize(stage)
        same_sums(*both("covariance_part", stage, 0))
        for basis in one.eigenbasis_part(stage, 0):  # eigenvectors of near-equal eigenvalues turn at the least change
            target = two.factors_folder(stage) / basis.name
            target.write_bytes(basis.read_bytes())
            Path(f"{target}.sha256").write_text(Path(f"{basis}.sha256").read_text())
        same_sums(*both("eigenvalue_part", stage, 0))
        for pipeline in (one, two):
            pipeline.combine_eigenvalues(stage)
    found, expected = (np.load(str(path)) for path in both("exact_shard", 0))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
    both("train_index")
    held_out = one.held_out()
    assert held_out is not None
    psi = one.query_sketches(held_out)
    results = [index.Index([Path(str(path))], one.config.index).search(psi, 10) for path in both("index_shard", 0)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-3, atol=1e-4 * float(np.abs(results[1][0]).max()))


STARTS = """
import sys
from msif_core import torchrun
from msif_core.config import Config
config = Config.load(sys.argv[1])
for part in (0, 0):
    print(*torchrun.run_step(config, "covariance_part", "pretrain", part), flush=True)
    print(torchrun._groups[0]._process.pid, torchrun._groups[0]._folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.drill
def test_the_ranks_serve_a_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    pipeline = change(path, compute={"ranks": RANKS})
    pipeline.tokenize("pretrain")
    command = [sys.executable, "-c", STARTS, str(path)]
    for end in (signal.SIGKILL, None):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        sums, first, again, second = (process.stdout.readline().strip() for _ in range(4))
        assert (sums, first) == (again, second)
        pid, folder = first.split()
        assert Path(sums).exists()
        if end is not None:
            process.send_signal(end)
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() or Path(folder).exists():
            assert time.monotonic() < deadline, "torchrun, or its folder, outlives who started it"
            time.sleep(0.1)


@pytest.mark.drill
def test_a_build_by_ranks_is_published_and_stands(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    pipeline = change(path, compute={"ranks": RANKS, "workers": 1})
    command = [str(Path(sys.executable).parent / "msif"), "run", str(path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    published = []
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        published.append(pipeline.workspace.published())
    assert published[0] == published[1] is not None
    recall = manifest(pipeline.workspace.generations / str(published[0]))["recall"]
    assert recall["sequences"] == 48
    assert pipeline.attribute([{"id": "q", "prompt": "What is kite?\n", "completion": "A kite."}]).table.num_rows >= 5


@pytest.mark.drill
def test_a_document_that_is_not_finite_ends_the_step_with_its_name(tmp_path: Path) -> None:
    """On rank 0 too, where one process would set it aside and run the pass again: the others are in the first still."""
    path = write_project(tmp_path)
    config = Config.load(path)
    source = config.stages[0].model
    model, token = (
        models.load_model(source),
        tokenizers.load_tokenizer(source).convert_tokens_to_ids("~"),
    )  # nowhere else
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(source)
    with open(tmp_path / "documents.jsonl", "a", encoding="utf-8") as handle:  # the longest goes to rank 0
        handle.write(json.dumps({"id": "broken", "input_ids": [*range(40, 63), token]}) + "\n")
    pipeline = Pipeline(config.model_copy(update={"compute": config.compute.model_copy(update={"ranks": RANKS})}))
    pipeline.tokenize("pretrain")
    with pytest.raises(InputError, match=r"'broken'.*take the document out"):
        torchrun.run_step(pipeline.config, "covariance_part", "pretrain", 0)
