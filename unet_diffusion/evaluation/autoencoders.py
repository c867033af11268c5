"""How good an autoencoder is: its reconstructions, whether its latents are fit for diffusion, and its codes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor, nn

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.evaluation.autoencoder_sections import (
    Qualities,
    code_section,
    latent_section,
    reconstruction_section,
    worst_section,
)
from unet_diffusion.evaluation.distances import LEAST_IMAGES, frechet_distance
from unet_diffusion.evaluation.image_quality import (
    PERCEPTUAL_FILES,
    PerceptualNet,
    lpips,
    perceptual_file,
    psnr,
    ssim,
)
from unet_diffusion.evaluation.latent_sums import LatentSums
from unet_diffusion.evaluation.result import Evaluation, Figure, Section
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.models.autoencoders import num_codes, num_latent_channels, quantize
from unet_diffusion.runtime.processes import ALONE, ProcessGroup

FeatureFunction = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], object]

BATCH = 32  # images at once
NUM_WORST = 8
LPIPS_SIDE = 32  # smaller images leave nothing for the last layers
NOWHERE = "Not measured: torch's cache has none of the weights {}, and nothing is downloaded."


@dataclass(frozen=True)
class Measured:
    """What is kept of a batch.

    Args:
        qualities: The number in the data, PSNR, SSIM and LPIPS of each image, (B, 4); NaN where there is none.
        latents: The sums over its latents.
        features: The features of the images and of their reconstructions, (2, B, d); None: they are not asked for.
    """

    qualities: np.ndarray
    latents: LatentSums
    features: np.ndarray | None


def evaluate_autoencoder(
    autoencoder: Autoencoder,
    data: ImageDataModule,
    *,
    subject: str = "",
    features: FeatureFunction | None = None,
    features_name: str = "",
    progress: Progress = lambda done, total: None,
    group: ProcessGroup = ALONE,
) -> Evaluation:
    """How good an autoencoder is on the validation images.

    Some images at a time are encoded and decoded; what is kept of them is numbers. Processes share the images out, and
    each returns the whole evaluation.

    Args:
        autoencoder: The autoencoder.
        data: The images that it was trained on, with the same split, or others of the same size.
        subject: What is evaluated, such as the run folder.
        features: Makes features, (B, d), of images, (B, C, H, W) in [-1, 1], for the Fréchet distance between images
            and reconstructions; None: there is no such figure.
        features_name: What the features are of, for people.
        progress: Called after each batch with how many images this process has done, and of how many.
        group: The processes that share the work.

    Raises:
        ValueError: If the images have another size or range of values than the autoencoder was trained on.
    """
    data.setup("fit")
    if data.image_shape != tuple(autoencoder.image_shape):
        raise ValueError(
            f"images must be as those that the autoencoder was trained on, {tuple(autoencoder.image_shape)}, got "
            f"{data.image_shape}; set image_size and channels of the source"
        )
    data.values.require_range_of(autoencoder.values, "the autoencoder was trained on")
    look = _Look(autoencoder, data, features, *_perceptual(data.image_shape))
    validated, others = data.val_indices.tolist(), _as_many_others(data) if features else []
    shares = group.shard(validated), group.shard(others)
    done, total = 0, sum(map(len, shares))
    measured: list[Measured] = []
    for numbers in _batches(shares[0]):
        measured.append(look.measured(numbers))
        done += len(numbers)
        progress(done, total)
    real: list[tuple[int, np.ndarray]] = []
    for numbers in _batches(shares[1]):
        real += zip(numbers, look.features_of(look.images(numbers)), strict=True)
        done += len(numbers)
        progress(done, total)
    measured, real = group.gather(measured), group.gather(real)
    table = np.concatenate([one.qualities for one in measured])
    order = np.argsort(table[:, 0])
    qualities = Qualities(*table[order].T)
    distance = None
    if features:
        pair = np.concatenate([one.features for one in measured if one.features is not None], axis=1)[:, order]
        rows = [row for _, row in sorted(real, key=lambda one: one[0])]
        distance = _distance(pair, np.stack(rows) if rows else None, features_name)
    latents = reduce(add, [one.latents for one in measured])
    codes = [code_section(latents.codes)] if len(latents.codes) else []
    sections = [
        reconstruction_section(qualities, look.perceptual_remark, look.perceptual_name, distance),
        latent_section(latents, has_codes=bool(codes)),
        *codes,
        _worst(look, qualities),
    ]
    return Evaluation(subject, _protocol(autoencoder, data, features_name if features else None), sections)


class _Look:
    """Reads, encodes and decodes images by number, and measures."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        data: ImageDataModule,
        features: FeatureFunction | None,
        perceptual: nn.Module | None,
        perceptual_name: str,
        perceptual_remark: str,
    ) -> None:
        self.autoencoder, self.features = autoencoder, features
        self.perceptual = None if perceptual is None else perceptual.to(autoencoder.device)
        self.perceptual_name, self.perceptual_remark = perceptual_name, perceptual_remark
        self.source, self.values, self.batches = data.source, data.values, data.source.batches(data.image_set)
        self.num_codes = num_codes(autoencoder.autoencoder)

    def images(self, numbers: list[int]) -> Tensor:
        return self.source.on_device(self.batches[numbers], None)["images"]

    def features_of(self, images: Tensor) -> np.ndarray:
        assert self.features is not None
        with torch.no_grad():
            return self.features(images).float().cpu().numpy()

    @torch.no_grad()
    def measured(self, numbers: list[int]) -> Measured:
        images = self.images(numbers)
        means, deviations = self.autoencoder.latent_moments(images)
        reconstructions = self.autoencoder.decode(means).clamp(-1, 1)
        codes = None
        if self.num_codes:
            codes = quantize(self.autoencoder.autoencoder, means.to(self.autoencoder.device))[2]
        columns = [
            torch.tensor(numbers),
            psnr(images, reconstructions),
            ssim(images, reconstructions),
            self._lpips(images, reconstructions),
        ]
        rows = torch.stack([torch.as_tensor(column).double().expand(len(numbers)) for column in columns], dim=1)
        features = None
        if self.features:
            features = np.stack([self.features_of(one) for one in (images, reconstructions)])
        return Measured(rows.numpy(), LatentSums.of(means, deviations, codes, self.num_codes), features)

    def _lpips(self, images: Tensor, reconstructions: Tensor) -> Tensor | float:
        if self.perceptual is None:
            return torch.nan
        device = self.autoencoder.device
        pair = (part.expand(-1, 3, -1, -1).to(device) for part in (images, reconstructions))
        return self.perceptual(*pair).flatten().cpu()


def _perceptual(image_shape: tuple[int, int, int]) -> tuple[nn.Module | None, str, str]:
    """The network of LPIPS that torch's cache has, its name, and why there is none."""
    channels, *sides = image_shape
    nets: list[PerceptualNet] = ["alex", "vgg", "squeeze"]  # the first is what its authors measure with
    net = next((name for name in nets if perceptual_file(name).is_file()), None)
    if channels not in (1, 3) or min(sides) < LPIPS_SIDE:
        return None, "", f"Not measured: it is of grey or RGB images of {LPIPS_SIDE} pixels and more."
    if net is None:
        return None, "", NOWHERE.format(" or ".join(PERCEPTUAL_FILES[name] for name in nets))
    return lpips(net), net, ""


def _distance(pair: np.ndarray, real: np.ndarray | None, name: str) -> Figure:
    """The Fréchet distance of reconstructions, beside that of as many other real images."""
    key, title = "rfid", "Fréchet distance of reconstructions (rFID)"
    images, reconstructions = map(torch.from_numpy, pair)
    count, size = images.shape
    if count < LEAST_IMAGES:
        remark = f"Not measured: there must be at least {LEAST_IMAGES} images to validate on (num_val), got {count}."
        return Figure(key, title, float("nan"), "lower", remark=remark)
    same = frechet_distance(torch.from_numpy(real), images) if real is not None else None
    remark = f"{name + ': ' if name else ''}{size} features of {count} images. Beside it: as many training images."
    if count < 2 * size:
        remark += (
            " It is too large, as there are fewer images than about twice the features: compare it with that figure "
            "and with other runs on these images only."
        )
    return Figure(key, title, frechet_distance(reconstructions, images), "lower", real=same, remark=remark)


def _as_many_others(data: ImageDataModule) -> list[int]:
    """As many training images as there are to validate on, evenly spaced; none if there are fewer."""
    count, train = len(data.val_indices), data.train_indices.tolist()
    if len(train) < count:
        return []
    return [train[place] for place in np.linspace(0, len(train) - 1, count).round().astype(int)]


def _worst(look: _Look, qualities: Qualities) -> Section:
    worst = np.lexsort((qualities.number, qualities.psnr))[:NUM_WORST]
    images = look.images(qualities.number[worst].astype(int).tolist())
    reconstructions = look.autoencoder.decode(look.autoencoder.encode(images)).clamp(-1, 1)
    return worst_section(images, reconstructions, qualities.psnr[worst], look.values)


def _batches(numbers: list[int]) -> Iterator[list[int]]:
    return (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))


def _protocol(autoencoder: Autoencoder, data: ImageDataModule, features: str | None) -> dict[str, str | int]:
    network = autoencoder.autoencoder
    return {
        "network": repr(autoencoder),
        "validation images": len(data.val_indices),
        "latent channels": num_latent_channels(network),
        "latents": "codes nearest to them" if num_codes(network) else "means of their distributions",
        **({} if features is None else {"features": features or "given by the caller"}),
        "intervals": "95 %, bootstrap over images, 1,000 draws",
    }
