"""Classes that a file names: those of this package, and of modules that the user allows."""

import importlib.util
from collections.abc import Sequence
from typing import TypeVar

PACKAGE = __name__.partition(".")[0]  # a file may name its classes without the user's permission
Part = TypeVar("Part")


def class_of(class_path: str, base: type[Part], allow: Sequence[str]) -> type[Part]:
    """The class at a path in this package or in an allowed module; other modules could run code from anyone.

    Args:
        class_path: Module and name of the class.
        base: The class that it must inherit from.
        allow: Modules outside this package whose classes may be used.

    Raises:
        ValueError: If the module is not allowed, or has no such class.
    """
    module, _, name = class_path.rpartition(".")
    is_allowed = module.split(".")[0] == PACKAGE or any(f"{module}.".startswith(f"{trusted}.") for trusted in allow)
    if not is_allowed:
        raise ValueError(
            f"class_path must name a class of {PACKAGE}, got {class_path!r}; if you trust its module, allow it with "
            f"--allow {module or class_path}, or allow=[{module!r}] in Python"
        )
    if importlib.util.find_spec(module):
        cls = getattr(importlib.import_module(module), name, None)
        if isinstance(cls, type) and issubclass(cls, base):
            return cls
    raise ValueError(f"class_path must name a {base.__name__}, got {class_path!r}")
