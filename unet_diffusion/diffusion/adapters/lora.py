"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): products of two narrow matrices beside frozen weights.

A projection W x becomes W x + alpha / r B A x, where A has r rows and B r columns and starts at 0, so that training
begins with the base. The layers are those of the package peft, in which diffusers' pipelines load them, too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import Adapter
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.models.unet import PixelNetwork

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # projections of the network's attention, as in diffusers' examples
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # and of the attention of CLIP's text encoder
NAME = "default"  # of the adapter within the layers of peft
ENCODER = ".encoder."  # ends the part of a name that leads from the conditions to a text encoder


class LoRA(Adapter):
    """Low-rank changes of the attention projections of a denoiser, W + alpha / rank B A.

    Args:
        rank: Rows r of A and columns of B.
        alpha: Scale of the change, in units of 1 / rank; None takes rank, which is a scale of 1.
        dropout: Probability of zeroing an entry of x before A, in training.
        text_encoder: Whether the attention of the text encoder of captions changes, too.

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
        texts = [condition for condition in conditions if isinstance(condition, TextTokens)]
        if not texts:
            raise ValueError("text_encoder is for a denoiser of captions, and the base takes none; leave it out")
        for text in texts:
            self._inject(text.encoder, TEXT_ATTENTION, "the text encoder has no attention, which LoRA changes")

    def _inject(self, network: nn.Module, targets: tuple[str, ...], otherwise: str) -> None:
        peft = peft_package()
        if not any(name.endswith(targets) for name, _ in network.named_modules()):
            raise ValueError(f"{otherwise}; choose another base")
        peft.inject_adapter_in_model(peft.LoraConfig(**self._peft_config(targets)), network, adapter_name=NAME)

    def _peft_config(self, targets: tuple[str, ...]) -> dict[str, Any]:
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
        from diffusers import StableDiffusionPipeline  # it takes seconds to import

        layers: dict[str, dict[str, Tensor]] = {"unet": {}, "text": {}}
        for name, value in weights.items():
            part, _, inner = name.replace(f".{NAME}.", ".").partition(".")
            if part == "conditions":  # diffusers before transformers 5 has text_model in its names
                layers["text"][f"text_model.{inner.partition(ENCODER)[2]}"] = value.contiguous()
            else:
                layers["unet"][inner] = value.contiguous()
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers["unet"],
            text_encoder_lora_layers=layers["text"],
            unet_lora_adapter_metadata=self._peft_config(ATTENTION),
            text_encoder_lora_adapter_metadata=self._peft_config(TEXT_ATTENTION),
        )


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
