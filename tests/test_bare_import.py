"""The numerics, and the benchmark of them, run where torch, transformers, numpy and safetensors are all there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import importlib, sys

for name in ("pydantic", "prefect", "duckdb", "faiss", "rich", "typer", "bm25s", "matplotlib"):
    sys.modules[name] = None  # as Python keeps a package that it did not find
for name in ("capture", "curvature.steps", "curvature.filters", "chain", "sketch", "scoring"):
    importlib.import_module(f"msif_core.{name}")
for name in ("floor", "gpu_report", "peers.__main__", "peers.msif_side", "peers.loop_side"):
    importlib.import_module(f"benchmarks.{name}")
"""


def test_the_numerics_import_on_a_bare_machine() -> None:
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
