"""The settings of a module as plain values, for loggers, checkpoints and model cards."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

Scalar = bool | int | float | str | None


def plain_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments of a module's constructor, as its attributes of the same names hold them.

    Numbers and texts stay as they are, networks become their class and configuration, and functions are left out.
    """
    names = list(inspect.signature(type(module).__init__).parameters)[1:]  # without self
    return _plain_items({name: getattr(module, name) for name in names if hasattr(module, name)})


def plain_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's class and its settings."""
    return {"class_path": _class_path(optimizer), "init_args": _plain_items(optimizer.defaults)}


def scalar_arguments(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and texts in settings that a class has arguments for."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in settings.items() if name in names and isinstance(value, Scalar)}


def _plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values by name; those that cannot be plain are left out."""
    plain = {name: _plain(value) for name, value in values.items() if name[0] != "_"}
    return {name: value for name, value in plain.items() if value is not None or values[name] is None}


def _plain(value: Any) -> Any:
    """The plain counterpart of a value; None if there is none."""
    if isinstance(value, Scalar):
        return value
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        return _plain_items({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return _plain_items(value)
    config = getattr(value, "config", None)
    if isinstance(config, Mapping):
        return {"class_path": _class_path(value), "init_args": _plain_items(config)}
    return {"class_path": _class_path(value)} if isinstance(value, nn.Module) else None


def _class_path(value: Any) -> str:
    # Where weights are shared out over processes, a class of torch's comes first.
    kinds = type(value).__mro__
    kind = next((one for one in kinds if not one.__module__.startswith("torch.distributed")), kinds[0])
    return f"{kind.__module__}.{kind.__qualname__}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if the value is none of the choices; the error lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
