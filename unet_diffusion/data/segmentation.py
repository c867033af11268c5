"""The data module of labelled images: random windows to train on, whole images to validate on.

A window is drawn from an image at random, deformed as in Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597,
section 3.1), and reaches beyond the image's border where it must, into its mirror image. A window is a function of
(seed, epoch, number of the draw) alone: workers decide nothing, and a resumed run sees what an uninterrupted one would.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unet_diffusion.data.base import SourceDataModule
from unet_diffusion.data.batches import Batch, OrderedBatches, ResumableLoader
from unet_diffusion.data.checking import num_cpus
from unet_diffusion.data.known import contents_of_pixels
from unet_diffusion.data.labelled import LabelledImages, LabelledSource, SyntheticPairs, listed
from unet_diffusion.data.scaling import percentiles, stretch_to_unit_range
from unet_diffusion.data.windows import DrawnWindow, WindowBatches, batches_of_run, ends_by_time, within_limit
from unet_diffusion.runtime.messages import first_few
from unet_diffusion.runtime.pictures import in_unit_range
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.segmentation.augmentation import Augmentation, sample_at
from unet_diffusion.segmentation.image_targets import ImageTargets
from unet_diffusion.segmentation.labels import MAX_CLASSES, NO_VALUE, Targets
from unet_diffusion.segmentation.object_size import scales_described, to_one_size

VAL_SHARE = 5  # by default a fifth of the images is kept for validation
SUBSET_KEY = 10**9  # with the seed: which images are the labelled ones; no run gets to an epoch of that number
OBJECT_KEY = 1  # with seed, epoch and number: whether a window holds an object, and which
UNLABELLED_KEY = 2  # likewise: the window of an image without a label


class SegmentationDataModule(SourceDataModule):
    """Batches of images, their classes and the weight of each pixel.

    Batches are {"images": float32 (B, C, H, W) in [-1, 1], "classes": int64 (B, H, W), "weights": float32 (B, H, W), 0
    where nothing is to be learnt, "index": int64 (B,)}: random windows; for targets with borders also "distances",
    float32 (B, H, W) in [0, 1], in parts of REACH; for those with affinities "instances", int32 (B, H, W), see
    `Targets.partners`; for `JointDenoising` "unlabelled", float32 (B, C, H, W): windows of images that are not held
    out, whether or not they have a label. In validation they are lists of `whole` images.

    Args:
        source: Where the labelled images come from: `PairedFiles`, or a class of your own, see `LabelledSource`.
        targets: How label images are read, and what the network learns from them.
        window_size: Height and width of a training window in pixels; the network must take it.
        batch_size: The number of windows with labels per batch and process.
        windows_per_image: The number of windows that are drawn from each training image in an epoch.
        num_val: The number of images kept for validation, the last by name, as neighbours in a stack are alike. None
            takes a fifth. With a number, files that are added move none that was trained on; a fifth grows with them.
        num_train: The number of the other images to train on, drawn by the seed; a larger number keeps the images of
            a smaller one. None takes all.
        num_fit: The number of these images, drawn by the seed, that are kept to fit the threshold and the least size of
            objects on; 0 fits them on images that are trained on. Targets of classes have none to fit, and take 0.
        object_share: The share of windows that are drawn about a pixel of an object, which would be rare in sparse
            images. The others are drawn anywhere.
        augmentation: How windows are deformed. None leaves them as they are.
        stretch: Whether each image's grey values are scaled from its 1st and 99.8th percentile, not from the range of
            its type. This suits 16-bit images that use little of the range, and sets of mixed brightness.
        synthetic: Drawn images with labels to train on at times, in place of real ones. None: there are none.
        num_workers: The number of processes that draw windows. 0 draws them in the training process.
        seed: Seed of the windows and their deformation.

    Raises:
        ValueError: If a number is out of range.
    """

    source: LabelledSource
    margin = 0  # of the network, in pixels: a window's prediction is smaller by it; set by the module that trains
    draws_unlabelled = False  # a window without a label beside each with one; set by the module, too

    def __init__(
        self,
        source: LabelledSource,
        targets: Targets,
        *,
        window_size: int = 256,
        batch_size: int = 8,
        windows_per_image: int = 16,
        num_val: int | None = None,
        num_train: int | None = None,
        num_fit: int = 0,
        object_share: float = 0.0,
        augmentation: Augmentation | None = None,
        stretch: bool = False,
        synthetic: SyntheticPairs | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(source, batch_size=batch_size, num_val=num_val, num_workers=num_workers, seed=seed)
        for name, value in (("window_size", window_size), ("windows_per_image", windows_per_image)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= object_share <= 1:
            raise ValueError(f"object_share must be from 0 to 1, got {object_share}")
        if num_fit and targets.kind == "classes":
            raise ValueError(f"num_fit must be 0 with label_format classes, which has no threshold, got {num_fit}")
        if synthetic is not None:
            synthetic.num_in(batch_size)  # refuses a share that gives none
        self.targets = targets
        self.window_size = window_size
        self.windows_per_image = windows_per_image
        self.num_train = num_train
        self.num_fit = num_fit
        self.object_share = object_share
        self.augmentation = augmentation
        self.stretch = stretch
        self.synthetic = synthetic
        self._images: LabelledImages | None = None
        self._sized: dict[int, Tensor] = {}  # images that are trained on, scaled to objects of one size
        self._first_synthetic = 0

    def setup(self, stage: str | None = None) -> None:
        """Load and check the images, once, split them, and work out the weights of their pixels.

        Args:
            stage: "fit" or None; another stage does not train, and loads no synthetic images.

        Raises:
            ValueError: If labels hold other values than the targets say, or the images are too few for the split.
        """
        if self._images is None:
            self._load()
        is_loaded = self._first_synthetic < len(self._pixels)
        if self.synthetic is not None and stage in ("fit", None) and not is_loaded:
            self._add_synthetic(self.synthetic)

    def _load(self) -> None:
        loaded = self.source.load(progress=self.shows_progress)
        self._check_labels(loaded)
        train, self.fit_indices, self.val_indices = self._split(len(loaded.images))
        self._balance = self.targets.balance([loaded.labels[i] for i in train.tolist()])
        self._classes = [torch.from_numpy(self.targets.classes(labels)) for labels in loaded.labels]
        self._check_classes(train, self.val_indices)
        held_out = {*self.fit_indices.tolist(), *self.val_indices.tolist()}
        # Images beside the labelled ones come after them: those without labels, and then synthetic ones.
        self._pixels = [*loaded.images, *self._not_held_out(loaded, held_out)]
        self._to_denoise = [index for index in range(len(self._pixels)) if index not in held_out]
        self._first_synthetic = len(self._pixels)
        self._ends = [percentiles(image) for image in self._pixels] if self.stretch else []
        self._learnt = self._learnt_of(dict(enumerate(self._pixels)), {i: loaded.labels[i] for i in train.tolist()})
        # One index a window of an epoch; windows of the same image are apart by the number of images.
        self.train_images = train
        self.train_indices = torch.arange(len(train) * self.windows_per_image)
        self.bound_batch_size(len(self.train_indices))
        self._images = loaded

    def _not_held_out(self, loaded: LabelledImages, held_out: set[int]) -> list[Tensor]:
        """The images without labels, but for copies of images that are fitted or validated on."""
        if not loaded.unlabelled:
            return []
        contents = set(contents_of_pixels([loaded.images[index] for index in held_out]))
        pairs = zip(loaded.unlabelled, contents_of_pixels(loaded.unlabelled), strict=True)
        return [image for image, content in pairs if content not in contents]

    def _learnt_of(self, images: Mapping[int, Tensor], labels: dict[int, NDArray[np.int32]]) -> dict[int, ImageTargets]:
        """The targets of images that are trained on, after these are scaled to objects of one size."""
        if self.targets.object_diameter is not None:
            for index, one in labels.items():
                instances, wanted = self.targets.instances(one), self.targets.object_diameter
                self._sized[index], labels[index] = to_one_size(images[index], one, instances, wanted)
        return {index: ImageTargets.of(self.targets, one, self._balance) for index, one in labels.items()}

    def _add_synthetic(self, synthetic: SyntheticPairs) -> None:
        """Append the synthetic images to the others."""
        drawn = synthetic.load(len(self._pixels[0]), progress=self.shows_progress)
        try:
            self._check_labels(drawn)
        except ValueError as error:
            raise ValueError(f"synthetic {synthetic.root}: {error}") from error
        numbers = range(len(self._pixels), len(self._pixels) + len(drawn.names))
        learnt = self._learnt_of(
            dict(zip(numbers, drawn.images, strict=True)), dict(zip(numbers, drawn.labels, strict=True))
        )
        sizes = zip(drawn.names, (learnt[i].classes.shape for i in sorted(learnt)), strict=True)
        if small := [f"{name} ({size[0]}x{size[1]})" for name, size in sizes if min(size) < self.window_size]:
            raise ValueError(
                f"synthetic images must have at least {self.window_size}x{self.window_size} pixels, as windows do, and "
                f"{len(small)} of {len(drawn.names)} are smaller: {first_few(small)}; make them with --image_size "
                f"{self.window_size}"
            )
        self._pixels += drawn.images
        self._learnt |= learnt
        self._hashes = None  # they were of the other images

    def summary(self) -> list[str]:
        """What was found, what is left out, what the labels hold and how images are split, a line each."""
        images = self.images.images
        sizes = sorted({(image.shape[1], image.shape[2]) for image in images}, key=math.prod)
        smallest, largest = (f"{height}x{width}" for height, width in (sizes[0], sizes[-1]))
        size = smallest if len(sizes) == 1 else f"{smallest} to {largest}"
        bits = " and ".join(str(8 * one) for one in sorted({image.element_size() for image in images}))
        chosen = f", {self.num_train} of them" if self.num_train is not None else ""
        factors = {self.images.names[i]: one.shape[1] / images[i].shape[1]
                   for i, one in self._sized.items() if i < len(images)}  # fmt: skip
        num_synthetic = len(self._pixels) - self._first_synthetic
        kept = f", {self.num_fit} of which thresholds are fitted on" if self.num_fit else ""
        return [
            f"found: {len(images)} labelled images, {len(images[0])} channels, {size} pixels, {bits} bits",
            f"left out: {self.images.left_out or 'nothing'}",
            f"labels: {self._labels_described()}",
            f"cut: windows of {self.window_size}x{self.window_size} pixels, {self.windows_per_image} an image and "
            "epoch; whole images to validate on",
            *([scales_described(factors, self.targets.object_diameter)] if self.targets.object_diameter else []),
            *([self.synthetic.described(num_synthetic, self.batch_size)] if self.synthetic and num_synthetic else []),
            *(
                [f"denoised: {len(self._to_denoise)} images, all that are not held out"]
                if self.draws_unlabelled
                else []
            ),
            f"split: {len(images) - len(self.val_indices)} to train on{chosen}{kept}, the last {len(self.val_indices)} "
            "by name to validate on",
        ]

    def _labels_described(self) -> str:
        """The share of each class, and how many labels hold no object, or nothing that is to be learnt."""
        counts = torch.stack([torch.bincount(one[one != NO_VALUE].long(), minlength=MAX_CLASSES)
                              for one in map(torch.flatten, self._classes)])  # fmt: skip
        totals = counts.sum(dim=0)
        class_names = self.targets.class_names
        shares = zip(class_names, (totals / totals.sum())[: len(class_names)].tolist(), strict=True)
        parts = [", ".join(f"{name} {100 * share:.3g} %" for name, share in shares)]
        is_ignored = counts.sum(dim=1) == 0
        is_background = ~is_ignored & (counts[:, 1:].sum(dim=1) == 0)
        for what, which in (("background alone", is_background), ("nothing but ignore_label", is_ignored)):
            names = [self.images.names[i] for i in which.nonzero().flatten().tolist()]
            parts += [f"{len(names)} hold {what} ({first_few(names)})"] if names else []
        return "; ".join(parts)

    @property
    def images(self) -> LabelledImages:
        """All images and labels, before the split."""
        if self._images is None:
            raise RuntimeError('the images are not loaded yet; call setup("fit") first')
        return self._images

    def names_and_contents(self) -> tuple[list[str], list[str]]:
        """The names and contents that `KnownImages` asks for; contents include the label image."""
        labels = contents_of_pixels([torch.from_numpy(one) for one in self.images.labels])
        contents = contents_of_pixels(self.images.images)
        more = contents_of_pixels(self._pixels[len(contents) :])  # synthetic ones and those without labels
        names = [*self.images.names, *(f"beside the labelled images, {number}" for number in range(len(more)))]
        return names, [*(f"{one}\n{label}" for one, label in zip(contents, labels, strict=True)), *more]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a training window."""
        return len(self.images.images[0]), self.window_size, self.window_size

    @property
    def values(self) -> PixelValues:
        """What the numbers in the files mean, and which channels pictures show."""
        first = self.images.images[0]
        return self.images.values or PixelValues.of_images(first.dtype, default_shown(len(first)))

    def classes(self, index: int) -> Tensor:
        """The class of each pixel of an image, (H, W) int16; NO_VALUE where there is no class."""
        return self._classes[index]

    def whole(self, index: int) -> Batch:
        """An image with its classes, whole, without a batch dimension and weights; NO_VALUE where there is no class."""
        classes = self._classes[index].long()
        return {"images": self._scaled(index), "classes": classes, "index": torch.tensor(index)}

    def window(self, drawn: DrawnWindow) -> Batch:
        """A random window of a training image, as a batch without its first dimension."""
        index, epoch, number = drawn
        generator = keyed_generator(self.seed, epoch, number)
        image = self._scaled(index, self._sized.get(index))
        size = (self.window_size, self.window_size)
        centre = self._centre(image.shape[1:], generator, self._drawn_pixel(drawn))
        augmentation = self.augmentation or NO_AUGMENTATION
        coordinates = augmentation.coordinates(size, centre, generator)
        pixels = self._pixels_at(image, coordinates, generator)
        batch = {"images": pixels, **self._learnt[index].sampled(coordinates), "index": torch.tensor(index)}
        return {**batch, "unlabelled": self._window_to_denoise(drawn)} if self.draws_unlabelled else batch

    def _window_to_denoise(self, drawn: DrawnWindow) -> Tensor:
        """A random window of an image that is not held out, (C, H, W), whether or not it has a label."""
        generator = keyed_generator(self.seed, *drawn[1:], UNLABELLED_KEY)
        chosen = int(torch.randint(len(self._to_denoise), (), generator=generator))
        image = self._scaled(self._to_denoise[chosen])
        centre = self._centre(image.shape[1:], generator, None)
        size = (self.window_size, self.window_size)
        coordinates = (self.augmentation or NO_AUGMENTATION).coordinates(size, centre, generator)
        return self._pixels_at(image, coordinates, generator)

    def _pixels_at(self, image: Tensor, coordinates: Tensor, generator: torch.Generator) -> Tensor:
        mode: Any = "nearest" if self.augmentation is None else "bicubic"
        return (self.augmentation or NO_AUGMENTATION).grey_values(sample_at(image, coordinates, mode=mode), generator)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of random windows; see `WindowBatches`.

        Raises:
            ValueError: If the trainer is to overfit batches, for which Lightning would replace the sampler, or if it
                might end on synthetic images.
        """
        self.refuse_overfit_batches()
        self.setup("fit")
        sampler = WindowBatches(
            self.train_indices,
            images=self.train_images,
            synthetic=self.synthetic,
            synthetic_images=torch.arange(self._first_synthetic, len(self._pixels)),
            seed=self.seed,
            **self.order(),
        )
        if self.synthetic is not None and self.trainer is not None:
            sampler.in_epoch = within_limit(self.trainer, len(sampler))
        self._check_end(len(sampler))
        workers = self.num_workers or 0
        return ResumableLoader(
            dataset=_Windows(self),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def _check_end(self, batches_per_epoch: int) -> None:
        """Refuse a run that ends on synthetic images, or whose end is not known."""
        if self.synthetic is None or self.trainer is None or getattr(self.trainer, "fast_dev_run", False):
            return
        if ends_by_time(self.trainer):
            raise ValueError("trainer.max_time must be left out with synthetic images, as it is not known whether such "
                             "a run ends on real ones; set trainer.max_steps or trainer.max_epochs")  # fmt: skip
        in_all = batches_of_run(self.trainer, batches_per_epoch)
        if self.synthetic.num_batches >= in_all:
            raise ValueError(
                f"num_batches of synthetic must be less than the {in_all:g} batches of the run, so that it ends on "
                f"real images, got {self.synthetic.num_batches}; {in_all * 2 // 3:g} is two thirds"
            )

    def val_dataloader(self) -> DataLoader[list[Batch]]:
        """The validation images, whole: lists of one, or of two where processes must have equally many batches."""
        sampler = OrderedBatches(self.val_indices, **{**self.order(), "batch_size": 1})
        return DataLoader(dataset=_WholeImages(self), sampler=sampler, batch_size=None)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which cannot be sent a trainer."""
        return {**self.__dict__, "trainer": None}

    def _scaled(self, index: int, sized: Tensor | None = None) -> Tensor:
        image, is_stretched = self._pixels[index], self.stretch and index < self._first_synthetic
        image = image if sized is None else sized
        return stretch_to_unit_range(image, self._ends[index]) if is_stretched else in_unit_range(image)

    def _drawn_pixel(self, drawn: DrawnWindow) -> tuple[int, int] | None:
        """The row and column of a pixel of an object that the window must hold; None: it is drawn anywhere."""
        index, epoch, number = drawn
        generator = keyed_generator(self.seed, epoch, number, OBJECT_KEY)
        share, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        learnt = self._learnt[index]
        if share >= self.object_share or not len(learnt.objects):
            return None
        pixel = int(learnt.objects[int(place * len(learnt.objects))])
        return divmod(pixel, learnt.classes.shape[1])

    def _centre(
        self, size: torch.Size, generator: torch.Generator, pixel: tuple[int, int] | None
    ) -> tuple[float, float]:
        """The centre, at whole pixels, of a window whose prediction lies within an image that is large enough.

        Args:
            size: Height and width of the image.
            generator: Generator of the random numbers.
            pixel: A pixel that lies in the prediction of the window, before it is deformed; None: any.
        """
        predicted = self.window_size - 2 * self.margin
        draws = torch.rand(2, generator=generator).tolist()
        centre = []
        for axis, side in enumerate(size):
            first, last = 0, max(side - predicted, 0)
            if pixel is not None:
                first, last = max(pixel[axis] - predicted + 1, 0), min(pixel[axis], last)
            start = first + int(draws[axis] * (last - first + 1))
            small = min(side - predicted, 0) // 2  # of an image that is smaller, the middle
            centre.append(start + small + (predicted - 1) / 2)
        return centre[0], centre[1]

    def _split(self, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
        """The images to train on, to fit thresholds on, and to validate on."""
        num_val = self.num_val if self.num_val is not None else max(num_images // VAL_SHARE, 1)
        if not 1 <= num_val < num_images:
            raise ValueError(f"num_val must be at least 1 and less than the {num_images} images, got {num_val}")
        rest = num_images - num_val
        if self.num_train is not None and not 1 <= self.num_train <= rest:
            raise ValueError(
                f"num_train must be from 1 to {rest}, the images not kept for validation, got {self.num_train}"
            )
        order = torch.randperm(rest, generator=keyed_generator(self.seed, SUBSET_KEY))
        order = order[: self.num_train]
        if not 0 <= self.num_fit < len(order):
            raise ValueError(f"num_fit must be from 0 to {len(order) - 1}, which leaves an image to train on, got "
                             f"{self.num_fit}")  # fmt: skip
        train, fit = order[: len(order) - self.num_fit], order[len(order) - self.num_fit :]
        return train.sort().values, fit.sort().values, torch.arange(rest, num_images)

    def _check_labels(self, loaded: LabelledImages) -> None:
        with ThreadPoolExecutor(num_cpus()) as pool:
            problems = pool.map(self.targets.check, loaded.labels)
            pairs = zip(loaded.names, problems, strict=True)
            wrong = [f"{name}: {problem}" for name, problem in pairs if problem is not None]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(loaded.names)} label images do not fit targets:{listed(wrong)}\n"
                "set label_format, num_classes or ignore_label to what the files hold"
            )

    def _check_classes(self, train: Tensor, val: Tensor) -> None:
        """Refuse labels of which nothing can be learnt, or on which nothing can be measured."""
        for what, indices in (("train", train), ("validate", val)):
            held = {number for i in indices.tolist() for number in self._classes[i].unique().tolist()} - {NO_VALUE}
            if not held:
                raise ValueError(f"all pixels of the {len(indices)} labels to {what} on are of ignore_label "
                                 f"{self.targets.ignore_label}; leave it out, or add labels")  # fmt: skip
            if what == "train" and len(held) == 1:
                (only,) = held
                raise ValueError(
                    f"labels to train on must hold two classes or more, and all pixels of the {len(indices)} are of "
                    f"class {self.targets.class_names[only]}; check the files of labels and label_format"
                )


class _Windows(Dataset[Batch]):
    def __init__(self, data: SegmentationDataModule) -> None:
        self.data = data

    def __getitem__(self, drawn: list[DrawnWindow]) -> Batch:
        windows = [self.data.window(one) for one in drawn]
        return {key: torch.stack([window[key] for window in windows]) for key in windows[0]}


class _WholeImages(Dataset[list[Batch]]):
    def __init__(self, data: SegmentationDataModule) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> list[Batch]:
        return [self.data.whole(index) for index in indices]


NO_AUGMENTATION = Augmentation(flip=False, rotation=0.0, elastic_sd=0.0)
