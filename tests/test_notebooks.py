"""The notebooks are stored with their pictures, and run from top to bottom to outputs of the same structure."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from wheels import Elsewhere

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = {"NUM_STEPS": 5, "NUM_IMAGES": 80}  # of training: enough for every cell to have something to show
TIMEOUT = 300  # seconds a cell, on a slow machine
MOST_BYTES = 600_000  # of a stored notebook, so that a clone stays small and a page opens at once
ON_ONE_MACHINE = re.compile(
    r"(?<![\w:/.])/(?:home|Users|root|tmp|var|opt|usr|work|mnt)/|[A-Z]:\\|site-packages|ipykernel_\d"
)
HOST = re.compile(r"https?://|index-url|--extra-index")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stored_cells(path: Path) -> list[NotebookNode]:
    return code_cells(nbformat.read(path, as_version=4))


def calls(node: ast.AST) -> Iterator[str]:
    """The names of all functions that are called within a part of the source."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def shows_something(cell: NotebookNode) -> bool:
    """Whether a cell prints, draws, or ends in a value."""
    statements = [
        one for one in ast.parse(cell.source).body if not isinstance(one, ast.FunctionDef | ast.Import | ast.ImportFrom)
    ]
    shown = {"print", "show", "subplots"} & {name for one in statements for name in calls(one)}
    ends_in_value = bool(statements) and isinstance(statements[-1], ast.Expr) and not isinstance(
        statements[-1].value, ast.Call
    )  # fmt: skip
    return bool(shown) or ends_in_value


def texts(cell: NotebookNode) -> Iterator[str]:
    """All that a cell's outputs say in words."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield output.get("data", {}).get("text/plain", "")


def structure(cell: NotebookNode) -> list[tuple[str, ...]]:
    """What kinds of outputs a cell has, in order; text that is printed in pieces counts once."""
    kinds: list[tuple[str, ...]] = []
    for output in cell.outputs:
        kind = (
            output.output_type,
            *sorted([output.name] if output.output_type == "stream" else output.get("data", {})),
        )
        if output.output_type != "stream" or kind not in kinds[-1:]:
            kinds.append(kind)
    return kinds


def shorten_training(notebook: NotebookNode) -> None:
    """Replaces the numbers in the cell tagged "parameters", where there is one."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            assert "NUM_STEPS" in cell.source
            cell.source = re.sub(r"(?m)^(\w+) = \d+", lambda found: f"{found[1]} = {SMALLER[found[1]]}", cell.source)


def test_the_notebooks_are_found():
    names = {
        "01_one_u",
        "02_noise_and_denoise",
        "03_segmentation_to_denoiser",
        "04_latent_diffusion",
        "05_explore_a_checkpoint",
        "06_segmentation_to_latent_diffusion",
    }
    assert names <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_notebook_is_stored_with_what_it_shows(path: Path):
    cells = stored_cells(path)
    for cell in cells:
        assert not shows_something(cell) or cell.outputs, f"cell {cell.id} shows something; store it with its outputs"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@every_notebook
def test_notebook_is_stored_as_it_ran_from_top_to_bottom(path: Path):
    cells = stored_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("execution" in cell.metadata for cell in cells), "timestamps change in every run; drop them"


@every_notebook
def test_no_stored_output_is_an_error_a_warning_or_a_progress_bar(path: Path):
    for cell in stored_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", f"cell {cell.id} is stored with an error"
            assert output.get("name") != "stderr", f"cell {cell.id} writes to stderr: {output.text[:200]}"
        for text in texts(cell):
            assert "Warning" not in text, f"cell {cell.id} is stored with a warning"


@every_notebook
def test_no_stored_output_names_a_place_on_one_machine(path: Path):
    for cell in stored_cells(path):
        for text in texts(cell):
            assert not ON_ONE_MACHINE.search(text), f"cell {cell.id} shows a path of the machine it ran on: {text}"


@every_notebook
def test_stored_notebook_is_small(path: Path):
    assert path.stat().st_size <= MOST_BYTES, "make the pictures smaller"


@every_notebook
def test_first_code_cell_installs_the_package_where_it_is_missing(path: Path):
    first = stored_cells(path)[0]
    assert 'find_spec("unet_diffusion") is None' in first.source
    assert {"find_spec", "run"} <= set(calls(ast.parse(first.source)))
    assert not HOST.search(first.source), "pip knows where packages come from"


@every_notebook
def test_notebook_takes_names_of_the_top_level_from_there(path: Path):
    import unet_diffusion as ud

    for cell in stored_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unet_diffusion"):
                shadowed = {alias.name for alias in node.names} & set(ud.__all__)
                assert not shadowed, f"cell {cell.id} imports {shadowed} from {node.module}; they are names of ud"


@every_notebook
def test_notebook_defines_no_class(path: Path):
    for cell in stored_cells(path):
        classes = [node.name for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.ClassDef)]
        assert not classes, f"cell {cell.id} defines {classes}; what needs a class belongs in the package"


@every_notebook
def test_notebook_is_for_the_kernel_that_everyone_has(path: Path):
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Elsewhere:
    return Elsewhere(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@every_notebook
def test_notebook_installs_the_package_without_the_repository_and_runs_to_outputs_of_the_structure_that_is_stored(
    elsewhere: Elsewhere, path: Path
):
    notebook = nbformat.read(path, as_version=4)
    stored = {cell.id: structure(cell) for cell in code_cells(notebook)}
    shorten_training(notebook)
    nbformat.write(notebook, elsewhere.folder / path.name)
    code = "from nbclient.cli import main; main()"
    elsewhere.run(
        "-c", code, "--inplace", f"--timeout={TIMEOUT}", "--kernel_name=python3", path.name
    )  # raises on errors
    executed = nbformat.read(elsewhere.folder / path.name, as_version=4)
    assert {cell.id: structure(cell) for cell in code_cells(executed)} == stored
    where = "import unet_diffusion; print(unet_diffusion.__file__)"
    assert str(elsewhere.python.parents[1]) in elsewhere.run("-c", where)
