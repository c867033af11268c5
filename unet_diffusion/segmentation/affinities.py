"""Affinities, which say whether two pixels are of one object, and the mutex watershed, which makes objects of them.

Wolf et al. 2019 (https://arxiv.org/abs/1904.12654): a network gives a map for each offset, the probability that a pixel
and the one at the offset are of one object. Pixels side by side attract each other, and pixels far apart repel each
other. Pairs are visited from the surest to the least sure; what attracts is joined, unless it repelled before. A
gap in a membrane, through which a threshold would join two cells, is closed by the pixels on both sides of it.

It differs in that only the foreground is divided: pairs repel each other by the doubt that is left once both pixels are
known to be foreground.
"""

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Offset = tuple[int, int]  # rows down, columns to the right

# Those that the paper took within slices of ISBI 2012, but for two of 27 pixels, which cut large cells into pieces in
# training slices. Turned or mirrored, each is another one or its opposite.
OFFSETS: tuple[Offset, ...] = (
    *((-1, 0), (0, -1)),
    *((-9, 0), (0, -9), (-9, -9), (9, -9), (-9, -4), (-4, -9), (4, -9), (9, -4)),
)
NUM_ATTRACTIVE = 2  # the first of these; the others repel
STRIDE = 4  # repelling pairs start at every fourth row and column: neighbours say much the same
APART = -1  # object number of pixels whose pairs are not to be learnt


def affinities_of(instances: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each pixel and its partner at each offset are of one object, and which pairs count.

    Args:
        instances: Numbers of objects, (B, H, W) integers; 0 is background, and APART is not to be learnt.

    Returns:
        Two bool tensors (B, K, H, W), K the number of OFFSETS. No pair with the background is of one object; pairs
        that reach out of the window do not count.
    """
    partners = torch.full((len(instances), len(OFFSETS), *instances.shape[1:]), APART).to(instances)
    for channel, offset in enumerate(OFFSETS):
        here, there = _pairs(instances.shape[1:], offset)
        partners[:, channel][:, *here] = instances[:, *there]
    each = instances[:, None]
    return (each == partners) & (each > 0), (each != APART) & (partners != APART)


def mutex_watershed(
    affinities: NDArray[np.float32], probability: NDArray[np.float32], foreground: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return numbers of objects, 0 for background, (H, W); each object is 4-connected.

    Args:
        affinities: The probability that a pixel and its partner are of one object, (K, H, W), in the order of OFFSETS.
        probability: The probability that a pixel is of an object, (H, W); above 0 in the foreground.
        foreground: The pixels that are of objects, (H, W).
    """
    nodes = np.cumsum(foreground).reshape(foreground.shape) - 1
    edges = [_edges(affinities[channel], probability, nodes, foreground, channel) for channel in range(len(OFFSETS))]
    repels = np.repeat(np.arange(len(OFFSETS)) >= NUM_ATTRACTIVE, [each.shape[1] for each in edges])
    u, v, weights = np.concatenate(edges, axis=1)
    order = np.argsort(-weights, kind="stable")
    us, vs = (ends[order].astype(int).tolist() for ends in (u, v))
    roots = _clusters(int(foreground.sum()), us, vs, repels[order].tolist())
    numbers = np.zeros(foreground.shape, dtype=np.int32)
    numbers[foreground] = np.unique(roots, return_inverse=True)[1] + 1
    return numbers


def turned_back(affinities: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Return the affinities of an image from those of its view, whose pixels were turned back already, (K, H, W).

    An offset in the view is another one in the image, or the opposite of one, whose pairs start at the other pixel.

    Args:
        affinities: The maps of the view, with each pixel at its place in the image.
        turns: How many times `torch.rot90` turned the image for the view.
        mirrored: Whether the view was then mirrored, left to right.
    """
    maps = torch.empty_like(affinities)
    for values, (down, right) in zip(affinities, OFFSETS, strict=True):
        right = -right if mirrored else right
        for _ in range(turns):
            down, right = right, -down
        if (down, right) in OFFSETS:
            maps[OFFSETS.index((down, right))] = values
        else:
            maps[OFFSETS.index((-down, -right))] = values.roll((down, right), dims=(0, 1))
    return maps


def _pairs(shape: tuple[int, ...], offset: Offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The pixels whose partner is within the image, and these partners."""
    ends = [(max(-step, 0), max(side - max(step, 0), 0)) for side, step in zip(shape, offset, strict=True)]
    here = tuple(slice(start, max(start, stop)) for start, stop in ends)
    there = tuple(slice(one.start + step, one.stop + step) for one, step in zip(here, offset, strict=True))
    return here, there


def _edges(
    affinities: NDArray[np.float32],
    probability: NDArray[np.float32],
    nodes: NDArray[np.int64],
    foreground: NDArray[np.bool_],
    channel: int,
) -> NDArray[np.float64]:
    """The two pixels of each pair of an offset and how strongly they attract or repel each other, (3, E)."""
    here, there = _pairs(foreground.shape, OFFSETS[channel])
    are_pairs = foreground[here] & foreground[there]
    if channel >= NUM_ATTRACTIVE:
        grid = np.zeros_like(foreground)
        grid[::STRIDE, ::STRIDE] = True
        are_pairs &= grid[here]
    weights = affinities[here][are_pairs].astype(float)
    if channel >= NUM_ATTRACTIVE:
        are_foreground = (probability[here] * probability[there])[are_pairs]
        weights = 1 - np.minimum(weights / are_foreground, 1)
    return np.stack([nodes[here][are_pairs], nodes[there][are_pairs], weights])


def _clusters(num_nodes: int, us: list[int], vs: list[int], repels: list[bool]) -> list[int]:
    """The representative of each node's cluster, after all edges were visited in their order."""
    parents = list(range(num_nodes))
    enemies: defaultdict[int, set[int]] = defaultdict(set)  # of each representative

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    for u, v, is_repelling in zip(us, vs, repels, strict=True):
        u, v = root(u), root(v)
        if u == v:
            continue
        if is_repelling:
            enemies[u].add(v)
            enemies[v].add(u)
        elif v not in enemies[u]:
            if len(enemies[u]) < len(enemies[v]):
                u, v = v, u
            parents[v] = u
            for enemy in enemies.pop(v, ()):
                enemies[enemy].remove(v)
                enemies[enemy].add(u)
                enemies[u].add(enemy)
    return [root(node) for node in range(num_nodes)]
