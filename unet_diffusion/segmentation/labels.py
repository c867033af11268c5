"""From label images to the targets of a network, and from its predictions back to masks and instance numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

from unet_diffusion.segmentation.affinities import APART, OFFSETS, mutex_watershed
from unet_diffusion.segmentation.border_weights import border_weights, class_weights
from unet_diffusion.segmentation.scores import FOUR_CONNECTED

LabelFormat = Literal["0/1", "0/255", "classes", "instances"]
Kind = Literal["binary", "classes", "instances", "affinities"]

BACKGROUND, CELL, BORDER = 0, 1, 2  # the classes of kind "instances"; other kinds of objects have no border
DISTANCE = 3  # the map that a network of kind "instances" gives after its classes
NUM_CLASSES: dict[Kind, int] = {"binary": 2, "instances": 3, "affinities": 2}  # of the kinds that fix it
NUM_BESIDE: dict[Kind, int] = {"binary": 0, "classes": 0, "instances": 1, "affinities": len(OFFSETS)}  # maps after them
# Distances from the edge are learnt up to this many pixels, as parts of it: farther in, they would tell an object's
# size, which a network sees less well, and dents of the edge would make peaks.
REACH = 6
SMOOTHING, PEAK_HEIGHT = 1.0, 0.1  # sd in pixels; of the smoothed distances, lower peaks make no object
NO_VALUE = -1  # class of pixels that are not to be learnt
MAX_CLASSES = 256  # predictions are written as 8-bit images
LEAST_DIAMETER = 4  # pixels, to which objects are scaled
MIN_SIZE, THRESHOLD = 16, 0.5  # of objects: their least number of pixels, and the foreground's probability
NUM_SHOWN = 12  # values in an error message
# Labels are right with fewer edges of other objects than these: number of edges, and their share of all pieces.
FEW_EDGES, MOST_EDGES = 10, 0.5
# Small objects that touch have no more than these: edges for each number, and share of edges between two numbers.
MOST_PIECES, MOST_BETWEEN = 2, 0.75


@dataclass(frozen=True)
class Targets:
    """The meaning of label images, and the targets that a network learns from them.

    Args:
        label_format: Meaning of the values: "0/1" or "0/255" for background and foreground; "classes" for class
            indices; "instances" for instance numbers, where 0 is background and each object has its own number.
        num_classes: With "classes", the number of classes, background included; otherwise leave it out.
        separate_borders: With "instances", whether to learn the borders of objects as a class of their own, and the
            distance of each pixel from the edge of its object, so that touching objects are separated.
        affinities: Whether to learn for pairs of pixels, near and far, if they are of one object, instead of borders:
            gaps in thin membranes then join no cells. Without instance numbers, the connected parts are the objects.
        border_width: Width of that class, in pixels inwards from the edge of an object.
        ignore_label: Value in the label images of pixels that are not to be learnt; None learns all pixels.
        class_balance: Whether to weight classes by their inverse frequency in the training images.
        border_weight: Weight w0 between cells that are close (Ronneberger et al. 2015, equation 2); 0 is off.
        border_sigma: Distance over which that weight falls off, in pixels.
        object_diameter: Scale images by 1/4 to 4, until the median diameter of their objects is this number of pixels:
            labelled images that are trained on by their labels, and others by what the segmenter sees in them. None:
            images keep their size.

    Raises:
        ValueError: If the settings contradict each other.
    """

    label_format: LabelFormat
    num_classes: int | None = None
    separate_borders: bool = False
    affinities: bool = False
    border_width: int = 1
    ignore_label: int | None = None
    class_balance: bool = False
    border_weight: float = 0.0
    border_sigma: float = 5.0
    object_diameter: float | None = None

    def __post_init__(self) -> None:
        if self.label_format not in get_args(LabelFormat):
            raise ValueError(
                f"label_format must be one of {', '.join(get_args(LabelFormat))}, got {self.label_format!r}"
            )
        if (self.num_classes is not None) != (self.label_format == "classes"):
            raise ValueError(
                f"num_classes goes with label_format classes and with no other, got {self.num_classes} with "
                f"{self.label_format}"
            )
        if self.num_classes is not None and not 2 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes must be from 2 to {MAX_CLASSES}, got {self.num_classes}")
        if self.separate_borders and self.label_format != "instances":
            raise ValueError(
                f"separate_borders needs label_format instances, which tells objects apart, got {self.label_format}"
            )
        if self.affinities and (self.separate_borders or self.label_format == "classes"):
            raise ValueError(
                f"affinities are of objects, and are learnt instead of borders, got separate_borders "
                f"{self.separate_borders} and label_format {self.label_format}; turn one of the two off"
            )
        if self.border_width < 1 or self.border_sigma <= 0 or self.border_weight < 0:
            raise ValueError(
                f"border_width must be at least 1, border_sigma above 0 and border_weight 0 or more, got "
                f"{self.border_width}, {self.border_sigma} and {self.border_weight}"
            )
        if self.object_diameter is not None and self.object_diameter < LEAST_DIAMETER:
            raise ValueError(f"object_diameter must be at least {LEAST_DIAMETER} pixels, got {self.object_diameter}")
        if self.object_diameter is not None and self.kind in ("classes", "affinities"):
            raise ValueError(
                f"object_diameter needs objects, and no affinities, whose offsets are pixels of unscaled images, got "
                f"label_format {self.label_format} and affinities {self.affinities}; leave it out"
            )
        if self.border_weight and self.label_format == "classes":
            raise ValueError("border_weight needs objects, which label_format classes does not tell apart; set it to 0")

    @property
    def kind(self) -> Kind:
        """The meaning of the classes."""
        if self.label_format == "classes":
            return "classes"
        if self.affinities:
            return "affinities"
        return "instances" if self.separate_borders else "binary"

    @property
    def class_names(self) -> list[str]:
        """The name of each class; its index where the user's classes have no names."""
        if self.num_classes is not None:
            return [str(index) for index in range(self.num_classes)]
        return ["background", "cell", "border"][: 3 if self.separate_borders else 2]

    @property
    def num_maps(self) -> int:
        """The number of maps that a network gives: one for each class, and then the distance or the affinities."""
        return len(self.class_names) + NUM_BESIDE[self.kind]

    def check(self, labels: NDArray[Any]) -> str | None:
        """Return a description of the error in the values of a label image, or None if they are right."""
        values = np.unique(labels)
        values = values[values != self.ignore_label] if self.ignore_label is not None else values
        allowed = {"0/1": "0 and 1", "0/255": "0 and 255", "instances": "0 or more"}.get(
            self.label_format, f"from 0 to {(self.num_classes or 0) - 1}"
        )
        if self.label_format in ("0/1", "0/255"):
            is_right = bool(np.isin(values, [0, int(self.label_format[2:])]).all())
        else:
            is_right = len(values) == 0 or (
                values[0] >= 0 and (self.num_classes is None or values[-1] < self.num_classes)
            )
        if is_right:
            return self._check_edges(labels) if self.label_format == "instances" else None
        shown = ", ".join(map(str, values[:NUM_SHOWN])) + (", ..." if len(values) > NUM_SHOWN else "")
        return f"with label_format {self.label_format} values must be {allowed}, got {shown}"

    def classes(self, labels: NDArray[Any]) -> NDArray[np.int16]:
        """Return the class of each pixel, (H, W), and NO_VALUE for pixels that are not to be learnt.

        Args:
            labels: A label image whose values were checked.
        """
        classes = (labels if self.label_format == "classes" else labels > 0).astype(np.int16)
        if self.separate_borders:
            instances = self.instances(labels)
            depth, deepest = depths(instances)
            classes[(instances > 0) & (depth < self.border_width) & (depth < deepest)] = BORDER
        if self.ignore_label is not None:
            classes[labels == self.ignore_label] = NO_VALUE
        return classes

    def distances(self, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Return the distance of each pixel to the next one outside of its object, in pixels, (H, W); 0 is background.

        It is infinite where one object fills the image.

        Args:
            labels: A label image whose values were checked.
        """
        instances = self.instances(labels)
        return np.where(instances > 0, depths(instances)[0] + 1, 0).astype(np.float32)

    def partners(self, labels: NDArray[Any]) -> NDArray[np.int32]:
        """Return the number of each pixel's object, (H, W), and APART for pixels whose pairs are not to be learnt.

        Args:
            labels: A label image whose values were checked.
        """
        instances = np.unique(self.instances(labels), return_inverse=True)[1].reshape(labels.shape)
        return np.where(self.classes(labels) == NO_VALUE, APART, instances).astype(np.int32)

    def weights(self, labels: NDArray[Any], balance: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the weight of each pixel in the loss, (H, W): class weight plus border weight, and 0 for NO_VALUE.

        Args:
            labels: A label image whose values were checked.
            balance: The weight of each class from `balance`.
        """
        classes = self.classes(labels)
        weights = np.where(classes == NO_VALUE, 0, balance[classes])
        if self.border_weight:
            between = border_weights(self.instances(labels), w0=self.border_weight, sigma=self.border_sigma)
            weights = np.where(classes == NO_VALUE, 0, weights + between)
        return weights.astype(np.float32)

    def balance(self, all_labels: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Return the weight of each class, (K,): its inverse frequency in label images, or 1 without class_balance."""
        if not self.class_balance:
            return np.ones(len(self.class_names), dtype=np.float32)
        return class_weights([self.classes(labels) for labels in all_labels], len(self.class_names), NO_VALUE)

    def instances(self, labels: NDArray[Any]) -> NDArray[np.int32]:
        """Return instance numbers, 0 for background; labels without them are numbered by connected components."""
        learnt = np.where(labels == self.ignore_label, 0, labels) if self.ignore_label is not None else labels
        if self.label_format == "instances":
            return learnt.astype(np.int32)
        return skimage.measure.label(learnt > 0, connectivity=FOUR_CONNECTED).astype(np.int32)

    def _check_edges(self, labels: NDArray[Any]) -> str | None:
        """Return a description of instance numbers that shade into each other, as in a smoothed or lossy picture.

        In 400 labelled images of nuclei (BBBC038) no object is merely the edge of another; scaled with interpolation,
        or stored as JPEG, more than four in five pieces are. By this measure small touching objects are edges, too, but
        each of them has a number of its own, and few lie between a larger and a smaller number.
        """
        instances = self.instances(labels)
        num_pieces, edges, is_between = edge_pieces(instances)
        if len(edges) < FEW_EDGES or len(edges) <= MOST_EDGES * num_pieces:
            return None
        num_numbers = len(np.unique(instances[tuple(edges.T)]))
        if len(edges) <= MOST_PIECES * num_numbers and is_between.mean() <= MOST_BETWEEN:
            return None
        y, x = edges[0]
        return (
            f"with label_format instances each number must be an object, got {num_pieces} pieces, of which "
            f"{len(edges)} are thin edges of others, such as {labels[y, x]} in row {y}, column {x}; save the labels as "
            "PNG or TIFF, and scale them without interpolation"
        )


def depths(instances: NDArray[np.int32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distance of each pixel to the edge of its object, (H, W), and the largest distance in that object.

    The edge is the outermost pixels of the object, whose distance is 0; the border of the image is no edge. An object
    that fills the image has no edge, and its distances are infinite.

    Args:
        instances: Instance numbers, 0 for background, (H, W).
    """
    numbers, compact = np.unique(instances, return_inverse=True)
    compact = compact.reshape(instances.shape)
    edge = skimage.segmentation.find_boundaries(compact, mode="inner", background=-1) & (instances > 0)
    if not edge.any():  # one object fills the image, or there is none
        endless = np.where(instances > 0, np.inf, 0)
        return endless, endless
    depth, deepest = np.where(instances > 0, scipy.ndimage.distance_transform_edt(~edge), 0), np.zeros(len(numbers))
    np.maximum.at(deepest, compact.ravel(), depth.ravel())
    return depth, deepest[compact]


def edge_pieces(instances: NDArray[np.int32]) -> tuple[int, NDArray[np.int64], NDArray[np.bool_]]:
    """Split instance numbers into connected pieces and find the pieces that are thin edges of others.

    A piece is an 8-connected component of pixels with the same number. A thin edge touches another number, and none of
    its pixels has four neighbours with its own number.

    Args:
        instances: Instance numbers, 0 for background, (H, W).

    Returns:
        The number of pieces; the row and column of a pixel of each edge, (N, 2); and whether each edge lies between a
        larger and a smaller number, where the background counts as 0, (N,).
    """
    pieces = skimage.measure.label(instances, connectivity=2, background=0)
    num_pieces = int(pieces.max(initial=0))
    cross = scipy.ndimage.generate_binary_structure(2, 1)
    least, most = (
        extremum(instances, footprint=cross, mode="nearest")
        for extremum in (scipy.ndimage.minimum_filter, scipy.ndimage.maximum_filter)
    )
    objects = np.where(instances > 0, instances, np.iinfo(np.int32).max)
    has_larger, has_smaller, has_smaller_object = (
        np.isin(np.arange(num_pieces + 1), pieces[is_against])
        for is_against in (
            scipy.ndimage.maximum_filter(instances, 3) > instances,
            scipy.ndimage.minimum_filter(instances, 3) < instances,
            scipy.ndimage.minimum_filter(objects, 3) < instances,
        )
    )
    is_edge = has_larger | has_smaller_object
    is_edge[pieces[least == most]] = False
    is_edge[0] = False
    numbers, first = np.unique(pieces, return_index=True)
    numbers, first = numbers[is_edge[numbers]], first[is_edge[numbers]]
    places = np.unravel_index(first, instances.shape)
    return num_pieces, np.stack(places, axis=1), (has_larger & has_smaller)[numbers]


def instances_from(
    maps: NDArray[np.float32], kind: Kind, *, min_size: int = MIN_SIZE, threshold: float = THRESHOLD
) -> NDArray[np.int32]:
    """Return instance numbers, 0 for background, (H, W), from the maps that a network gives, (K, H, W).

    With kind "instances" each peak of the distances is the seed of an object, which grows over the foreground around
    it. With kind "affinities" the mutex watershed divides the foreground into objects. With kind "binary" they are its
    4-connected components.

    Args:
        maps: Probabilities of background and cell, and then of border and distances with kind "instances", or
            affinities, (K, H, W).
        kind: The meaning of the classes.
        min_size: Least number of pixels in an object; smaller objects are left out.
        threshold: The foreground is where its probability is larger.

    Raises:
        ValueError: If the classes do not stand for objects.
    """
    return next(instances_by_threshold(maps, kind, (threshold,), min_size=min_size))


def instances_by_threshold(
    maps: NDArray[np.float32], kind: Kind, thresholds: Iterable[float], *, min_size: int = MIN_SIZE
) -> Iterator[NDArray[np.int32]]:
    """Yield what `instances_from` returns at each threshold; the seeds of objects, which have none, are found once.

    Args:
        maps: As in `instances_from`.
        kind: As in `instances_from`.
        thresholds: The thresholds of the foreground's probability.
        min_size: As in `instances_from`.

    Raises:
        ValueError: If the classes do not stand for objects.
    """
    if kind == "classes":
        raise ValueError(
            "instance numbers need a model that was trained on objects, and this one was trained on classes; "
            "leave them out"
        )
    if kind == "instances":
        distances = scipy.ndimage.gaussian_filter(maps[DISTANCE], SMOOTHING)
        seeds = _peaks(distances)
    for threshold in thresholds:
        foreground = maps[BACKGROUND] < 1 - threshold
        if kind == "affinities":
            numbers = mutex_watershed(maps[NUM_CLASSES[kind] :], 1 - maps[BACKGROUND], foreground)
        else:
            numbers = skimage.measure.label(foreground, connectivity=FOUR_CONNECTED)
        if kind == "instances":
            grown = skimage.segmentation.watershed(-distances, seeds, mask=foreground)
            # An object without a peak keeps the number of its component.
            numbers = np.where(grown > 0, grown, np.where(numbers > 0, numbers + grown.max(), 0))
        yield without_small(numbers, min_size)


def without_small(numbers: NDArray[np.int32], min_size: int) -> NDArray[np.int32]:
    """Return the numbers of the objects of at least so many pixels, from 1 without gaps; the others become 0."""
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0
    large = np.flatnonzero(sizes >= min_size)
    renumber = np.zeros(len(sizes), dtype=np.int32)
    renumber[large] = np.arange(1, len(large) + 1)
    return renumber[numbers]


def _peaks(distances: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return a number for each peak that is PEAK_HEIGHT above the way to a higher one, 0 elsewhere, (H, W)."""
    lowered = skimage.morphology.reconstruction(distances - PEAK_HEIGHT, distances)
    return skimage.measure.label(skimage.morphology.local_maxima(lowered), connectivity=2).astype(np.int32)


def probabilities_in(maps: NDArray[np.float32], kind: Kind) -> NDArray[np.float32]:
    """Return the maps that are probabilities of classes, (K, H, W)."""
    return maps[: len(maps) - NUM_BESIDE[kind]]


def check_threshold(kind: Kind, threshold: float | None, min_size: int | None) -> None:
    """Refuse a threshold, or a least size of objects, that cannot be taken.

    Args:
        kind: The meaning of the classes.
        threshold: The foreground is where its probability is larger; None: not given.
        min_size: Least number of pixels in an object; None: not given.

    Raises:
        ValueError: If one is out of range, or given for classes, which have neither.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, got {threshold}; {THRESHOLD} is usual")
    if min_size is not None and min_size < 1:
        raise ValueError(f"min_size must be at least 1 pixel, got {min_size}; {MIN_SIZE} is usual")
    if kind == "classes" and (threshold is not None or min_size is not None):
        raise ValueError(
            "threshold and min_size need a model of foreground or objects, and this one was trained on classes, of "
            "which the likeliest is taken; leave them out"
        )


def mask_from(maps: NDArray[np.float32], kind: Kind, *, threshold: float = THRESHOLD) -> NDArray[np.uint8]:
    """Return the mask to write, (H, W): 255 for foreground, or with kind "classes" the index of the likeliest class.

    Args:
        maps: Probabilities of the classes, and what maps follow, (K, H, W).
        kind: The meaning of the classes.
        threshold: The foreground is where its probability is larger; classes have none.
    """
    if kind == "classes":
        return maps.argmax(axis=0).astype(np.uint8)
    return np.where(maps[BACKGROUND] < 1 - threshold, 255, 0).astype(np.uint8)
