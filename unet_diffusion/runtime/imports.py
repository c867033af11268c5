"""Quick imports for the command line: only the modules that a run uses, and no garbage collection meanwhile.

Lightning needs one class of torchmetrics. The package torchmetrics imports all its metrics, and with them SciPy,
torchvision and, where it is installed, transformers: 4 s of the 9 s that Lightning takes on a core of 2 GHz.
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
    """Collect no garbage within the block: imports make a million objects that stay; scanning them takes a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # objects made so far are not scanned later, either
        gc.enable()


def import_lightning() -> None:
    """Import Lightning and the part of torchmetrics that it needs; the rest is imported when it is first used."""
    if "torchmetrics" not in sys.modules:
        _begin_torchmetrics()
    import lightning.pytorch.cli  # noqa: F401


def _begin_torchmetrics() -> None:
    spec: Any = find_spec("torchmetrics")
    package: Any = module_from_spec(spec)
    sys.modules["torchmetrics"] = package
    package.__version__ = version("torchmetrics")
    package._logger = logging.getLogger("torchmetrics")  # its modules import it from the package

    def import_the_rest(name: str) -> Any:
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, name)

    import_module("torchmetrics.utilities")  # first: it and torchmetrics.metric import each other
    from torchmetrics.collections import MetricCollection
    from torchmetrics.metric import Metric

    package.Metric, package.MetricCollection = Metric, MetricCollection
    package.__getattr__ = import_the_rest  # called for every other name (PEP 562)


def onnx_runtime() -> Any:
    """The package onnxruntime.

    Raises:
        ImportError: If it or onnxscript is missing; the message names the extra.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # with which torch writes ONNX
    except ImportError as error:
        raise ImportError(
            'ONNX needs the packages onnxscript and onnxruntime; install them with pip install "unet-diffusion[onnx]"'
        ) from error
    return onnxruntime
