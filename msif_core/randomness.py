"""Random numbers that are functions of a key and a position alone: splitmix64 (Steele et al. 2014)."""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
BLOCK, ACCELERATOR_BLOCK = 1 << 18, 1 << 24
"""Signs that are drawn together: on a CPU as many as stay in its cache."""

ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def uniforms(fingerprints: list[str], positions: int, seed: int) -> np.ndarray:
    """Uniform numbers [N, positions] in [0, 1), each a function of (seed, fingerprint, position) alone."""
    keys = np.array([int(f, 16) for f in fingerprints], dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        steps = np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        state = _mix(_mix(keys ^ _mix(np.array([[seed & 0xFFFFFFFFFFFFFFFF]], dtype=np.uint64))) + steps)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_signs(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`count` random signs, float32 on `device`, each a function of (seed, position) alone.

    Minus where `uniforms` of the seed as key, with seed 1, is below 1/2: its first bit, which the last step of the
    mixing leaves as it is. On the device, in blocks: a sketch has as many as tracked parameters.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    with np.errstate(over="ignore"):
        origin = int(_mix(key ^ _mix(np.ones(1, dtype=np.uint64)))[0]) + GOLDEN
    signs = torch.empty(count, device=device)
    block = BLOCK if signs.device.type == "cpu" else ACCELERATOR_BLOCK
    steps = torch.arange(1, min(count, block) + 1, device=device).mul_(_signed(GOLDEN))
    for first in range(0, count, block):
        state = steps[: count - first] + _signed(origin + first * GOLDEN)
        for shift, factor in ROUNDS:
            shifted = (state >> shift).bitwise_and_((1 << 64 - shift) - 1)
            state.bitwise_xor_(shifted).mul_(_signed(factor))
        signs[first : first + block] = state < 0
    return signs.mul_(2).sub_(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    x = x + np.uint64(GOLDEN)
    for shift, factor in ROUNDS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _signed(word: int) -> int:
    """The int64 of the word's last 64 bits: torch's integers wrap around as unsigned ones do."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
