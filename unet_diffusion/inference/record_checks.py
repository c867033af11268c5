"""What a checkpoint must be before anything is made of it: it may come from anyone, and may be damaged or hurt.

A file of a few bytes can ask for any amount of memory: its pickle for an array of a size that it names, a tensor for a
view that is larger than what it is of, and the description of a network for one that its weights are not of.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

T = TypeVar("T")
Rule = tuple[str, Callable[[Any], bool]]

LARGEST = 2  # times as many parameters as there are weights: some are made and put aside
SPARE_PARAMETERS = 2**20
MAX_SHOWN = 80  # characters of a value


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 1."""
    return type(value) is int and value >= 1


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
    return isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)


def _is_space(value: Any) -> bool:
    checks = {"autoencoder": _is_text, "fingerprint": _is_text, "image_shape": _is_shape, "downsampling": is_count}
    checks |= {"mean": _is_numbers, "std": _is_numbers}
    return isinstance(value, dict) and value.keys() == checks.keys() and all(checks[key](value[key]) for key in checks)


_NETWORK: Rule = ("class_path and init_args", _is_network)
_SHAPE: Rule = ("three whole numbers from 1: channels, height, width", _is_shape)
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
            "binary, classes or instances",
            lambda value: isinstance(value, str) and value in ("binary", "classes", "instances"),
        ),
        "class_names": ("a list of different texts", _is_classes),
        "timestep": _NUMBER_OR_NONE,
        "stretch": ("True or False", lambda value: isinstance(value, bool)),
        "window_size": ("a whole number from 1", is_count),
        "settings": _DICT,
    },
    "autoencoder": {
        "class_name": ("AutoencoderKL or VQModel", lambda value: value in ("AutoencoderKL", "VQModel")),
        "config": _DICT,
        "image_shape": _SHAPE,
        "settings": _DICT,
    },
}


def check_record(record: Mapping[str, Any], kind: str) -> None:
    """Refuse a record that lacks a field, or has one that it cannot have.

    Args:
        record: Of a checkpoint.
        kind: Of what, a key of RULES.

    Raises:
        ValueError: Naming the field.
    """
    for name, (rule, fits) in RULES[kind].items():
        if name not in record:
            raise ValueError(f"its record must have the field {name}, and has not")
        if not fits(record[name]):
            raise ValueError(f"{name} in its record must be {rule}, got {_short(record[name])}")


def check_weights(weights: Any) -> None:
    """Refuse weights that are no tensors, that claim more memory than they have, or that are no numbers.

    Args:
        weights: Of a checkpoint, by name.

    Raises:
        ValueError: Naming one.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"its state_dict must hold weights by name, and is {_short(weights)}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"weights must be tensors, and {name} is {_short(weight)}")
        if weight.device.type == "cpu" and weight.nbytes > weight.untyped_storage().nbytes():
            raise ValueError(f"weights must be as large as they say, and {name} {tuple(weight.shape)} is not")
        if name.startswith("ema_") and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"weights must be numbers, and {name} is not; use an earlier checkpoint")


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it networks are built that have no more parameters than there are weights, about.

    Raises:
        ValueError: When one gets larger.
    """
    most = LARGEST * sum(weight.numel() for weight in weights.values()) + SPARE_PARAMETERS
    made = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 0 if parameter is None else parameter.numel()
        if made > most:
            raise ValueError("its record must describe the network that its weights are of, and describes a larger one")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def built(kind: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """What a class makes of the arguments in a record.

    Args:
        kind: The class.
        arguments: By name.

    Raises:
        ValueError: If it takes others.
    """
    name = getattr(kind, "__name__", "a class")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        got = ", ".join(arguments) or "none"
        raise ValueError(f"its record must have the arguments of {name}, and has {got}") from error
    try:
        return kind(**arguments)
    except (TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be made of the arguments in its record, {_short(dict(arguments))}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
