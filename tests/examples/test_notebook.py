"""The notebook, from top to bottom as it stands, in a folder of its own."""

import os

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for needed in ("ipykernel", "matplotlib", "tabulate"):
    pytest.importorskip(needed)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    folders = (str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    assert "Recommendation: " in printed and "worst group" in printed
    assert "the same predictions: True" in printed
    assert (tmp_path / "out" / "quickstart" / "run.png").exists()
