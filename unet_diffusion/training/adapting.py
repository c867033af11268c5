"""Trains an adapter of a denoiser, such as LoRA; the denoiser itself, the base, stays as it is.

A checkpoint holds the adapter alone, and the place and a hash of its base.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from lightning.pytorch.cli import OptimizerCallable

from unet_diffusion.diffusion.adapters.adapter import Adapter, TrainedAdapter, trained_names
from unet_diffusion.diffusion.losses import Loss, LossWeighting
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import base_record, read_base, read_denoiser
from unet_diffusion.inference.record import network_record
from unet_diffusion.latents.codec import Codec, LatentCodec
from unet_diffusion.models.recomputing import recompute_blocks
from unet_diffusion.models.speed import Speed
from unet_diffusion.runtime.hub import with_prefix
from unet_diffusion.training.denoising_rules import space_identity
from unet_diffusion.training.module import USUAL_DROPOUT, DiffusionModule
from unet_diffusion.training.optimizers import LRDecay, default_optimizer
from unet_diffusion.training.resuming import differences

EMA = "ema_"  # begins the names of averages


class AdapterModule(DiffusionModule):
    """A denoiser whose weights are frozen, and an adapter that is trained on it, as `DiffusionModule` trains.

    The network, its schedule, its conditions and what it denoises are those of the base. Batches are those of
    `DiffusionModule`: images, which the base's autoencoder encodes if it denoises latents, or latents of it.

    Args:
        base: The trained denoiser: a checkpoint file, a run folder or a diffusers pipeline folder, which has to stay
            where it is, as it is read again wherever the adapter is used; or hf://owner/name, a model on the hub.
        adapter: The adapter: `LoRA`, `TextualInversion`, or one of your own.
        allow: Further modules that you trust, whose classes the checkpoint of the base may name. On the command line,
            it is the option --allow.
        gradient_checkpointing: Whether training keeps the inputs of the network's blocks alone and computes the rest
            again in the backward pass, which takes less memory and more time.
        optimizer: Makes the optimiser from the parameters of the adapter.
        lr_warmup_steps: Optimiser steps over which the learning rate rises linearly to its full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: Share of the average kept at each optimiser step; less at first: (1 + n) / (10 + n) after n steps;
            0 is off.
        loss: "l2", the squared error, or "l1", the absolute one.
        loss_weighting: "uniform", or "min_snr" with gamma 5.
        speed: How the network runs, see `models.speed`.
        seed: Seed of noise, timesteps, dropout of conditions, and all that is drawn in training.

    Raises:
        FileNotFoundError: If there is no denoiser at the path.
        ValueError: If the base has no place for the adapter, or (in `setup`) the data do not fit the base.
    """

    def __init__(
        self,
        base: str,
        adapter: Adapter,
        *,
        allow: Sequence[str] = (),
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.9999,
        loss: Loss = "l2",
        loss_weighting: LossWeighting = "uniform",
        speed: Speed | Literal["auto"] = "plain",
        seed: int = 0,
    ):
        denoiser = read_base(base, allow=allow)
        record = base_record(denoiser, base)
        adapter.attach(denoiser.unet, denoiser.conditions)
        if gradient_checkpointing:
            recompute_blocks(denoiser.unet)
        super().__init__(
            denoiser.unet,
            denoiser.schedule,
            codec=_codec_to_train_with(denoiser.codec),
            conditions=list(denoiser.conditions),  # type: ignore[arg-type]
            label_dropout=0.0 if denoiser.null_label is None else USUAL_DROPOUT,
            optimizer=optimizer,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            ema_decay=ema_decay,
            loss=loss,
            loss_weighting=loss_weighting,
            speed=speed,
            seed=seed,
        )
        self.base, self.adapter, self.gradient_checkpointing = with_prefix(base), adapter, gradient_checkpointing
        self.base_record = record
        self.values = denoiser.values
        self.base_meaning = {**space_identity(denoiser.codec.space_record), "class names": denoiser.class_names}
        self.base_meaning["value range"] = denoiser.values.value_range
        self.adapter_names = trained_names(self.unet, self.conditions)

    @property
    def trained(self) -> Denoiser:
        denoiser = super().trained
        state = super().state_dict()
        averaged = {name: state[EMA + name].detach().cpu() for name in self.adapter_names}
        denoiser.adapter = TrainedAdapter(self.adapter, averaged, is_merged=False)
        return denoiser

    def bind_data(self, datamodule: Any) -> None:
        """Take from the data what the module needs to know of them.

        Raises:
            ValueError: If the data are latents of another autoencoder, or have other classes than the base.
        """
        super().bind_data(datamodule)
        captions = getattr(datamodule, "entries", {}).get("captions")
        if captions is not None:
            self.adapter.check_captions(captions)
        meaning = {**space_identity(self.codec.space_record), "class names": self.class_names}
        meaning["value range"] = self.values.value_range
        if self.unet.num_class_embeds is None:
            meaning["class names"] = self.base_meaning["class names"]
        if differ := differences(self.base_meaning, meaning):
            raise ValueError(f"the data must be as those of {self.base}: {'; '.join(differ)}")

    def record(self) -> dict[str, Any]:
        return {**super().record(), "adapter": network_record(self.adapter), "base": self.base_record}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "adapter": network_record(self.adapter), "base": self.base_record["fingerprint"]}

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        of_adapter = {"adapter": record.get("adapter"), "base": record.get("base", {}).get("fingerprint")}
        return {**DiffusionModule.identity_in(record), **of_adapter}

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        trained = read_denoiser(path, allow=allow)
        if trained.adapter is None:
            raise ValueError(f"{path} holds a whole denoiser, and no adapter; use DiffusionModule")
        record = checkpoint[cls.record_key]
        module = cls(
            **{"base": record["base"]["path"], "adapter": trained.adapter.adapter, "allow": allow, **arguments}
        )
        module.codec = trained.codec
        module.copy_data_description(trained)
        return module

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # has overloads
        """The weights of the adapter and their averages; those of the base are in its own files."""
        own = self._own_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in own}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of the adapter and their averages, which must all be there."""
        own = self._own_names()
        frozen = {name: value for name, value in super().state_dict().items() if name not in own}
        return super().load_state_dict({**state_dict, **frozen}, strict=strict, assign=assign)

    def _own_names(self) -> set[str]:
        return {prefix + name for name in self.adapter_names for prefix in ("", EMA)}


def _codec_to_train_with(codec: Codec) -> Codec:
    """A codec that keeps its autoencoder; one that was read lets it go after each use."""
    if codec.space is None or not isinstance(codec, LatentCodec):
        return codec
    kept = LatentCodec(codec.folder)
    kept.space = codec.space
    return kept
