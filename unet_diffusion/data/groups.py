"""Images that belong together, such as the slices of a patient or an emoji in five skin tones.

Where some of a group are trained on and others validated on, the validation measures memory. Where groups differ in
size, large ones are shown more often than small ones. Both are settled here, by the names of the images.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from unet_diffusion.data.split import MAX_NUM_VAL, VAL_SHARE, check_split, number_of


@dataclass(frozen=True)
class Groups:
    r"""Which images belong together: those whose names are equal without what a pattern matches.

    Args:
        pattern: A regular expression of what differs within a group. With `_slice\d+`, the images p07_slice001.png and
            p07_slice002.png belong together.
        balanced: Whether an epoch shows each group equally often, whatever its size. An epoch has as many images as
            without; some images of small groups come several times, and some of large ones in another epoch.

    Raises:
        ValueError: If the pattern is no regular expression.
    """

    pattern: str
    balanced: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"groups.pattern must be a regular expression, got {self.pattern!r}: {error}") from error

    def of(self, names: Sequence[str]) -> list[str]:
        """The name of each image's group, which is its own without what the pattern matches.

        Args:
            names: The name of each image, with its folders below the root and its ending.

        Raises:
            ValueError: If the pattern matches in no name, or leaves one group only.
        """
        groups = [re.sub(self.pattern, "", name) for name in names]
        if not any(re.search(self.pattern, name) for name in names):
            raise ValueError(f"groups.pattern must match in the names of images, and {self.pattern!r} matches in none "
                             f"of {len(names)}, such as {names[0]}; correct it, or leave groups out")  # fmt: skip
        if len(set(groups)) < 2:
            raise ValueError(f"there must be at least 2 groups, to train and to validate on, and groups.pattern "
                             f"{self.pattern!r} leaves {groups[0]!r} of every name; let it match less")  # fmt: skip
        return groups


def split_by_group(groups: Sequence[str], num_val: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted indices to train on and to validate on, with each group on one side.

    A hash of its name gives each group a number in [0, 1), as `split_by_name` gives one to an image. The groups with
    the lowest numbers are validated on. Where images are added, no group that was trained on moves to the others,
    unless num_val is raised.

    Args:
        groups: The name of each image's group.
        num_val: The number of validation images at least, as a group is kept whole. None takes the groups with a number
            below 0.1: at least one, not all, and no more than 1000 images take.

    Raises:
        ValueError: If no group is left to train on.
    """
    numbers = {group: number_of(group) for group in groups}
    ranked = sorted(numbers, key=numbers.__getitem__)
    if num_val is None:
        low = [group for group in ranked[:-1] if numbers[group] < VAL_SHARE]  # the last is left to train on
        chosen = _first_groups(low or ranked[:1], groups, MAX_NUM_VAL)
    else:
        check_split(len(groups), num_val)
        chosen = _first_groups(ranked, groups, num_val)
    if len(chosen) == len(ranked):
        raise ValueError(f"num_val must leave a group to train on, and {num_val} takes all {len(ranked)} groups of the "
                         f"{len(groups)} images; lower it")  # fmt: skip
    validated = torch.tensor([group in chosen for group in groups])
    return (~validated).nonzero()[:, 0], validated.nonzero()[:, 0]


def _first_groups(ranked: Sequence[str], groups: Sequence[str], num_images: int) -> set[str]:
    """The first groups that together hold at least num_images images, or all."""
    sizes = Counter(groups)
    before = accumulate((sizes[group] for group in ranked), initial=0)
    return {group for group, total in zip(ranked, before, strict=False) if total < num_images}


def balanced_order(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Positions of n images in a random order in which all groups come equally often, (n,) int64.

    The order consists of rounds. Each round shows one image of each group, in random order, and the last round is cut
    off. A group's images take turns, so that none comes a second time before all others have come.

    Args:
        groups: The number of each image's group, (n,) int64.
        generator: Draws the order, on the CPU.
    """
    _, groups, sizes = groups.unique(return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(groups), generator=generator)
    members = shuffled[groups[shuffled].argsort(stable=True)]  # group by group, each in random order
    starts = sizes.cumsum(0) - sizes
    num_rounds = -(-len(groups) // len(sizes))
    rounds = [members[starts + number % sizes] for number in range(num_rounds)]
    orders = [torch.randperm(len(sizes), generator=generator) for _ in rounds]
    drawn = [one[order] for one, order in zip(rounds, orders, strict=True)]
    return torch.cat(drawn)[: len(groups)]
