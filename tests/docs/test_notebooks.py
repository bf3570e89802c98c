"""The notebooks run from the first cell to the last, in a folder as the demo leaves it, with tiny sizes."""

import ast

import pytest

from tests.paths import ROOT
from tests.test_readmes import after_the_demo  # noqa: F401  (a fixture)

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_saved_without_outputs_and_can_be_read(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 3 and not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        ast.parse(cell.source)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, after_the_demo, monkeypatch):  # noqa: F811
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(after_the_demo)}
    for name, value in {"MEDPLIB_TINY": "1", **one_device}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(after_the_demo)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
