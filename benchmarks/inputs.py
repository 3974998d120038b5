"""Random GPT-NeoX models and sequences of the sizes that the benchmarks compare at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from msif_core import models
from msif_core.batching import Sequences, sequence_fingerprint
from msif_core.curvature.factors import MapFactors
from msif_core.tracking import TrackedMap

VOCABULARY = 2048


def curvature(qkv_split: str = "projection", block_size: int | None = None) -> Any:
    """Curvature settings, the default ones but for these; plain, because a bare GPU machine has no pydantic."""
    return SimpleNamespace(include=".*", track_unembedding=False, block_size=block_size, qkv_split=qkv_split)


@dataclass(frozen=True)
class Size:
    """A model and how much data runs through it."""

    hidden: int
    layers: int
    heads: int
    sequences: int
    queries: int
    tokens: int = 64

    def model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A frozen GPT-NeoX with random weights."""
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden, vocab_size=VOCABULARY, max_position_embeddings=max(2048, self.tokens),
        )  # fmt: skip
        return models.freeze(transformers.GPTNeoXForCausalLM(config).to(device, dtype))

    def data(self, count: int | None = None, seed: int = 0) -> Sequences:
        """Random tokens, all of them targets."""
        tokens = random_tokens(count or self.sequences, self.tokens, seed)
        return as_sequences(tokens)


SIZES = {
    "3 M": Size(hidden=256, layers=4, heads=4, sequences=32, queries=64),
    "10 M": Size(hidden=384, layers=6, heads=6, sequences=32, queries=64),
    "100 M": Size(hidden=768, layers=14, heads=12, sequences=8, queries=8),
}
QUICK = {"0.8 M": Size(hidden=128, layers=4, heads=4, sequences=64, queries=32)}


def random_tokens(count: int, length: int, seed: int) -> np.ndarray:
    """Token ids [count, length]."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, (count, length)).astype(np.int32)


def as_sequences(tokens: np.ndarray) -> Sequences:
    """Rows of token ids as sequences whose every token is a target."""
    rows = list(tokens)
    names = [str(i) for i in range(len(rows))]
    return Sequences(rows, rows, [sequence_fingerprint(r, r) for r in rows], names, np.arange(len(rows)))


def random_factors(maps: list[TrackedMap], device: str = "cpu") -> dict[str, MapFactors]:
    """Reflections as bases, positive eigenvalues: passes cost the same as with fitted ones."""

    @cache
    def basis(width: int) -> torch.Tensor:
        v = torch.nn.functional.normalize(torch.randn(width, device=device), dim=0)
        return torch.eye(width, device=device).addr_(v, v, alpha=-2)

    return {
        m.name: MapFactors(
            basis(m.d_in).clone(),
            basis(m.pieces[1]).repeat(m.pieces[0], 1, 1),
            torch.rand(m.shape, device=device),
        )
        for m in maps
    }
