"""Imports of the command line: nothing that a run does not use, and no collecting of garbage meanwhile.

Lightning needs one class of torchmetrics, which imports all its metrics, and with them SciPy, torchvision, and where it
is installed transformers: 4 s of the 9 s that Lightning takes on a core of 2 GHz.
"""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from typing import Any


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it nothing is collected: imports make a million objects that stay, and looking at them takes a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is there now is not looked at later, either
        gc.enable()


def import_lightning() -> None:
    """Import Lightning, and of torchmetrics what that needs; the rest of it is imported when it is asked for."""
    if "torchmetrics" not in sys.modules:
        _begin_torchmetrics()
    import lightning.pytorch.cli  # noqa: F401


def _begin_torchmetrics() -> None:
    spec: Any = find_spec("torchmetrics")
    package: Any = module_from_spec(spec)
    sys.modules["torchmetrics"] = package
    package.__version__ = version("torchmetrics")
    package._logger = logging.getLogger("torchmetrics")  # which its modules take from it

    def import_the_rest(name: str) -> Any:
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, name)

    import_module("torchmetrics.utilities")  # first: it and torchmetrics.metric import each other
    from torchmetrics.collections import MetricCollection
    from torchmetrics.metric import Metric

    package.Metric, package.MetricCollection = Metric, MetricCollection
    package.__getattr__ = import_the_rest  # for every other name (PEP 562)
