"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): products of two narrow matrices beside frozen weights.

A projection W x becomes W x + alpha / r B A x, where A has r rows and B r columns and starts at 0, so that training
begins with the base. The layers are those of the package peft, in which diffusers' pipelines load them, too.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import Adapter
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.models.unet import PixelNetwork

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # projections of the network's attention, as in diffusers' examples
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # and of the attention of CLIP's text encoder
NAME = "default"  # of the adapter within the layers of peft
ENCODER = ".encoder."  # ends the part of a name that leads from the conditions to a text encoder
SECOND = ".second.encoder."  # and to the second one of Stable Diffusion XL


class LoRA(Adapter):
    """Low-rank changes of the attention projections of a denoiser, W + alpha / rank B A.

    Args:
        rank: Rows r of A and columns of B.
        alpha: Scale of the change, in units of 1 / rank; None takes rank, which is a scale of 1.
        dropout: Probability of zeroing an entry of x before A, in training.
        text_encoder: Whether the attention of the text encoder of captions changes, too, or of both encoders of Stable
            Diffusion XL.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self, rank: int = 4, *, alpha: float | None = None, dropout: float = 0.0, text_encoder: bool = False
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}; leave it out for a scale of 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.config = {"rank": rank, "alpha": alpha, "dropout": dropout, "text_encoder": text_encoder}
        self.scale = (rank if alpha is None else alpha) / rank

    def add(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        self._inject(unet, ATTENTION, f"{type(unet).__name__} has no attention, which LoRA changes")
        if not self.config["text_encoder"]:
            return
        targets = [target for condition in conditions for target in _text_targets(condition)]
        if not targets:
            raise ValueError("text_encoder is for a denoiser of captions, and the base takes none; leave it out")
        for encoder, names in targets:
            self._inject(encoder, names, "the text encoder has no attention, which LoRA changes")

    def _inject(self, network: nn.Module, targets: tuple[str, ...], otherwise: str) -> None:
        peft = peft_package()
        if not any(name.endswith(targets) for name, _ in network.named_modules()):
            raise ValueError(f"{otherwise}; choose another base")
        peft.inject_adapter_in_model(peft.LoraConfig(**self._peft_config(targets)), network, adapter_name=NAME)

    def _peft_config(self, targets: Iterable[str]) -> dict[str, Any]:
        rank = self.config["rank"]
        return {
            "r": rank,
            "lora_alpha": self.scale * rank,
            "lora_dropout": self.config["dropout"],
            "target_modules": list(targets),
        }

    def merge(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        for network in (unet, conditions):
            merge_layers(network)

    def save_pretrained(self, unet: PixelNetwork, weights: Mapping[str, Tensor], folder: Path) -> None:
        from diffusers import StableDiffusionXLPipeline  # it takes seconds to import, and writes both kinds

        layers: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
        for name, value in weights.items():
            part, _, inner = name.replace(f".{NAME}.", ".").partition(".")
            if part == "conditions":  # diffusers before transformers 5 has text_model in its names
                encoder = "text_encoder_2" if SECOND in inner else "text_encoder"
                layers[encoder][f"text_model.{inner.partition(ENCODER)[2]}"] = value.contiguous()
            else:
                layers["unet"][inner] = value.contiguous()
        StableDiffusionXLPipeline.save_lora_weights(
            folder,
            **{f"{network}_lora_layers": changes for network, changes in layers.items()},
            unet_lora_adapter_metadata=self._peft_config(ATTENTION),
            text_encoder_lora_adapter_metadata=self._peft_config(_targets_in(layers["text_encoder"])),
            text_encoder_2_lora_adapter_metadata=self._peft_config(TEXT_ATTENTION),
        )


def _text_targets(condition: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """The text encoders of a condition, each with the endings of the names of the projections that are changed."""
    if isinstance(condition, TextTokens):
        yield condition.encoder, TEXT_ATTENTION
    elif isinstance(condition, XLText):
        # The state before the last layer of the first encoder is all that counts of it.
        layers = range(condition.first.encoder.config.num_hidden_layers - 1)
        yield condition.first.encoder, tuple(f"layers.{i}.self_attn.{name}" for i in layers for name in TEXT_ATTENTION)
        yield condition.second.encoder, TEXT_ATTENTION


def _targets_in(layers: Mapping[str, Tensor]) -> list[str]:
    """The endings of the names of projections that have a change in a file, with the numbers of their layers."""
    return sorted({name.partition(".lora_")[0].removeprefix("text_model.encoder.") for name in layers})


def merge_layers(network: nn.Module) -> None:
    """Add the changes of all LoRA layers to the weights of their projections, W + alpha / r B A, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            network.set_submodule(name, cast(nn.Module, layer.get_base_layer()))
    for module in network.modules():
        vars(module).pop("peft_config", None)  # peft keeps it where it has put layers


def peft_package() -> Any:
    """The package peft.

    Raises:
        ImportError: If it is missing; the message names the extra.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs the package peft; install it with pip install "unet-diffusion[lora]"') from error
    return peft
