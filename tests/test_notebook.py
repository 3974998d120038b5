"""docs/example.ipynb runs from its first cell to its last, on a small project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_project import write_project

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook is not run")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: the notebook is not run")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: the notebook is not run")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "example.ipynb"


def test_the_example_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSIF_CONFIG", str(write_project(tmp_path)))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [
        (output["data"] if "data" in output else {"text/plain": output["text"]})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] in ("execute_result", "display_data", "stream") and output.get("name") != "stderr"
    ]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert any("4 queries" in text and "ranked documents" in text for text in pages), "the attribution shows itself"
    assert sum("white-space:pre-wrap" in text for text in pages) == 3, "and its heat maps"
    texts = "\n".join(data["text/plain"] for data in shown)
    assert "page.html: " in texts
    found = re.findall(r"^(document|query|score of the strongest sequence): (\S+)$", texts, flags=re.M)
    document, query, score = (float(value) for _, value in found)
    assert document == pytest.approx(score, abs=2e-3)
    assert query == pytest.approx(score, abs=2e-3)
