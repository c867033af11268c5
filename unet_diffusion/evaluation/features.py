"""What turns images into features, which sets of images are compared by; nothing is downloaded unless it is named."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.evaluation.own_features import SETTINGS, own_features
from unet_diffusion.evaluation.selections import Selection
from unet_diffusion.runtime.pictures import CHANNELS, over_white, to_uint8

FeatureName = Literal["own", "inception", "dinov2", "clip"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity, in the cache of torch.hub
SMALL_BATCH = 32  # of the pretrained networks, which take images of 224 or 299 pixels
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation that DINOv2 was trained with
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # those of CLIP


@dataclass(frozen=True)
class Features:
    """A way to make features.

    Args:
        about: The network, the resizing and the number of features, for people.
        network: Images (N, C, H, W) in [-1, 1] -> (N, d).
        batch_size: The number of images at once.
        texts: Captions -> (N, d), to compare with the features of images; None: they cannot be compared with captions.
    """

    about: str
    network: Callable[[Tensor], Tensor]
    batch_size: int
    texts: Callable[[list[str]], Tensor] | None = None

    @torch.no_grad()
    def of(self, images: Selection, *, progress: bool = True) -> Tensor:
        """The features of images, (N, d) float32.

        Args:
            images: The images.
            progress: Whether a progress bar is shown.
        """
        bar = tqdm(images.batches(self.batch_size), "features", -(-len(images) // self.batch_size), unit="batch",
                   leave=False, disable=not progress)  # fmt: skip
        return torch.cat([self.network(batch).float() for batch in bar])


def features_named(
    name: FeatureName, weights: str | None, train: Selection, folder: Path | None, *, progress: bool = True
) -> Features:
    """The features of this name.

    Args:
        name: "own" trains a small network on the images; the others are pretrained.
        weights: The weights of a pretrained network: for inception the file of torch-fidelity, for dinov2 and clip a
            folder of transformers, or a name on the hub. None takes what torch.hub has downloaded before, for
            inception only.
        train: The training images.
        folder: Where a trained network is kept; None: nowhere.
        progress: Whether progress is shown.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If weights are given for "own", or they are of something else.
    """
    if name == "own":
        if weights is not None:
            raise ValueError("features_weights is for pretrained features, and these are trained on your images; give "
                             "features, too, such as inception")  # fmt: skip
        network, key = own_features(train, folder, progress=progress)
        size = "images as they are" if network.factor == 1 else f"images averaged down by {network.factor}"
        about = f"own: {SETTINGS['num_features']} of a network trained on these images ({key}), {size}"
        return Features(about, network, 256)
    return _inception(weights) if name == "inception" else _transformer(name, weights)


def _inception(weights: str | None) -> Features:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
    if not file.is_file():
        raise FileNotFoundError(
            f"features inception needs the weights of torch-fidelity, {INCEPTION_FILE}, and there is no {file}; "
            "download it from github.com/toshas/torch-fidelity/releases, and give it with features_weights"
        )
    plain = io.BytesIO()  # torch-fidelity's own loading would run code of the file
    torch.save(torch.load(file, map_location="cpu", weights_only=True), plain)
    plain.seek(0)
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=plain)

    def features(images: Tensor) -> Tensor:
        made: Tensor = extractor(to_uint8(_as_rgb(images)))[0]
        return made

    about = f"inception: 2048 of Inception-v3 as in FID ({file.name}), bytes, bilinear to 299 as TensorFlow 1"
    return Features(about, features, SMALL_BATCH)


def _transformer(name: str, weights: str | None) -> Features:
    if weights is None:
        raise FileNotFoundError(f"features {name} needs a network of transformers; give its folder, or its name on "
                                "the hub, with features_weights")  # fmt: skip
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    kinds: dict[str, Any] = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}
    model = kinds[name].from_pretrained(weights).eval().requires_grad_(False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET if name == "dinov2" else CLIP))
    side = 224  # what both are used with, whatever their position embeddings were trained at

    def features(images: Tensor) -> Tensor:
        resized = F.interpolate(_as_rgb(images), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        made: Any = model(pixel_values=((resized + 1) / 2 - mean) / std)
        chosen: Tensor = made.pooler_output if name == "dinov2" else made.image_embeds
        return chosen

    about = f"{name}: of {weights}, bicubic with antialiasing to {side}"
    return Features(about, features, SMALL_BATCH, _texts(weights) if name == "clip" else None)


def _texts(weights: str) -> Callable[[list[str]], Tensor]:
    """The embeddings of captions by CLIP."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(weights)
    model = CLIPTextModelWithProjection.from_pretrained(weights).eval().requires_grad_(False)

    def texts(captions: list[str]) -> Tensor:
        parts = [captions[first : first + SMALL_BATCH] for first in range(0, len(captions), SMALL_BATCH)]
        tokens = [tokenizer(part, padding="max_length", truncation=True, return_tensors="pt") for part in parts]
        return torch.cat([model(**one).text_embeds for one in tokens])

    return texts


def _as_rgb(images: Tensor) -> Tensor:
    """Images in colour, see `over_white`.

    Raises:
        ValueError: If there are other numbers of channels, which only features of one's own take.
    """
    channels = images.shape[1]
    if channels not in CHANNELS:
        raise ValueError(f"pretrained features are of images of 1, 3 or 4 channels, got {channels}; take features own")
    return over_white(images)
