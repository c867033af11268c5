"""Segmenters in folders that `save_pretrained` of segmentation_models_pytorch's Unet wrote."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unet_diffusion.inference.record_checks import no_larger_than
from unet_diffusion.inference.segmentation_files import BINARY, WINDOW_SIZE
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.encoder_unet import EncoderUNet
from unet_diffusion.runtime.atomic_files import field_of, read_json
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.tensor_files import read_safetensors

Normalization = Literal["imagenet", "unit"]
KIND = "_model_class"  # field of config.json in which the package names the class
WEIGHTS = "model.safetensors"
# Of images in [0, 1], by which torchvision and timm normalise for nearly all of their encoders.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES = {  # field of config.json -> its only value that is read, and what to do about another
    KIND: ("Unet", "other networks of the package are not read"),
    "activation": (None, "if it is the sigmoid of one score or the softmax of several, set it to null: the weights are "
                         "the same, and probabilities are made of the scores before it"),
    "aux_params": (None, "save the network without its head for classification"),
}  # fmt: skip
HEAD = ("segmentation_head.0.weight", "segmentation_head.0.bias")
SAID_OTHERWISE = (KIND, "in_channels", "classes", "encoder_name", "encoder_weights", "activation", "aux_params")


def holds_encoder_unet(folder: Path) -> bool:
    """Whether a folder holds a network of segmentation_models_pytorch."""
    config = folder / "config.json"
    return config.is_file() and KIND in read_json(config)


def encoder_segmenter(
    folder: Path, *, normalization: Normalization | None, window_size: int | None = None
) -> Segmenter:
    """The segmenter in a folder of segmentation_models_pytorch, float32 on the CPU and in eval mode.

    One score, or two, are background and foreground; more are classes, which are named by their numbers.

    Args:
        folder: The folder, with config.json and model.safetensors.
        normalization: What the network was trained on: "unit" for images in [0, 1], or "imagenet" for these
            minus the mean of ImageNet (0.485, 0.456, 0.406), divided by its deviation (0.229, 0.224, 0.225).
        window_size: Height and width in pixels of the tiles of larger images; None: 512.

    Raises:
        FileNotFoundError: If there are no weights in safetensors.
        ImportError: If the package is missing.
        ValueError: If the normalization is not given, or the network is not a plain Unet.
    """
    path = folder / "config.json"
    config = read_json(path)
    for name, (rule, fix) in RULES.items():
        if config.get(name) != rule:
            raise ValueError(f"{name} must be {json.dumps(rule)} in {path}, got {json.dumps(config.get(name))}; {fix}")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS}, and does not; save_pretrained writes it")
    weights = read_safetensors(folder / WEIGHTS)
    scores = field_of(config, "classes", path)
    is_binary = scores <= len(BINARY)
    in_channels = field_of(config, "in_channels", path)
    with no_larger_than(weights):
        unet = EncoderUNet(
            in_channels,
            max(scores, len(BINARY)),
            field_of(config, "encoder_name", path),
            options={key: value for key, value in config.items() if key not in SAID_OTHERWISE},
            **_moments(normalization, in_channels, folder),
        )
        try:
            unet.unet.load_state_dict(_with_two_scores(weights))
        except RuntimeError as error:
            raise ValueError(f"the weights in {folder} do not fit its config.json: {in_words(error)}") from error
    return Segmenter(
        unet=unet.eval(),
        kind="binary" if is_binary else "classes",
        class_names=BINARY if is_binary else [str(number) for number in range(scores)],
        timestep=None,
        stretch=False,
        window_size=window_size or WINDOW_SIZE,
    )


def _moments(normalization: Normalization | None, in_channels: int, folder: Path) -> dict[str, Any]:
    """What images in [0, 1] are normalised by."""
    if normalization is None:
        raise ValueError(f"normalization must be given for {folder}, as its files do not say it: unit for a network "
                         "that saw images in [0, 1], imagenet if they were normalised as ImageNet's. unet-diffusion "
                         "import takes it, and so does ud.load")  # fmt: skip
    if normalization == "unit":
        return {}
    if in_channels != len(IMAGENET_MEAN):
        raise ValueError(f"normalization imagenet is for images of 3 channels, got {in_channels}; the other is unit")
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _with_two_scores(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights for two scores where there is one: a logit is the difference of two scores, of which one is 0."""
    if len(weights[HEAD[0]]) > 1:
        return weights
    return weights | {key: torch.cat([torch.zeros_like(weights[key]), weights[key]]) for key in HEAD}
