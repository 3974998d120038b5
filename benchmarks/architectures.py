"""The table of docs/architectures.md: of every class of `AutoModelForCausalLM`, what is tracked, and whether exactly.

`python -m benchmarks.architectures > docs/architectures.md` takes some ten minutes; model types as arguments make their
rows alone.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks.exactness import ROOMY, Comparison, compare, random_sequences
from benchmarks.small_models import (
    ENCODERS,
    VOCAB,
    causal_classes,
    default_config,
    small_config,
    small_model,
    without_weights,
)
from msif_core.config import CurvatureSettings
from msif_core.coverage import UNREACHED, Coverage, coverage_of
from msif_core.tracking import tracked_maps

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""A gradient may differ by so much, relative to its map's largest entry: many classes compute a part in float32."""

NAMED = 0.005
"""Share of the parameters from which on what is not tracked is named."""

NOT_ALONE = {
    "gemma3n": "its vision part needs timm; its text part is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "a decoder of audio, made only within MusicgenForConditionalGeneration",
    "musicgen_melody": "a decoder of audio, made only within MusicgenMelodyForConditionalGeneration",
}
"""By model type, why transformers makes no model of the configuration alone."""

NOT_CAUSAL = {"cpmant", "xlnet"}
"""Model types whose logits depend on later tokens."""

NOT_TRIED = {"reformer": "runs in training mode only on lengths that fit its axes"}
"""By model type, why no small model is compared."""

ONE_BY_ONE = {"blt", "xlnet"}
"""Model types whose maps are not known without weights, or read rows in another order: one sequence at a time."""

HEAD = """# Architectures

Every class that `transformers` {version} loads as a causal language model, made by
`python -m benchmarks.architectures > docs/architectures.md`. *Tracked* is the share of the parameters that a text
reaches outside embeddings and head, *maps* their number (each expert has its own), both at the default configuration.
*Exact*: on a small model of the class with random weights in float64 (float32 where it gives no numbers in float64),
each sequence's gradients, captured in a padded batch, are autograd's of the sequence alone, map by map.

| Model type | Class | Tracked | Maps | Not tracked | Exact |
|---|---|---:|---:|---|---|"""


@dataclass(frozen=True)
class Tried:
    """A small model's comparison, and the dtype in which it gave numbers."""

    comparison: Comparison
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether captured gradients are autograd's, and the logits the class's own."""
        errors = (self.comparison.logits, self.comparison.gradients)
        return all(error < TOLERANCE[self.dtype] for error in errors)

    @property
    def causal(self) -> bool:
        """Whether logits do not depend on later tokens."""
        return self.comparison.later < TOLERANCE[self.dtype]


def try_small(config: type) -> Tried:
    """Compare a small model of the class with brute force; its maps are those of the model without weights."""
    maps = tracked_maps(without_weights(small_config(config)), CurvatureSettings())
    batch_tokens = 1 if config.model_type in ONE_BY_ONE else ROOMY  # type: ignore[attr-defined]
    for dtype in TOLERANCE:
        try:
            comparison = compare(small_model(config, dtype=dtype), maps, random_sequences(4, VOCAB), batch_tokens)
        except RuntimeError:  # a dtype of the class's own
            if dtype == torch.float32:
                raise
            continue
        if comparison.gradients == comparison.gradients:
            break
    return Tried(comparison, dtype)


def cover(config: type) -> tuple[Coverage, int]:
    """Coverage and number of maps at the default configuration."""
    model = without_weights(default_config(config))
    maps = tracked_maps(model, CurvatureSettings())
    return coverage_of(model, maps), len(maps)


def left_out(coverage: Coverage) -> str:
    """What is not tracked, in a few words."""
    rest = [u for u in coverage.untracked if u.reason != UNREACHED and u.parameters > NAMED * coverage.parameters]
    words = [f"`{_end(u.name)}`: {u.reason} ({u.parameters / coverage.parameters:.1%})" for u in rest[:3]]
    unreached = sum(u.parameters for u in coverage.untracked if u.reason == UNREACHED)
    if unreached > NAMED * coverage.parameters:
        largest = next(u for u in coverage.untracked if u.reason == UNREACHED)
        share = unreached / (unreached + coverage.parameters)
        words.append(f"{UNREACHED}: {share:.0%} of the model, such as `{_end(largest.name)}`")
    return "; ".join(words)


def _end(name: str) -> str:
    """The last two parts of a parameter's name."""
    return ".".join([part for part in name.split(".") if part not in ("*", "weight")][-2:])


def confirmed(config: Any) -> str:
    """The last column."""
    name = config.model_type
    if name in NOT_TRIED:
        return f"not tried: {NOT_TRIED[name]}"
    tried = try_small(config)
    if not tried.causal:
        return "not causal"
    words = [] if tried.exact else [f"no: {tried.comparison.gradients:.0e}"]
    words += ["yes"] if tried.exact else []
    words += ["float32"] if tried.dtype == torch.float32 else []
    words += ["with is_decoder: true"] if name in ENCODERS else []
    words += ["with causal: true"] if name == "xlm" else []
    return ", ".join(words)


def row(config: Any, model: type) -> str:
    """A row of the table."""
    name = config.model_type
    if name in NOT_ALONE:
        return f"| {name} | {model.__name__} | | | {NOT_ALONE[name]} | |"
    coverage, maps = cover(config)
    return (
        f"| {name} | {model.__name__} | {coverage.share:.1%} | {maps:,} | {left_out(coverage)} | {confirmed(config)} |"
    )


def main(names: list[str]) -> None:
    """Print the table, or the rows of some model types."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if not names:
        print(HEAD.format(version=transformers.__version__))
    for config, model in causal_classes():
        if not names or config.model_type in names:
            print(row(config, model), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
