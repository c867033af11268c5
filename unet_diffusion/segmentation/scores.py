"""Scores of segmentations: masks, and segments behind membranes (ISBI 2012).

All scores take 2D numpy arrays, (H, W), and know nothing of networks.

- Rand and information scores: Arganda-Carreras et al. 2015, https://doi.org/10.3389/fnana.2015.00142
- Warping error: Jain et al. 2010, https://doi.org/10.1109/CVPR.2010.5539950

The results in Ronneberger et al. 2015 come from the challenge's server
(http://brainiac2.mit.edu/isbi_challenge/evaluation). Its pixel error was 1 - the best F-score of pixels, which is
`challenge_pixel_error` here, its Rand error had no thinning, and its warping error counted only splits and mergers. The
scores of these names here follow the definitions of the papers: compare them with each other, not with that table.
V_rand and V_info are the scores with which the challenge ended.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Labels = NDArray[np.integer[Any]]

ALPHA = 0.5  # the challenge's weight of splits against mergers in V_rand and V_info, which makes them F-scores
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the challenge's thresholds, without 0 and 1
FOUR_CONNECTED = 1
ROUNDING = 1e-12  # of an entropy

# (row, column), anticlockwise: neighbours 0, 2, 4, 6 share an edge with the centre, and k + 4 is opposite to k.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def pixel_error(truth: Mask | Labels, prediction: Mask | Labels) -> float:
    """Return the share of pixels that differ.

    Args:
        truth: A mask, or the class index of each pixel.
        prediction: A mask or class indices, like truth, of the same shape.

    Raises:
        ValueError: If the shapes differ, or only one of the two is a mask.
    """
    _check_shapes(truth, prediction)
    if {truth.dtype.kind, prediction.dtype.kind} not in ({"b"}, {"i"}, {"u"}, {"i", "u"}):
        raise ValueError(
            f"both must be masks (bool) or class indices (integer), got {truth.dtype} and {prediction.dtype}; "
            "threshold probabilities first"
        )
    return float((truth != prediction).mean())


def dice(truth: Mask, prediction: Mask) -> float:
    """Return twice the number of pixels in both masks over the sum of their sizes; 1 if both are empty.

    Raises:
        ValueError: If the shapes differ, or a mask is not bool.
    """
    _check_masks(truth, prediction)
    total = np.count_nonzero(truth) + np.count_nonzero(prediction)
    return 2 * np.count_nonzero(truth & prediction) / total if total else 1.0


def iou(truth: Mask, prediction: Mask) -> float:
    """Return the number of pixels in both masks over the number in either; 1 if both are empty.

    Raises:
        ValueError: If the shapes differ, or a mask is not bool.
    """
    _check_masks(truth, prediction)
    union = np.count_nonzero(truth | prediction)
    return np.count_nonzero(truth & prediction) / union if union else 1.0


def rand_error(truth: Labels, segments: Labels) -> float:
    """Return 1 - F-score of the pairs of pixels that share a segment, restricted to the foreground (ISBI 2012).

    A pixel of `segments` that is 0 is a segment of its own, as in the challenge, so it is in no pair. scikit-image's
    adapted_rand_error takes these pixels for one segment; without such pixels the two functions agree.

    Args:
        truth: True segment numbers; pixels that are 0 do not count.
        segments: Predicted segment numbers.

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or truth has no segment.
    """
    return float(rand_error_of(segment_sums(truth, segments)))


def v_rand(truth: Labels, segments: Labels) -> float:
    """Return V^Rand = sum p_ij^2 / (a sum s_i^2 + (1 - a) sum t_j^2), a = 0.5 (Arganda-Carreras et al. 2015).

    p_ij is the share of pixels in segment i of `segments` and segment j of truth, and s_i and t_j are its marginals.
    Only pixels where truth is not 0 count. A pixel of `segments` that is 0 is a segment of its own. 1 is best.

    Args:
        truth: True segment numbers; pixels that are 0 do not count.
        segments: Predicted segment numbers.

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or truth has no segment.
    """
    return float(v_rand_of(segment_sums(truth, segments)))


def v_info(truth: Labels, segments: Labels) -> float:
    """Return V^Info = I(S; T) / ((1 - a) H(S) + a H(T)), a = 0.5 (Arganda-Carreras et al. 2015); 1 is best.

    The distributions are those of `v_rand`. If both have a single segment, neither has entropy, and the score is 1.

    Args:
        truth: True segment numbers; pixels that are 0 do not count.
        segments: Predicted segment numbers.

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or truth has no segment.
    """
    return float(v_info_of(segment_sums(truth, segments)))


def segment_sums(truth: Labels, segments: Labels) -> NDArray[np.float64]:
    """Return sums of n, n^2 and n log n over the numbers of pixels n in segments, (3, 3), from which scores follow.

    The rows are of pairs of segments that share pixels, of the segments of truth, and of the predicted segments. Added
    up over images, they are the sums of all images side by side.

    Args:
        truth: True segment numbers; pixels that are 0 do not count.
        segments: Predicted segment numbers; a pixel that is 0 is a segment of its own.

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or truth has no segment.
    """
    counts = [n.astype(float) for n in _counts(_foreground_contingency(truth, segments))]
    return np.array([[n.sum(), (n * n).sum(), scipy.special.xlogy(n, n).sum()] for n in counts])


def rand_error_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `rand_error` of sums from `segment_sums`, (..., 3, 3) -> (...); 0 where no two pixels share a segment."""
    both, of_truth, of_segments = np.moveaxis(sums[..., 1] - sums[..., 0], -1, 0)
    total = of_truth + of_segments
    return np.where(total > 0, 1 - 2 * both / np.where(total > 0, total, 1), 0.0)


def v_rand_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `v_rand` of sums from `segment_sums`, (..., 3, 3) -> (...); NaN where there are no pixels."""
    both, of_truth, of_segments = np.moveaxis(sums[..., 1], -1, 0)
    with np.errstate(invalid="ignore"):
        return both / (ALPHA * of_segments + (1 - ALPHA) * of_truth)


def v_info_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `v_info` of sums from `segment_sums`, (..., 3, 3) -> (...); 1 where there is a single segment."""
    num_pixels = np.maximum(sums[..., :1, 0], 1)
    entropies = np.log(num_pixels) - sums[..., 2] / num_pixels  # of n / num_pixels
    joint, h_truth, h_segments = np.moveaxis(entropies, -1, 0)
    weighted = (1 - ALPHA) * h_segments + ALPHA * h_truth
    has_entropy = weighted > ROUNDING
    return np.where(has_entropy, (h_truth + h_segments - joint) / np.where(has_entropy, weighted, 1), 1.0)


def thin_borders(segments: Labels) -> Labels:
    """Return the segments grown over the borders (0) between them: each border pixel joins its nearest segment.

    The width of borders then does not count in a score. The challenge's Fiji script thins borders to lines of one
    pixel; this function thins them to width zero. It floods from pixel to pixel, so the nearest segment is right to
    within a pixel. An image of zeros stays as it is.

    Args:
        segments: Segment numbers, 0 for borders.

    Raises:
        ValueError: If labels are not integers of 0 or more.
    """
    check_labels(segments)
    if not segments.any():
        return segments.copy()
    distance = scipy.ndimage.distance_transform_edt(segments == 0)
    return skimage.segmentation.watershed(distance, segments, connectivity=FOUR_CONNECTED).astype(segments.dtype)


@dataclass(frozen=True)
class MembraneScores:
    """The scores of `membrane_scores`: errors are best at 0, and v_rand and v_info at 1."""

    pixel_error: float
    challenge_pixel_error: float
    rand_error: float
    v_rand: float
    v_info: float
    warping_error: float


def membrane_scores(
    truths: Sequence[Mask],
    cell_probabilities: Sequence[NDArray[np.floating[Any]]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> MembraneScores:
    """Score a stack as in the ISBI 2012 challenge: each score is the mean over the images at its best threshold.

    Predicted segments are the 4-connected components above a threshold, grown over the borders by `thin_borders`; true
    segments are not grown.

    Args:
        truths: A mask for each image: True for cell, False for membrane.
        cell_probabilities: Probabilities of cell for each image, in [0, 1].
        thresholds: Thresholds of all scores except the pixel error, whose threshold is 0.5.

    Raises:
        ValueError: If there are no images, shapes differ, a truth is not bool or has no cell, or numbers are outside
            [0, 1].
    """
    if not truths or len(truths) != len(cell_probabilities):
        raise ValueError(
            f"there must be as many truths as probabilities, and at least one, got {len(truths)} and "
            f"{len(cell_probabilities)}"
        )
    _check_unit_range(np.asarray(thresholds, dtype=float), "thresholds", "leave them out for the challenge's")
    table = np.array(  # (images, thresholds, scores)
        [_scores_by_threshold(*pair, thresholds) for pair in zip(truths, cell_probabilities, strict=True)]
    ).mean(axis=0)
    errors = [pixel_error(truth, cell > 0.5) for truth, cell in zip(truths, cell_probabilities, strict=True)]
    return MembraneScores(
        pixel_error=float(np.mean(errors)),
        challenge_pixel_error=float(1 - table[:, 4].max()),
        rand_error=float(table[:, 0].min()),
        v_rand=float(table[:, 1].max()),
        v_info=float(table[:, 2].max()),
        warping_error=float(table[:, 3].min()),
    )


def _scores_by_threshold(
    truth: Mask, cell_probability: NDArray[np.floating[Any]], thresholds: Sequence[float]
) -> list[list[float]]:
    """Return the Rand error, V_rand, V_info, warping error and F-score of pixels of an image at each threshold."""
    _check_shapes(truth, cell_probability)
    _check_bool(truth)
    _check_unit_range(cell_probability, "cell_probability", "apply the softmax or divide by 255")
    true_segments = skimage.measure.label(truth, connectivity=FOUR_CONNECTED)
    rows = []
    for threshold in thresholds:
        mask = cell_probability > threshold
        segments = thin_borders(skimage.measure.label(mask, connectivity=FOUR_CONNECTED))
        scores = [score(true_segments, segments) for score in (rand_error, v_rand, v_info)]
        rows.append([*scores, warping_error(truth, mask), dice(truth, mask)])
    return rows


def warping_error(truth: Mask, prediction: Mask) -> float:
    """Return the share of pixels in which the prediction differs from the truth warped to it (Jain et al. 2010).

    Only errors of topology count: cells that are merged, split, added or lost, and holes. The exact place of a membrane
    is free as long as the two membranes touch; a membrane clear of the true one counts as a split and a merger.

    Args:
        truth: The true mask: True for cell, False for membrane.
        prediction: The predicted mask.

    Raises:
        ValueError: If the shapes differ, or a mask is not bool.
    """
    return float((warped_truth(truth, prediction) != prediction).mean())


def warped_truth(truth: Mask, prediction: Mask) -> Mask:
    """Return the truth moved as near to the prediction as its topology allows (Jain et al. 2010), (H, W) bool.

    Simple points that differ from the prediction are flipped until none is left: first all in reading order, then the
    neighbours of flipped points in the order of the flips. Cells are 4-connected, membranes 8-connected. The outside of
    the image is membrane, as in the challenge's Fiji code: cells do not join there, and a notch in the border of the
    image is no hole.

    Args:
        truth: The true mask: True for cell, False for membrane.
        prediction: The predicted mask.

    Raises:
        ValueError: If the shapes differ, or a mask is not bool.
    """
    _check_masks(truth, prediction)
    padded = np.pad(truth, 1)
    codes = bytearray(_neighbourhoods(padded).tobytes())
    differs = bytearray((padded != np.pad(prediction, 1)).tobytes())
    steps = [
        (row * padded.shape[1] + column, 1 << (bit + 4) % 8) for bit, (row, column) in enumerate(NEIGHBOURS)
    ]  # the way to a neighbour, and the bit of this pixel in the neighbour's code
    queue = deque(index for index, is_different in enumerate(differs) if is_different)
    while queue:
        pixel = queue.popleft()
        if not (differs[pixel] and SIMPLE_POINTS[codes[pixel]]):
            continue
        differs[pixel] = False
        for step, bit in steps:
            codes[pixel + step] ^= bit
            if differs[pixel + step]:
                queue.append(pixel + step)
    left = np.frombuffer(differs, dtype=np.bool_).reshape(padded.shape)[1:-1, 1:-1]
    return prediction ^ left


def simple_points() -> tuple[bool, ...]:
    """Return for each code of a neighbourhood whether its pixel can be flipped without a change of topology, (256,).

    Bit k of the code is set if neighbour k is foreground. Such a simple point has the connectivity number 1 (Yokoi,
    Toriwaki and Fukumura 1975): for 4-connected foreground, the sum over even k of x_k - x_k x_(k+1) x_(k+2).
    """
    x = np.arange(256)[:, None] >> np.arange(8) & 1  # (256, 8)
    edges, corners = x[:, ::2], x[:, 1::2]
    numbers = (edges - edges * corners * np.roll(edges, -1, axis=1)).sum(axis=1)
    return tuple((numbers == 1).tolist())


SIMPLE_POINTS = simple_points()


def contingency(truth: Labels, segments: Labels) -> tuple[Labels, Labels, "scipy.sparse.csr_array"]:
    """Return the labels in truth, the labels in segments, and the pixels that each pair shares, sparse (R, C)."""
    rows, row = np.unique(truth.ravel(), return_inverse=True)
    columns, column = np.unique(segments.ravel(), return_inverse=True)
    ones = np.ones(truth.size, dtype=np.int64)
    return rows, columns, scipy.sparse.csr_array((ones, (row, column)), shape=(len(rows), len(columns)))


def _foreground_contingency(truth: Labels, segments: Labels) -> "scipy.sparse.csr_array":
    """Return the pixels that each pair of segments shares where truth is not 0; each 0 of segments stands alone."""
    check_labels(truth, segments)
    foreground = truth > 0
    if not foreground.any():
        raise ValueError("truth must have at least one segment, got only 0; leave images without any out of the score")
    inside = segments[foreground].astype(np.int64)
    alone = inside.max() + 1 + np.arange(len(inside))
    return contingency(truth[foreground], np.where(inside > 0, inside, alone))[2]


def _counts(table: "scipy.sparse.csr_array") -> tuple[Labels, Labels, Labels]:
    """Return the pixels in each pair that shares any, in each segment of truth, and in each predicted segment."""
    return table.data, table.sum(axis=1), table.sum(axis=0)


def _neighbourhoods(padded: Mask) -> NDArray[np.uint8]:
    """Return the code of each pixel's neighbourhood, whose bit k is neighbour k; wrong for the outermost pixels."""
    codes = np.zeros(padded.shape, dtype=np.uint8)
    for bit, (row, column) in enumerate(NEIGHBOURS):
        codes |= np.roll(padded, (-row, -column), axis=(0, 1)).astype(np.uint8) << bit
    return codes


def _check_shapes(*images: NDArray[Any]) -> None:
    shapes = [image.shape for image in images]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        shown = " and ".join(map(str, shapes))
        raise ValueError(f"images must have one shape (H, W) of at least one pixel, got {shown}; crop or squeeze them")


def _check_masks(*masks: Mask) -> None:
    _check_shapes(*masks)
    for mask in masks:
        _check_bool(mask)


def _check_bool(mask: NDArray[Any]) -> None:
    if mask.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {mask.dtype}; compare them with a value, such as mask > 0")


def check_labels(*images: Labels) -> None:
    """Raise ValueError if images differ in shape, or are not integers of 0 or more."""
    _check_shapes(*images)
    for image in images:
        if not np.issubdtype(image.dtype, np.integer):
            raise ValueError(f"labels must be integers, got {image.dtype}; number the components of a mask first")
        if image.min() < 0:
            raise ValueError(f"labels must be 0 or more, got {image.min()}; set pixels of no segment to 0")


def _check_unit_range(values: NDArray[Any], name: str, fix: str) -> None:
    if values.size == 0 or not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
        got = f"{values.min()} to {values.max()}" if values.size else "none"
        raise ValueError(f"{name} must be in [0, 1], got {got}; {fix}")
