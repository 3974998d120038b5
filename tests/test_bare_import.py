"""The numerics, and the benchmark of them, run where torch, transformers, numpy and safetensors are all there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import importlib, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "prefect", "duckdb", "faiss", "rich", "typer", "bm25s", "matplotlib"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for name in ("capture", "curvature.steps", "curvature.filters", "chain", "sketch", "scoring"):
    importlib.import_module(f"msif_core.{name}")
for name in ("floor", "gpu_report", "peers.__main__", "peers.msif_side", "peers.loop_side"):
    importlib.import_module(f"benchmarks.{name}")
"""


def test_the_numerics_import_on_a_bare_machine() -> None:
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
