"""The notebooks run from top to bottom, and are stored without outputs."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = {"NUM_STEPS": 5, "NUM_IMAGES": 80}  # of training: enough for every cell to have something to show
TIMEOUT = 300  # seconds a cell, on a slow machine

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shorten_training(notebook: NotebookNode) -> None:
    """Replaces the numbers in the cell tagged "parameters", where there is one."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            assert "NUM_STEPS" in cell.source
            cell.source = re.sub(r"(?m)^(\w+) = \d+", lambda found: f"{found[1]} = {SMALLER[found[1]]}", cell.source)


def test_the_notebooks_are_found():
    names = {"01_one_u", "02_noise_and_denoise", "03_segmentation_to_denoiser", "04_latent_diffusion"}
    assert names <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_notebook_is_stored_without_outputs(path: Path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert not cell.outputs, f"cell {cell.id} has stored outputs; clear them"
        assert cell.execution_count is None, f"cell {cell.id} has a stored execution count; clear it"


@every_notebook
def test_notebook_defines_no_class(path: Path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        classes = [node.name for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.ClassDef)]
        assert not classes, f"cell {cell.id} defines {classes}; what needs a class belongs in the package"


@every_notebook
def test_notebook_is_for_the_kernel_that_everyone_has(path: Path):
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@pytest.mark.slow
@every_notebook
def test_notebook_runs_without_errors(path: Path):
    notebook = nbformat.read(path, as_version=4)
    shorten_training(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=TIMEOUT, resources=resources).execute()  # raises on errors
