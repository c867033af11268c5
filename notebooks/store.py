"""Runs notebooks from top to bottom and stores them with their outputs: python notebooks/store.py [NAME.ipynb ...]

Nothing that changes from run to run is stored beside the outputs, and pictures get a palette, which makes them small.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
COLOURS = 256  # of a palette


def with_palette(png: str) -> str:
    """A picture, base64, whose colours are in a palette, if it is smaller like that."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    stored = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    return min(base64.b64encode(stored.getvalue()).decode() + "\n", png, key=len)


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs of a cell, where text that was printed in pieces is one piece."""
    whole: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and whole and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def store(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    language = dict(notebook.metadata.language_info)  # running adds the version of Python
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, kernel_name="python3", timeout=None, resources=resources).execute()  # raises on errors
    notebook.metadata.language_info = language
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for data in [output.data for output in cell.outputs if "image/png" in output.get("data", {})]:
                data["image/png"] = with_palette(data["image/png"])
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        store(FOLDER / name)
