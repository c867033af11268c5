"""Which room of the package imports which: each only those above it, and no file or folder in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unet_diffusion"
ROOMS = (  # from the ground up; see docs/architecture.md
    *("runtime", "models", "latents", "diffusion", "segmentation", "data", "diffusers_io", "inference", "evaluation"),
    *("checks", "explore", "training", "commands"),
)
MOST_LINES = 450
LONGER: set[str] = set()  # files that are still to be split


def module_of(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file names anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found - {module_of(path)}


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}


def room_of(module: str) -> str:
    return (*module.split("."), "")[1]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a circle in the graph; none without one."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        for neighbour in sorted(graph.get(node, ())):
            if found := visit(neighbour, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_every_folder_of_the_package_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module) in ROOMS])
def test_a_room_imports_only_those_above_it(module):
    later = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    assert [name for name in sorted(IMPORTS[module]) if room_of(name) in later] == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_files_are_short():
    long = {path.relative_to(PACKAGE).as_posix() for path in FILES.values()
            if len(path.read_text().splitlines()) > MOST_LINES}  # fmt: skip
    assert long == LONGER
