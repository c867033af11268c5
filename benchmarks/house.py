"""How much of the package a reader must read: its size, its longest parts, and what four ways through it cross.

    python benchmarks/house.py                                   # sizes, longest parts, circles, places of a concern
    python benchmarks/house.py --way unet-diffusion sample ...   # runs that command, and counts what it went through

`--package DIR` counts another checkout; a way is run in it by PYTHONPATH=DIR. The functions of a way are those that
ran, whatever they did; lines are theirs from the first to the last, with their docstrings.
"""

import argparse
import ast
import json
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = "unet_diffusion"
CONCERNS = {  # files that match
    "captions": r"\bcaptions?\b",
    "pixels or latents": r"space is (?:not )?None|isinstance\([\w.]+, (?:Latent|Pixel)Codec\)",
    "KL or VQ": r"isinstance\([^()]*, (?:VQModel|AutoencoderKL)\)|num_vq_embeddings",
    "argparse's Namespace": r"argparse\.Namespace",
}


def files_of(package: Path) -> dict[str, Path]:
    """The modules of a package by name."""
    names = {
        path: ".".join((PACKAGE, *path.relative_to(package).with_suffix("").parts)) for path in package.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports_of(path: Path, files: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in files else str(node.module) for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in files}
    return found


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """Nodes that lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    return {node for node in graph if node in reached(node)}


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring and signature."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def sizes(package: Path) -> dict[str, Any]:
    files = files_of(package)
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    graph = {name: imports_of(path, files) - {name} for name, path in files.items()}
    rooms: dict[str, set[str]] = {}
    for name, imported in graph.items():
        room = (*name.split("."), "")[1]
        rooms.setdefault(room, set()).update((*one.split("."), "")[1] for one in imported)
    folders = {name: {one for one in others if one != name and one in rooms} for name, others in rooms.items()}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    longest = max(((body_lines(function), f"{name}.{function.name}") for name, tree in trees.items()
                   for function in functions_of(tree)))  # fmt: skip
    arguments = max((len([*function.args.args, *function.args.kwonlyargs]) - 1, f"{name}.{node.name}")
                    for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                    for function in node.body
                    if isinstance(function, ast.FunctionDef) and function.name == "__init__"
                    and "UNet" not in node.name)  # fmt: skip
    places = {
        concern: sum(bool(re.search(pattern, path.read_text())) for path in files.values())
        for concern, pattern in CONCERNS.items()
    }
    code = sum(body_lines(function) for tree in trees.values() for function in functions_of(tree))
    return {
        "files": len(files),
        "files at the top": sum(name.count(".") == 1 and path.name != "__init__.py" for name, path in files.items()),
        "lines": sum(lines.values()),
        "lines of functions without docstrings and signatures": code,
        "longest file": max((count, name) for name, count in lines.items()),
        "longest function": longest,
        "most arguments of a constructor": arguments,
        "files in circles": len(in_circles(graph)),
        "folders in circles": len(in_circles(folders)),
        **{f"files that know of {concern}": count for concern, count in places.items()},
    }


def way(command: list[str]) -> dict[str, int]:
    """Runs a command in this process; the files and the lines of functions that it went through."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and f"/{PACKAGE}/" in frame.f_code.co_filename:
            codes.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    sys.argv = command
    try:
        runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        if exit.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    whole = [code for code in codes if not code.co_name.startswith("<")]
    lines = {
        (code.co_filename, line) for code in whole
        for line in range(code.co_firstlineno, max(number or 0 for _, _, number in code.co_lines()) + 1)
    }  # fmt: skip
    return {"files": len({code.co_filename for code in whole}), "functions": len(whole), "lines": len(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    parser.add_argument("--way", nargs=argparse.REMAINDER, help="a command whose way is counted")
    options = parser.parse_args()
    found = way(options.way) if options.way else sizes(options.package / PACKAGE)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
