"""Settings of Sphinx: the pages of this folder, and an API page for each room of the package from its docstrings.

`pip install -e ".[docs]" && sphinx-build -W docs build/docs` builds them, with warnings as errors.
Names of this package in references and signatures must exist, and so must the arguments that a docstring describes.
"""

import importlib
import inspect
import pkgutil
import re
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

import unet_diffusion

LOG = getLogger(__name__)
API = Path(__file__).parent / "api"

project = html_title = "unet_diffusion"
author = "The unet_diffusion authors"
copyright = f"2026, {author}"
release = metadata.version("unet-diffusion")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3  # so that links to a section work as they do on GitHub
default_role = "code"

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!unet_diffusion\.).*")]  # names of other packages, which have pages elsewhere
napoleon_numpy_docstring = False
autodoc_inherit_docstrings = False  # those of Lightning and PyTorch have directives of their own
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "ignore-module-all": True}


def rooms() -> dict[str, list[str]]:
    """The public modules by room: a sub-package, or the package itself for modules that lie directly in it."""
    modules: dict[str, list[str]] = {"unet_diffusion": ["unet_diffusion"]}
    for module in pkgutil.walk_packages(unet_diffusion.__path__, "unet_diffusion."):
        path = module.name.split(".")
        if not any(part.startswith("_") for part in path):
            room = ".".join(path[:2]) if module.ispkg or len(path) > 2 else "unet_diffusion"
            modules.setdefault(room, []).append(module.name)
    return modules


def names(module: str) -> str:
    """A list with links to what a package offers by its `__all__`, wherever it is defined."""
    package = importlib.import_module(module)
    offered = (
        [getattr(package, name) for name in getattr(package, "__all__", ())] if hasattr(package, "__path__") else []
    )
    paths = [f"{one.__module__}.{one.__qualname__}" for one in offered if hasattr(one, "__qualname__")]
    return "".join(f"* :py:obj:`{path.rpartition('.')[2]} <{path}>`\n" for path in paths)


def write_api_pages(app: Sphinx) -> None:
    """Writes api/ROOM.rst, and removes the pages of rooms that are gone."""
    API.mkdir(exist_ok=True)
    pages = {API / f"{room}.rst": modules for room, modules in rooms().items()}
    for page in set(API.glob("*.rst")) - pages.keys():
        page.unlink()
    for page, modules in pages.items():
        sections = [f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n\n{names(name)}" for name in modules]
        text = f"{page.stem}\n{'=' * len(page.stem)}\n\n" + "\n".join(sections)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def escape_asterisks(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings have no emphasis: an asterisk outside of backticks is a product or belongs to an argument's name."""
    text = re.sub(r"`[^`]*`|\*", lambda match: r"\*" if match[0] == "*" else match[0], "\n".join(lines))
    lines[:] = text.split("\n")


def warn_of_unknown_arguments(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """A described argument that is not in the signature, such as one that was renamed."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", "\n".join(lines) + "\n", re.MULTILINE)
    if section and callable(obj) and str(obj.__module__).startswith("unet_diffusion"):
        described = re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", section[1], re.MULTILINE)
        if unknown := [argument for argument in described if argument not in inspect.signature(obj).parameters]:
            LOG.warning("%s describes arguments that it does not have: %s", name, ", ".join(unknown))


def accept_undocumented(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """A name that exists without a docstring, such as a type variable, stays text; others remain unknown references."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    try:
        return content if hasattr(importlib.import_module(module), name) else None
    except (ImportError, ValueError):
        return None


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", warn_of_unknown_arguments, priority=300)
    app.connect("autodoc-process-docstring", escape_asterisks, priority=400)  # before napoleon
    app.connect("missing-reference", accept_undocumented)
