"""The model's own answer to a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from msif_core.forward import PASS


@torch.no_grad()
def complete(
    model: Any,
    prompts: list[list[int]],
    *,
    max_length: int,
    max_new_tokens: int,
    batch_tokens: int,
    ends: Sequence[int | None],
) -> list[list[int]]:
    """Greedy continuations of token prompts, each with its end token where the model gave one.

    `ends` are tokens that end an answer, beside those that the checkpoint names. Prompts of one length go together,
    so that none is padded and an answer does not depend on the others. A prompt that leaves no room below
    `max_length` loses its beginning.
    """
    new = min(max_new_tokens, max_length - 1)
    found = _ends(model, ends)
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=found or None, pad_token_id=found[0] if found else 0
    )
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows_of[min(len(prompt), max_length - new)].append(row)
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in prompts]
    for length, rows in rows_of.items():
        step = max(1, batch_tokens // (length + new))
        for part in (rows[i : i + step] for i in range(0, len(rows), step)):
            ids = torch.tensor([prompts[row][-length:] for row in part], device=device)
            with PASS:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            for row, answer in zip(part, out[:, length:].tolist(), strict=True):
                stop = next((i for i, token in enumerate(answer) if token in found), len(answer))
                answers[row] = answer[: stop + 1]
    return answers


def _ends(model: Any, ends: Sequence[int | None]) -> list[int]:
    """Tokens that end an answer: those given, and those that the checkpoint names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return [token for token in dict.fromkeys([*ends, *listed]) if token is not None]
