"""How good the samples of a denoiser are: near to real images, varied, of their class, and not learnt by heart."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.data import described
from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.evaluation.captions import caption_section
from unet_diffusion.evaluation.distances import (
    LEAST_IMAGES,
    distance_figures,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from unet_diffusion.evaluation.features import FeatureName, features_named
from unet_diffusion.evaluation.following import following_section
from unet_diffusion.evaluation.following_pictures import picture_by_name
from unet_diffusion.evaluation.following_scores import others_of_another_kind
from unet_diffusion.evaluation.intervals import interval_of_mean
from unet_diffusion.evaluation.judge import Judge
from unet_diffusion.evaluation.memorisation import memorisation
from unet_diffusion.evaluation.result import SHUFFLED, Evaluation, Figure, Picture, Section, Table
from unet_diffusion.evaluation.samples import SAMPLES, draw_samples, samples_in, samples_to_draw
from unet_diffusion.evaluation.selections import Selection, of_data
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import Sampling
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.pictures import image_grid
from unet_diffusion.runtime.processes import ALONE, ProcessGroup
from unet_diffusion.runtime.randomness import keyed_generator

SPLIT_SEED = 0  # of which training images are compared, the same ones for every model
LEAST_PER_CLASS = 50  # images of a class, drawn and real, below which its distances say nothing
NUM_NEIGHBOURS = 5  # that vote for the class of an image
LEAST_EXPECTED = 20  # samples of a class, below which chance may leave it out
RARE = 0.2  # of the images of a class that there should be: below it the class counts as missing
SHOWN = 36  # images in a grid


@dataclass(frozen=True)
class Compared:
    """Images, and what they look like to the network of the features.

    Args:
        images: The images.
        features: Their features, (N, d).
    """

    images: Selection
    features: Tensor

    def select(self, rows: Tensor) -> "Compared":
        """Some of the images, by their place."""
        return Compared(self.images.select(rows), self.features[rows])


def evaluate_denoiser(
    model: Denoiser | Path,
    data: ImageDataModule,
    *,
    output: Path,
    subject: str = "",
    num_images: int = 1000,
    features: FeatureName = "own",
    features_weights: str | None = None,
    sampling: Sampling | None = None,
    segmenter: Segmenter | None = None,
    overwrite: bool = False,
    group: ProcessGroup = ALONE,
    table: described.Table = described.USUAL,
) -> Evaluation:
    """How good samples are, as an evaluation that every process gets.

    Args:
        model: The denoiser that draws them, or a folder of images that somebody drew.
        data: The images that it was trained on. Those that it holds out for validation are the real images that the
            samples have to be as good as.
        output: The folder for the samples that are drawn and for the network of the features.
        subject: What is evaluated, for the heading.
        num_images: The number of samples to draw.
        features: What images are compared by.
        features_weights: The weights of pretrained features; see `features_named`.
        sampling: How samples are drawn; None: as `sample` does by default.
        segmenter: The segmenter that judges whether samples follow semantic maps and boxes; None: that is left out.
        overwrite: Whether samples that were drawn with other settings are replaced.
        group: The processes that share the drawing.
        table: Which part is used of a folder of images that is a data set.

    Raises:
        ValueError: If the model does not fit the data, or there are too few images.
        FileNotFoundError: If the features need weights that are not there.
        FileExistsError: If the output folder holds samples of other settings.
    """
    start = time.monotonic()
    sampling = sampling or Sampling()
    train, held_out = of_data(data)
    _check(model, train, held_out, num_images)
    asked, judge = None, None
    if isinstance(model, Denoiser):
        judge = None if segmenter is None else Judge(segmenter, model)
        to_draw = samples_to_draw(model, data, num_images, sampling)
        asked = to_draw.held_out
        samples = draw_samples(model, to_draw, output / SAMPLES, num_images, sampling, overwrite=overwrite, group=group)
        drawn: dict[str, Any] = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
    else:
        samples, drawn = samples_in(model, data, train.image_shape, table), {}
        if len(samples) < LEAST_IMAGES:
            raise ValueError(f"{model} must hold at least {LEAST_IMAGES} images, got {len(samples)}")

    def evaluated() -> Evaluation:
        made = features_named(features, features_weights, train, output)
        selections = [samples.shuffled(), train, held_out.shuffled()]
        if data.horizontal_flip:  # the model learnt mirror images, too
            selections[1:] = [train.with_mirrored(), held_out.with_mirrored().shuffled()]
        ours, theirs, unseen = (Compared(images, made.of(images)) for images in selections)
        protocol = {
            "samples": len(samples),
            "training images": len(train),
            "held-out images": len(held_out),
            "mirrored": "all real images are there twice, as they are and mirrored" if data.horizontal_flip else "none",
            "image size": "x".join(map(str, train.image_shape)),
            "features": made.about,
            **drawn,
        }
        if data.codec is not None:
            protocol["real images"] = "as their autoencoder makes them of their latents"
        sections = _sections(ours, theirs, unseen, data.class_names, are_mirrored=data.horizontal_flip)
        if all(one.images.captions is not None for one in (ours, theirs, unseen)):
            unmirrored = held_out.shuffled()
            seen = None if made.texts is None else (ours.features, made.of(unmirrored))
            about_captions = caption_section(ours.images, train, unmirrored, output, texts=made.texts, features=seen)
            sections[1:1] = [] if about_captions is None else [about_captions]
        if asked is not None:
            sections[1:1] = [following_section(samples, asked, judge)]
            protocol["drawn for"] = f"what is known of {len(asked)} held-out images, by turns"
        result = Evaluation(subject, protocol, sections)
        protocol["seconds"] = round(time.monotonic() - start, 1)
        return result

    return group.on_rank_zero(evaluated)


def _check(model: Denoiser | Path, train: Selection, held_out: Selection, num_images: int) -> None:
    least, num_real = 2 * LEAST_IMAGES, len(train) + len(held_out)
    if num_real < least or len(train) < LEAST_IMAGES:
        raise ValueError(f"there must be at least {least} real images to compare with, {LEAST_IMAGES} of them to train "
                         f"on, got {num_real}, {len(train)} of them to train on")  # fmt: skip
    if num_images < LEAST_IMAGES:
        raise ValueError(f"num_images must be at least {LEAST_IMAGES}, got {num_images}; 1000 are usual")
    if isinstance(model, Denoiser) and model.image_shape != train.image_shape:
        drawn, real = ("x".join(map(str, shape)) for shape in (model.image_shape, train.image_shape))
        raise ValueError(f"the data must be of the size that the model draws, {drawn}, and are {real}; set "
                         "data.image_size and data.channels")  # fmt: skip
    if isinstance(model, Denoiser):
        train.values.require_range_of(model.values, "the denoiser was trained on")


def _sections(
    samples: Compared, train: Compared, held_out: Compared, class_names: list[str] | None, *, are_mirrored: bool
) -> list[Section]:
    """What is found; samples and held-out images are in random order."""
    real, reference = _real_and_reference(train, held_out, len(samples.features))
    sections = [_likeness(samples, real, reference, train)]
    if train.images.labels is not None and class_names:
        sections.append(_classes(samples, train, held_out, class_names))
    selections = (samples.images, train.images, held_out.images)
    features = (samples.features, train.features, held_out.features)
    sections.append(memorisation(*selections, features, are_mirrored=are_mirrored))
    return sections


def _real_and_reference(train: Compared, held_out: Compared, num_samples: int) -> tuple[Compared, Compared]:
    """Real images, as many as samples if they are enough, and the other training images, at least as many.

    The held-out images are the first of the real ones; where they do not suffice, training images join them.
    """
    num_train, num_held_out = len(train.features), len(held_out.features)
    count = min(num_samples, (num_train + num_held_out) // 2)
    order = torch.randperm(num_train, generator=keyed_generator(SPLIT_SEED))
    num_more = max(count - num_held_out, 0)
    first, more = held_out.features[:count], train.select(order[:num_more].sort().values)
    images = held_out.images.select(torch.arange(min(count, num_held_out)))
    return Compared(images, torch.cat([first, more.features])), train.select(order[num_more:].sort().values)


def _likeness(samples: Compared, real: Compared, reference: Compared, train: Compared) -> Section:
    count = len(real.features)
    num_held_out = len(real.images)
    also = f" and {count - num_held_out} training images" if count > num_held_out else ""
    section = Section(
        "Are the samples like the real images?",
        f"{count} samples are compared with {len(reference.features)} training images. Beside each figure is the same "
        f"figure for {count} real images ({num_held_out} held out{also}) against the same training images, which a "
        "perfect model reaches.",
        distance_figures(samples.features[:count], real.features, reference.features),
    )
    if len(samples.features) > count or len(train.features) > len(reference.features):
        section.figures.append(Figure(
            "fd_all", "Fréchet distance, all images", frechet_distance(samples.features, train.features), "lower",
            remark=f"N = {len(samples.features)} against all {len(train.features)} training images, as papers have it.",
        ))  # fmt: skip
    section.pictures += _pictures(samples, real, reference)
    _warn_of_difference(section)
    return section


def _warn_of_difference(section: Section) -> None:
    """What the figures say together, where it is plain."""
    figures = {figure.key: figure for figure in section.figures}

    def falls_short(key: str) -> bool:
        return figures[key].value < 0.7 * (figures[key].real or 0)

    if falls_short("precision") and falls_short("recall"):
        section.warnings.append("The samples are not like the real images yet: precision and recall are both low. "
                                "Train for longer, and look at the samples.")  # fmt: skip
    elif falls_short("precision"):
        section.warnings.append("Many samples are like no real image (precision): look at the least typical ones. "
                                "Longer training or guidance helps.")  # fmt: skip
    elif falls_short("recall"):
        section.warnings.append("The samples show only a part of what there is (recall): less guidance or longer "
                                "training helps. Look at the classes, too.")  # fmt: skip


def _pictures(samples: Compared, real: Compared, reference: Compared) -> list[Picture]:
    drawn, shown = min(SHOWN, len(samples.images)), min(SHOWN, len(real.images))
    grids = (image_grid(one.images.seen(range(count))) for one, count in ((samples, drawn), (real, shown)))
    nearest = torch.cat([
        torch.cdist(rows, reference.features).topk(NUM_NEIGHBOURS, largest=False).values.mean(1)
        for rows in samples.features.split(2000)
    ])  # fmt: skip
    order = nearest.argsort(stable=True)
    columns = 12
    typical, odd = order[: 2 * columns], order.flip(0)[: 2 * columns]
    return [
        Picture("samples", "Samples (left) and held-out real images (right).", _beside(next(grids), next(grids))),
        Picture("typical", "The most typical samples: those nearest to real images in the features.",
                image_grid(samples.images.seen(typical), columns)),
        Picture("odd", "The least typical samples: those farthest from real images in the features.",
                image_grid(samples.images.seen(odd), columns)),
    ]  # fmt: skip


def _beside(left: Image.Image, right: Image.Image, gap: int = 24) -> Image.Image:
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both


def _classes(samples: Compared, train: Compared, held_out: Compared, class_names: list[str]) -> Section:
    """Whether samples are of the class that they were drawn as, and whether all classes are there."""
    train_labels = train.images.labels
    assert train_labels is not None
    seen, seen_held_out = (_voted(one.features, train.features, train_labels) for one in (samples, held_out))
    labels = held_out.images.labels
    assert labels is not None
    accuracy = float((seen_held_out == labels).float().mean())
    section = Section(
        "Are the classes right?",
        f"The class that an image seems to have is that of most of the {NUM_NEIGHBOURS} nearest training images in the "
        f"features, which is right for {accuracy:.1%} of the held-out images.",
    )
    asked = samples.images.labels
    if asked is not None:
        is_right = (seen == asked).double()
        places, others = others_of_another_kind(asked)
        shuffled = {SHUFFLED: float((seen[places] == asked[others]).double().mean())} if len(places) else {}
        section.figures.append(Figure(
            "class_agreement", "Class agreement", float(is_right.mean()), "higher", interval_of_mean(is_right.numpy()),
            accuracy, "The share of samples that seem to be of the class that they were drawn as.", shuffled,
        ))  # fmt: skip
        section.pictures += _picture_of_classes(samples.images, asked, held_out.images, labels, class_names)
    shares = [torch.bincount(one, minlength=len(class_names)) / len(one) for one in (seen, train_labels, seen_held_out)]
    balance = float((shares[0] - shares[1]).abs().sum() / 2)
    section.figures.append(Figure(
        "class_imbalance", "Difference of the classes' shares", balance, "lower",
        remark="The share of samples that would have to be of another class for the shares of the training images; "
               "chance makes some of it.",
    ))  # fmt: skip
    missing = [
        name for name, ours, theirs, unseen in zip(class_names, *shares, strict=True)
        if ours < RARE * min(theirs, unseen) and theirs * len(seen) >= LEAST_EXPECTED
    ]  # fmt: skip
    if missing:
        section.warnings.append(f"There are hardly any samples of {', '.join(missing)}, of which there are training "
                                "images: the model does not draw them, or draws them as something else.")  # fmt: skip
    section.tables.append(_class_table(samples, train, seen, shares, class_names))
    return section


def _picture_of_classes(
    samples: Selection, asked: Tensor, held_out: Selection, labels: Tensor, class_names: list[str]
) -> list[Picture]:
    """A picture of samples below held-out images of their classes, (N,) and (n,) int64; none if no class has both."""
    named_samples, named_held_out = (
        [class_names[number] for number in numbers.tolist()] for numbers in (asked, labels)
    )
    image = picture_by_name(class_names, held_out, named_held_out, samples, named_samples)
    caption = "A held-out image of each class, up to ten, and below samples that were drawn as this class."
    return [] if image is None else [Picture("classes", caption, image)]


def _voted(features: Tensor, train_features: Tensor, labels: Tensor) -> Tensor:
    """The class of most of the nearest images, (N,); of classes with as many, the one that is nearest."""
    count = min(NUM_NEIGHBOURS, len(train_features))
    parts = [torch.cdist(rows, train_features).topk(count, largest=False).indices for rows in features.split(2000)]
    near = labels[torch.cat(parts)]  # (N, count), the nearest first
    votes = (near[:, :, None] == near[:, None]).sum(dim=2) * count - torch.arange(count)
    return near.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]


def _class_table(
    samples: Compared, train: Compared, seen: Tensor, shares: list[Tensor], class_names: list[str]
) -> Table:
    asked, train_labels = samples.images.labels, train.images.labels
    assert train_labels is not None
    rows: list[list[str | float | int | None]] = []
    for number, name in enumerate(class_names):
        drawn = seen == number if asked is None else asked == number
        ours, theirs = samples.features[drawn], train.features[train_labels == number]
        agreement = None if asked is None or not len(ours) else float((seen[drawn] == number).float().mean())
        figures: list[float | None] = [None, None, None]
        if min(len(ours), len(theirs)) >= LEAST_PER_CLASS:
            figures = [kernel_distance(ours, theirs), *precision_and_recall(ours, theirs)]
        rows.append([name, len(ours), len(theirs), *(float(one[number]) for one in shares[:2]), agreement, *figures])
    columns = ["class", "samples", "training images", "share of samples", "share of training images", "agreement"]
    title = f"By class (distances where there are {LEAST_PER_CLASS} images of both; a Fréchet distance needs more)"
    return Table("classes", title, [*columns, "KID", "precision", "recall"], rows)
