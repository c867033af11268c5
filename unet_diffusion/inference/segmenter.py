"""A trained segmenter, which makes masks."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unet_diffusion.data.scaling import to_float
from unet_diffusion.inference.init_images import check_tensor, read_at_its_own_size
from unet_diffusion.inference.record import explained, network_record, network_with_weights, write_checkpoint
from unet_diffusion.inference.record_checks import check_record, no_larger_than
from unet_diffusion.inference.running import ExportFormat, Running, StrPath
from unet_diffusion.inference.sample_options import ImageLike
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.hub import download
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.tensor_files import is_single_file_name
from unet_diffusion.segmentation.labels import (
    DISTANCE,
    MIN_SIZE,
    NUM_BESIDE,
    NUM_CLASSES,
    THRESHOLD,
    Kind,
    check_threshold,
    instances_from,
    mask_from,
    probabilities_in,
)
from unet_diffusion.segmentation.object_size import MOST_SCALING, median_diameter, scale_to, scaled_image, scaled_size
from unet_diffusion.segmentation.prediction import predicted_maps

NUM_LOOKS = 2  # to see how large the objects of an image are
LEAST_SEEN = 12  # pixels of an object that counts then: a disc of the least diameter that can be wanted
FIELDS = (  # of a record, beside the network
    *("kind", "class_names", "timestep", "stretch", "object_diameter", "window_size", "settings", "threshold"),
    "min_size",
)


def fields_of(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Segmenter`, but for the network, from the record that `Segmenter.record` made."""
    return {**{name: record[name] for name in FIELDS}, "values": PixelValues.from_plain(record["values"])}


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of an image.

    Args:
        maps: The maps that the network gives, as `Segmenter.maps`.
        kind: The meaning of the classes, as in `Segmenter`.
        class_names: The name of each class.
        threshold: The foreground is where its probability is larger; classes have no threshold.
        min_size: Least number of pixels in an object; smaller objects are left out.
    """

    maps: NDArray[np.float32]
    kind: Kind
    class_names: list[str]
    threshold: float = THRESHOLD
    min_size: int = MIN_SIZE

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """The probability of each class at each pixel, (K, H, W)."""
        return probabilities_in(self.maps, self.kind)

    @property
    def distances(self) -> NDArray[np.float32] | None:
        """The distance from the edge of the object, (H, W), where 1 is 6 pixels and more; None: the kind has none."""
        return self.maps[DISTANCE] if self.kind == "instances" else None

    @property
    def affinities(self) -> NDArray[np.float32] | None:
        """How surely each pixel and that at each of OFFSETS are of one object, (K, H, W); None: the kind has none."""
        return self.maps[NUM_CLASSES[self.kind] :] if self.kind == "affinities" else None

    @property
    def classes(self) -> NDArray[np.uint8]:
        """The mask, (H, W): 255 for foreground, or with kind "classes" the index of the likeliest class."""
        return mask_from(self.maps, self.kind, threshold=self.threshold)

    @cached_property
    def instances(self) -> NDArray[np.int32]:
        """The number of the object at each pixel, (H, W); 0 is background.

        Raises:
            ValueError: If the kind is "classes", which has no objects.
        """
        return instances_from(self.maps, self.kind, min_size=self.min_size, threshold=self.threshold)


@dataclass(repr=False)
class Segmenter(Running):
    """A trained network for segmentation and its settings. `unet_diffusion.load` reads one from files.

    Args:
        unet: The network, called as `unet(x, t)` for scores, with its averaged (EMA) weights.
        kind: "binary" (background and foreground), "classes", "instances" (background, cell and cell border; the
            network gives distances, too), or "affinities" (background and foreground; the network gives affinities).
        class_names: The name of each class.
        timestep: The timestep for a network that was a denoiser; None: the network takes no timestep.
        stretch: Scale grey values by each image's 1st and 99.8th percentile instead of the range of its type.
        object_diameter: The median diameter of the objects, in pixels, to which images are scaled; None: they keep
            their size.
        window_size: Height and width of the training windows in pixels.
        settings: The settings of the training as plain values.
        speed: The speed that the network was trained at.
        threshold: The foreground is where its probability is larger; training fits it. Classes have none.
        min_size: Least number of pixels in an object, which training fits, too.
        values: What the numbers in the files of its images mean, and which channels pictures show.

    Raises:
        ValueError: If class_names or timestep do not fit the network, or threshold or min_size are out of range.
    """

    unet: PixelNetwork
    kind: Kind
    class_names: list[str]
    timestep: int | None
    stretch: bool
    window_size: int
    object_diameter: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    speed: Speed = "plain"
    threshold: float = THRESHOLD
    min_size: int = MIN_SIZE
    values: PixelValues = field(default_factory=PixelValues)

    def __post_init__(self) -> None:
        num_scores = self.unet.config.get("out_channels") or self.unet.in_channels
        num_classes = NUM_CLASSES.get(self.kind, len(self.class_names))
        expected = num_classes + NUM_BESIDE[self.kind]
        with_denoising = expected + self.unet.in_channels  # of a network that learnt to denoise beside
        if num_scores not in (expected, with_denoising) or len(self.class_names) != num_classes:
            raise ValueError(
                f"a segmenter of kind {self.kind} must have {num_classes} class_names and {expected} scores of the "
                f"network, or {with_denoising} with those to denoise, got {len(self.class_names)} and {num_scores}"
            )
        if (self.timestep is None) != (self.unet.time_embedding is None):
            rule = "must be None for a network without timestep" if self.unet.time_embedding is None else "must be set"
            raise ValueError(f"timestep {rule}, got {self.timestep}")
        check_threshold("binary", self.threshold, self.min_size)

    @property
    def num_maps(self) -> int:
        """The number of maps that the network gives, its first outputs; others denoise."""
        return len(self.class_names) + NUM_BESIDE[self.kind]

    @torch.inference_mode()
    def segment(
        self,
        image: ImageLike,
        *,
        views: bool = False,
        diameter: float | None = None,
        threshold: float | None = None,
        min_size: int | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> Segmentation:
        """The classes, probabilities and objects of an image of any size.

        Args:
            image: A file, a PIL image, an array (H, W[, C]) of 8 or 16 bits or in [0, 1], or a tensor (C, H, W)
                in [-1, 1], or stretched if the segmenter stretches images. Numbers beyond the range of values of
                the training are not clipped. A file must hold one image;
                `unet-diffusion segment` segments all pages of a stack.
            views: Average over the eight rotated and mirrored views, which takes eight times as long.
            diameter: The typical diameter of the image's objects in pixels, for a segmenter with `object_diameter`;
                None: the image is segmented once or twice to see it, and then at the right scale.
            threshold: The foreground is where its probability is larger; None: the segmenter's own.
            min_size: Least number of pixels in an object; smaller objects are left out. None: the segmenter's own.
            progress: Called with the share of the image that is done, above 0 and up to 1.

        Raises:
            ValueError: If the image cannot be read or has several pages, the channels or the range of a tensor do not
                fit, the threshold, the size or the diameter is out of range, or the kind is "classes", which has
                none of them, or the segmenter scales no images.
            FileNotFoundError: If there is no such file.
        """
        check_threshold(self.kind, threshold, min_size)
        self.check_diameter(diameter)
        channels = self.unet.in_channels
        if not isinstance(image, Tensor):
            pixels = read_at_its_own_size(image, channels, self.values.value_range)
            image = to_float(pixels, stretch=self.stretch)
        elif image.ndim != 3 or image.shape[0] != channels or not image.numel():
            raise ValueError(f"image as a tensor must be ({channels}, H, W), got {tuple(image.shape)}")
        else:
            check_tensor("image", image, is_bounded=not self.stretch and self.values.value_range is None)
        threshold = self.threshold if threshold is None else threshold
        min_size = self.min_size if min_size is None else min_size
        maps = self.maps(image, views=views, diameter=diameter, threshold=threshold, progress=progress).numpy()
        return Segmentation(maps, self.kind, self.class_names, threshold, min_size)

    def check_diameter(self, diameter: float | None) -> None:
        """Check a diameter of objects that is given by hand.

        Raises:
            ValueError: If it is out of range, or the segmenter scales no images.
        """
        if diameter is not None and self.object_diameter is None:
            raise ValueError(f"diameter is for a segmenter that scales images, got {diameter}; leave it out, or train "
                             "one with data.targets.object_diameter")  # fmt: skip
        if diameter is None or self.object_diameter is None:
            return
        least, most = self.object_diameter / MOST_SCALING, self.object_diameter * MOST_SCALING
        if not least <= diameter <= most:
            raise ValueError(f"diameter must be from {least:g} to {most:g} pixels, as images are scaled by at most "
                             f"{MOST_SCALING:g}, got {diameter:g}; scale the image before")  # fmt: skip

    @torch.no_grad()
    def maps(
        self,
        image: Tensor,
        *,
        views: bool = False,
        diameter: float | None = None,
        threshold: float | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> Tensor:
        """The probability of each class at each pixel, and then distances or affinities, (K, H, W) on the CPU.

        Args:
            image: Image of any size, (C, H, W) in [-1, 1].
            views: Average over the eight rotated and mirrored views.
            diameter: As in `segment`.
            threshold: The probability of the foreground that is used to see how large objects are; None: the
                segmenter's own.
            progress: Called with the share of the image that is done, above 0 and up to 1.
        """
        if self.object_diameter is None:
            return self._maps_of(image, views=views, progress=progress)
        size, looks = (image.shape[1], image.shape[2]), NUM_LOOKS if diameter is None else 0
        for number in range(looks):  # the second sees objects that are nearly of the right size
            factor = scale_to(self.object_diameter, diameter)
            scaled = scaled_image(image, scaled_size(size, factor))
            maps = self._maps_of(scaled, progress=_part(progress, number, looks + 1))
            seen = median_diameter(
                instances_from(maps.numpy(), self.kind, threshold=threshold or self.threshold, min_size=LEAST_SEEN)
            )
            diameter = diameter if seen is None else seen / factor
            if scale_to(self.object_diameter, diameter) == factor:  # the next look would be the same
                if views:
                    break
                if progress is not None:
                    progress(1.0)
                return scaled_image(maps, size)
        scaled = scaled_image(image, scaled_size(size, scale_to(self.object_diameter, diameter)))
        return scaled_image(self._maps_of(scaled, views=views, progress=_part(progress, looks, looks + 1)), size)

    def _maps_of(
        self, image: Tensor, *, views: bool = False, progress: Callable[[float], object] | None = None
    ) -> Tensor:
        """The maps of an image at its own size."""
        with self._context():
            return predicted_maps(
                self.unet,
                image,
                num_classes=len(self.class_names),
                num_maps=self.num_maps,
                has_affinities=self.kind == "affinities",
                timestep=self.timestep,
                window_size=self.window_size,
                views=views,
                device=self.device,
                progress=progress,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint file that `load` reads, and from which `fit --ckpt_path` continues with a new optimiser.

        Raises:
            FileExistsError: If the file exists; nothing is overwritten.
        """
        write_checkpoint(path, "segmenter", self.record(), {"unet": self.unet})

    def record(self) -> dict[str, Any]:
        """The plain values that a checkpoint holds beside the weights."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {"unet": network_record(self.unet), **fields, "values": self.values.plain()}

    def _export(self, folder: StrPath, format: ExportFormat, *, overwrite: bool) -> None:
        if is_single_file_name(folder):
            from unet_diffusion.diffusers_io.single_file.segmenters import export_segmenter_file

            export_segmenter_file(self.unet, self.record(), folder, overwrite=overwrite)
            return
        if format in ("onnx", "torch"):
            from unet_diffusion.inference.portable import export_segmenter

            metadata = {name: value for name, value in self.record().items() if name != "unet"} | {"settings": {}}
            export_segmenter(self.unet, metadata, folder, format=format, overwrite=overwrite)
            return
        self.save_pretrained(folder, overwrite=overwrite)

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder with config.json, model.safetensors and README.md, which `load` and `from_pretrained` read.

        Args:
            folder: The folder to make; it appears whole or not at all.
            overwrite: Replace the folder, if everything in it was exported there.

        Raises:
            FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        """
        from unet_diffusion.diffusers_io.segmenter_folder import save_segmenter_folder

        save_segmenter_folder(self.record(), self.unet.state_dict(), folder, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | os.PathLike[str], *, revision: str | None = None, allow: Sequence[str] = ()
    ) -> "Segmenter":
        """The segmenter in a folder of `save_pretrained`, or of that name on the hub.

        Args:
            name_or_folder: A folder, or owner/name.
            revision: Branch, tag or commit of a model on the hub; None: the main branch.
            allow: Further modules that you trust, whose classes the folder may name.

        Raises:
            FileNotFoundError: If there is no such segmenter, or the hub cannot be reached.
            ValueError: If the folder is damaged, or holds something else.
        """
        from unet_diffusion.diffusers_io.segmenter_folder import holds_segmenter, read_segmenter_folder

        folder = download(str(name_or_folder), revision) if is_hub_name(name_or_folder) else Path(name_or_folder)
        if not holds_segmenter(folder):
            raise ValueError(f"{name_or_folder} must hold a segmenter of save_pretrained, with config.json")
        record, weights = read_segmenter_folder(folder)
        with explained(folder, "segmenter"), no_larger_than(weights):
            check_record(record, "segmenter")
            named = {f"ema_unet.{key}": value for key, value in weights.items()}
            return cls(unet=network_with_weights(record["unet"], named, allow), **fields_of(record))

    def __repr__(self) -> str:
        weights = sum(parameter.numel() for parameter in self.unet.parameters())
        return (
            f"Segmenter of {', '.join(self.class_names)}, {type(self.unet).__name__} of {weights / 1e6:.2f} M weights, "
            f"windows of {self.window_size} pixels; on {self.device} in {self.precision or 'float32'}"
        )

    def _modules_to_move(self) -> list[nn.Module]:
        return [self.unet]

    def _networks(self) -> list[tuple[nn.Module, Speed]]:
        return [(self.unet, self.speed)]


def _part(progress: Callable[[float], object] | None, number: int, total: int) -> Callable[[float], object] | None:
    """The progress within one of several parts of the work."""
    return None if progress is None else lambda share: progress((number + share) / total)
