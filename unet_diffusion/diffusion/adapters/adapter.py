"""Adapters: small parts that are trained on a denoiser whose own weights are frozen, the base.

A checkpoint of such a training holds the adapter alone, and names its base. An adapter is merged into the weights of
the base before images are drawn, so that nothing else knows of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unet_diffusion.models.unet import PixelNetwork


class Adapter:
    """A kind of adapter: what it adds to a frozen denoiser to be trained, and how it becomes part of its weights.

    For a new kind, write a subclass. Define `add` and `merge`, and set `config`. Define `save_pretrained`, too, if the
    pipelines of diffusers load such an adapter.

    Attributes:
        config: The constructor's arguments as plain values, from which a checkpoint builds the adapter.
    """

    config: dict[str, Any]

    def attach(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        """Freeze a denoiser and add the parameters of the adapter, which alone are trained; in place.

        Args:
            unet: The network.
            conditions: Its conditions.

        Raises:
            ImportError: If a package is missing.
            ValueError: If the denoiser has no place for the adapter.
        """
        unet.requires_grad_(False)
        conditions.requires_grad_(False)
        self.add(unet, conditions)

    def add(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        """Add the parameters of the adapter to a frozen denoiser, in place."""
        raise NotImplementedError(f"{type(self).__name__} must define add()")

    def check_captions(self, captions: list[str]) -> None:
        """Refuse data with these captions if the adapter can learn nothing from them; by default any will do.

        Raises:
            ValueError: If they will not do.
        """

    def merge(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        """Make the adapter part of the weights of the denoiser that it was attached to, in place."""
        raise NotImplementedError(f"{type(self).__name__} must define merge()")

    def save_pretrained(self, unet: PixelNetwork, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the adapter alone, as diffusers' pipelines load it.

        Args:
            unet: The network.
            weights: The weights of the adapter, by names that begin with "unet." or "conditions.".
            folder: The folder to write to.
        """
        raise NotImplementedError(f"{type(self).__name__} must define save_pretrained()")


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with its weights.

    Args:
        adapter: The kind of adapter.
        weights: Its averaged weights, by names that begin with "unet." or "conditions.".
        is_merged: Whether the denoiser that holds it has the adapter in its weights.
    """

    adapter: Adapter
    weights: Mapping[str, Tensor]
    is_merged: bool = True


def trained_names(unet: nn.Module, conditions: nn.Module) -> list[str]:
    """Names of the parameters of an attached adapter, which begin with "unet." or "conditions."."""
    parts = {"unet": unet, "conditions": conditions}
    return [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def merge_trained(
    adapter: Adapter, weights: Mapping[str, Tensor], unet: PixelNetwork, conditions: nn.ModuleList
) -> None:
    """Put the weights of an adapter into a denoiser that it is attached to, and merge it; in place.

    Raises:
        ValueError: If the weights are not exactly those of the adapter.
    """
    parameters = dict(nn.ModuleDict({"unet": unet, "conditions": conditions}).named_parameters())
    names = set(trained_names(unet, conditions))
    if differ := sorted(names ^ weights.keys()):
        raise ValueError(f"the adapter must have exactly its own weights, and {differ[0]} is missing or no part of it")
    with torch.no_grad():
        for name in names:
            if parameters[name].shape != weights[name].shape:
                raise ValueError(f"{name} must be {tuple(parameters[name].shape)}, got {tuple(weights[name].shape)}")
            parameters[name].copy_(weights[name])
    adapter.merge(unet, conditions)
