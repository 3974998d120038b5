"""Trace what a fine-tuned language model says back to the pre-training documents that taught it.

`Pipeline` is the facade. It is imported when asked for, so that the numerics (capture, curvature, chain,
sketch) run where only torch, transformers and numpy are installed.
"""

from typing import Any

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from msif_core.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
