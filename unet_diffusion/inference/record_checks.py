"""Checks of a checkpoint before a model is built from it, because it may come from anyone or may be damaged.

A file of a few bytes can demand any amount of memory: by an array of any size in its pickle, by a tensor that is a view
larger than its storage, or by the description of a network larger than its weights.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.labels import Kind

T = TypeVar("T")
Rule = tuple[str, Callable[[Any], bool]]

LARGEST = 2  # most parameters built per stored weight; constructors build some that they replace
SPARE_PARAMETERS = 2**20  # allowance beyond that
MAX_SHOWN = 80  # characters of a value in an error


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return type(value) is int and value >= 1


def _is_diameter(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 4 <= value < math.inf


def _is_network(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("class_path")):
        return False
    return isinstance(value.get("init_args"), dict) and _is_names([*value["init_args"]])


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_classes(value: Any) -> bool:
    return _is_names(value) and len(set(value)) == len(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(is_count, value))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)


def _is_values(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == PixelValues().plain().keys()


def _is_space(value: Any) -> bool:
    checks = {"autoencoder": _is_text, "fingerprint": _is_text, "image_shape": _is_shape, "downsampling": is_count}
    checks |= {"mean": _is_numbers, "std": _is_numbers}
    return isinstance(value, dict) and value.keys() == checks.keys() and all(checks[key](value[key]) for key in checks)


def _is_base(value: Any) -> bool:
    names = {"path", "fingerprint"}
    return isinstance(value, dict) and value.keys() == names and all(map(_is_text, value.values()))


_NETWORK: Rule = ("class_path and init_args", _is_network)
_SHAPE: Rule = ("three whole numbers from 1: channels, height, width", _is_shape)
_VALUES: Rule = ("dtype, low, high and shown", _is_values)
_DICT: Rule = ("a dict", lambda value: isinstance(value, dict))
_NUMBER_OR_NONE: Rule = (
    "a whole number from 0, or None",
    lambda value: value is None or (type(value) is int and value >= 0),
)
RULES: dict[str, dict[str, Rule]] = {
    "denoiser": {
        "unet": _NETWORK,
        "schedule": _DICT,
        "sample_shape": _SHAPE,
        "null_label": _NUMBER_OR_NONE,
        "class_names": ("a list of different texts, or None", lambda value: value is None or _is_classes(value)),
        "settings": _DICT,
        "values": _VALUES,
        "latent_space": ("a latent space, or None", lambda value: value is None or _is_space(value)),
        "codec": ("class_path and init_args, or None", lambda value: value is None or _is_network(value)),
        "conditions": (
            "a list of class_path and init_args",
            lambda value: isinstance(value, list) and all(map(_is_network, value)),
        ),
    },
    "segmenter": {
        "unet": _NETWORK,
        "kind": (
            ", ".join(get_args(Kind)[:-1]) + f" or {get_args(Kind)[-1]}",
            lambda value: isinstance(value, str) and value in get_args(Kind),
        ),
        "class_names": ("a list of different texts", _is_classes),
        "timestep": _NUMBER_OR_NONE,
        "stretch": ("True or False", lambda value: isinstance(value, bool)),
        "object_diameter": ("a number from 4, or None", lambda value: value is None or _is_diameter(value)),
        "window_size": ("a whole number from 1", is_count),
        "settings": _DICT,
        "values": _VALUES,
        "threshold": ("a number between 0 and 1", lambda value: isinstance(value, float) and 0 < value < 1),
        "min_size": ("a whole number from 1", is_count),
    },
    "autoencoder": {
        "class_name": ("AutoencoderKL or VQModel", lambda value: value in ("AutoencoderKL", "VQModel")),
        "config": _DICT,
        "image_shape": _SHAPE,
        "settings": _DICT,
        "values": _VALUES,
    },
}


OF_ADAPTERS: dict[str, Rule] = {"adapter": _NETWORK, "base": ("path and fingerprint", _is_base)}  # both or none


def check_record(record: Mapping[str, Any], kind: str) -> None:
    """Refuse a record with a missing or wrong field.

    Args:
        record: The record of a checkpoint.
        kind: The kind of model, a key of RULES.

    Raises:
        ValueError: If a field is missing or wrong; the message names it.
    """
    adapted = kind == "denoiser" and not OF_ADAPTERS.keys().isdisjoint(record)
    check_fields(record, RULES[kind] | (OF_ADAPTERS if adapted else {}))


def check_fields(record: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse plain values of which one is missing or wrong.

    Args:
        record: The values by name.
        rules: The rule of each.

    Raises:
        ValueError: If a value is missing or wrong; the message names it.
    """
    for name, (rule, fits) in rules.items():
        if name not in record:
            raise ValueError(f"the field {name} is missing")
        if not fits(record[name]):
            raise ValueError(f"{name} must be {rule}, got {_short(record[name])}")


def check_weights(weights: Any) -> None:
    """Refuse weights that are no tensors, that claim more memory than they have, or that are not finite.

    Args:
        weights: The weights of a checkpoint by name.

    Raises:
        ValueError: If a weight is wrong; the message names it.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"state_dict must hold weights by name, got {_short(weights)}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"weights must be tensors, and {name} is {_short(weight)}")
        if weight.device.type == "cpu" and weight.nbytes > weight.untyped_storage().nbytes():
            raise ValueError(f"weights must store all their elements, and {name} {tuple(weight.shape)} is not stored")
        if name.startswith("ema_") and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"weights must be finite, and {name} is not; use an earlier checkpoint")


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which networks cannot be built with many more parameters than there are weights.

    Raises:
        ValueError: If a network grows larger.
    """
    most = LARGEST * sum(weight.numel() for weight in weights.values()) + SPARE_PARAMETERS
    made = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 0 if parameter is None else parameter.numel()
        if made > most:
            raise ValueError("the network that it describes would be larger than its weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def built(kind: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """An object of a class, built with the arguments in a record.

    Args:
        kind: The class.
        arguments: The arguments by name.

    Raises:
        ValueError: If the class does not take these arguments.
    """
    name = getattr(kind, "__name__", "a class")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        got = ", ".join(arguments) or "none"
        raise ValueError(f"{name} cannot be built from the arguments {got}: {error}") from error
    try:
        return kind(**arguments)
    except (TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built from the arguments {_short(dict(arguments))}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
