"""Every kernel path gives one device's results on another: padded rows, and a GPU where there is one.

On a machine with a GPU: `pytest tests/test_devices.py`. Prefect is not asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from msif_core import directions, low_rank, models, scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings, SketchSettings
from msif_core.curvature import fit
from msif_core.curvature.factors import Factors
from msif_core.curvature.filters import Damped, Unrolled
from msif_core.curvature.steps import Fit
from msif_core.products import width
from msif_core.sketch import Sketcher
from msif_core.tracking import tracked_maps
from tests.conftest import VOCAB, make_model, make_sequences, task_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

Found = dict[str, npt.NDArray[np.float64]]
BATCH = 40
"""Tokens of a batch: a few of the test's sequences."""


def moved(model: Any, device: str, dtype: torch.dtype, tf32: bool = False) -> Any:
    """The model there, in that dtype."""
    return models.freeze(model.to(device, dtype), tf32=tf32)


def fitted(model: Any, split: str, folder: Path, task: str, seed: int) -> Path:
    """EK-FAC by the files that a build writes, two parts of the sample; returns its folder."""
    maps = tracked_maps(model, CurvatureSettings(qkv_split=split))  # type: ignore[arg-type]
    steps = Fit(model, maps, folder, task, seed, BATCH, budget_gb=1e-5)
    parts = [make_sequences(6, seed=s, task=task) for s in (seed, seed + 1)]
    for step in (steps.covariances, steps.eigenvalues):
        for part, sequences in enumerate(parts):
            step(part, sequences)
        if step == steps.covariances:
            for part in range(2):
                steps.eigenbases(part, 2, model.device)
    return steps.finish(2)


def both_stages(model: Any, split: str, folder: Path, task: str) -> list[Path]:
    """Folders of the factors of two stages: of one model, and of other sequences."""
    return [fitted(model, split, folder / str(seed), task, seed) for seed in (0, 10)]


def everything(model: Any, task: str, split: str, folders: list[Path]) -> Found:
    """Sums, scores and sketches by every kernel, from the same sequences."""
    maps = tracked_maps(model, CurvatureSettings(qkv_split=split))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    lower, upper = (Factors.open(folder, device=str(device)) for folder in folders)
    chain = Chain((FilteredStage(lower, Damped(0.1)), FilteredStage(upper, Unrolled(2.0))))
    documents, queries = make_sequences(7, 21, task), make_sequences(3, 22, task)
    common: dict[str, Any] = {"task": task, "batch_tokens": BATCH}
    found: dict[str, Any] = {
        f"sum {name}": value for name, value in fit.covariance_sums(model, maps, documents, seed=1, **common).items()
    }
    found["losses"] = scoring.losses(model, documents, BATCH, task=task)

    raw = scoring.query_gradients(model, maps, queries, **common)
    found |= {f"gradient {name}": value for name, value in raw.items()}
    filtered = chain.filter_all(dict(raw))
    rotated = scoring.query_gradients(model, maps, queries, factors=upper, **common)
    again = chain.filter_all(rotated, rotated=True)
    found["scores"] = scoring.score_sequences(model, maps, dict(filtered), documents, **common)
    found["scores of rotated gradients"] = scoring.score_sequences(model, maps, again, documents, **common)
    one = {name: v[:1] for name, v in filtered.items()}
    found["scores of one query"] = scoring.score_sequences(model, maps, dict(one), documents, **common)
    by_map, by_token = scoring.contributions(model, maps, one, documents, **common)
    found["by map"] = np.array([[of[m.name] for m in maps] for of in by_map])
    found["by token"] = np.concatenate(by_token)
    cut = {name: low_rank.cut(v, 1000) for name, v in filtered.items()}
    found["low rank"] = low_rank.score_low_rank(model, maps, cut, documents, **common)

    for whitening in ("balanced", "eigen", "kronecker", "none"):
        settings = SketchSettings(dimensions=512, whitening=whitening)  # type: ignore[arg-type]
        kept = directions.choose(maps, chain, 0.5, 512) if whitening == "balanced" else None
        sketcher = Sketcher(maps, lower, Damped(0.1), settings, task, kept)
        phi = sketcher.documents(model, documents, BATCH, 1.0)
        found[f"estimates, {whitening}"] = sketcher.queries(dict(raw), chain) @ phi.T
    return {
        name: (v.double().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v, dtype=np.float64))
        for name, v in found.items()
    }


def assert_close(found: Found, expected: Found, close: float) -> None:
    """Every result, to that share of its own largest entry."""
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=close, atol=close * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("split", ["none", "head"])
def test_rows_as_an_accelerator_holds_them(
    architecture: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros behind every map's inputs change nothing; the odd widths of these models make some for all of them."""
    task, model = task_of(architecture), make_model(architecture)
    folders = both_stages(model, split, tmp_path / "tight", task)
    expected = everything(model, task, split, folders)
    monkeypatch.setattr("msif_core.products.width", lambda n, _: width(n, torch.device("cuda")))
    assert_close(everything(model, task, split, folders), expected, 1e-6)
    padded = everything(model, task, split, both_stages(model, split, tmp_path / "padded", task))
    assert_close(without_estimates(padded), without_estimates(expected), 1e-6)


def without_estimates(found: Found) -> Found:
    """What does not depend on the signs and order of a decomposition's vectors."""
    return {name: value for name, value in found.items() if not name.startswith("estimates")}


@on_gpu
@pytest.mark.parametrize("split", ["none", "head"])
def test_float64(architecture: str, split: str, tmp_path: Path) -> None:
    """By factors in common, and by each device's own; architectures have float32 parts in their own code."""
    task, cpu, gpu = (
        task_of(architecture),
        make_model(architecture),
        moved(make_model(architecture), "cuda", torch.float64),
    )
    folders = both_stages(cpu, split, tmp_path / "cpu", task)
    expected = everything(cpu, task, split, folders)
    close = 1e-3 if architecture == "bloom" else 1e-5
    assert_close(everything(gpu, task, split, folders), expected, close)
    own = everything(gpu, task, split, both_stages(gpu, split, tmp_path / "gpu", task))
    assert_close(without_estimates(own), without_estimates(expected), close)


@pytest.fixture
def wide() -> Any:
    """Maps wider than a block of the symmetric sums, and odd rows, as biases make them."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=264, num_hidden_layers=2, num_attention_heads=4, intermediate_size=600,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "tf32", "close"),
    [("float32", False, 2e-4), ("float32", True, 1e-2), ("bfloat16", False, 0.1), ("bfloat16", True, 0.1)],
)
def test_narrower_numbers(wide: Any, dtype: str, tf32: bool, close: float, tmp_path: Path) -> None:
    """With factors in common, as near to the CPU's float32 as the numbers' own rounding lets them."""
    wide = moved(wide, "cpu", torch.float32)
    folders = both_stages(wide, "projection", tmp_path, "causal_lm")
    expected = everything(wide, "causal_lm", "projection", folders)
    found = everything(moved(wide, "cuda", getattr(torch, dtype), tf32), "causal_lm", "projection", folders)
    for name, value in found.items():
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < close, (name, error)
