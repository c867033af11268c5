"""Images to validate on that are trained on too, or look alike: the validation then measures what was memorised.

Images look alike if their thumbnails do: grey, at most 16x16, without their mean and contrast, so that brighter, tinted
and recompressed copies count. A threshold of 0.995 is passed by 29 % of held-out Noto emoji, which come in skin tones,
by 3 % of Fashion-MNIST, where shirts simply look alike, and by none of CIFAR-10 or of the digits of scikit-learn.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.checks.findings import Finding, Severity, percent
from unet_diffusion.runtime.messages import first_few

SIDE = 16  # of a thumbnail
ALIKE = 0.995  # correlation of two thumbnails
LEAST_CONTRAST = 1 / 100  # standard deviation of a thumbnail, of the range; below, images without content look alike
SOME_ALIKE, MANY_ALIKE = 0.01, 0.1  # of the images to validate on
AT_ONCE = 2**26  # numbers that are compared at once
NUM_PAIRS = 3  # that are named


def exact_findings(contents: Sequence[str], names: Sequence[str], train: Tensor, val: Tensor) -> list[Finding]:
    """Images that are equal: those on both sides of the split, and those that are trained on several times.

    Args:
        contents: A hash of each image.
        names: The name of each image.
        train: The images to train on, (N,) int64.
        val: The images to validate on, (M,) int64.
    """
    trained = {contents[i]: i for i in train.tolist()}
    shared = [(i, trained[contents[i]]) for i in val.tolist() if contents[i] in trained]
    findings = []
    if shared:
        pairs = [f"{names[i]} = {names[other]}" for i, other in shared]
        text = (
            f"{len(shared)} of {len(val)} images to validate on are trained on too, under other names "
            f"({first_few(pairs)}): the validation is better than it should be"
        )
        share = len(shared) / len(val)
        severity: Severity = "warning" if share > MANY_ALIKE else "advice" if share > SOME_ALIKE else "note"
        findings.append(Finding(severity, text, "remove them"))
    if twice := len(train) - len(trained):
        text = f"{twice} of {len(train)} images to train on are copies of others among them, and count more"
        findings.append(Finding("note", text, "remove them"))
    return findings


def alike_findings(thumbs: Tensor, names: Sequence[str], train: Tensor, val: Tensor) -> list[Finding]:
    """Images to validate on that look like one that is trained on.

    Args:
        thumbs: The thumbnail of each image, (N, D), as `thumbnails` makes them.
        names: The name of each image.
        train: The images to train on, (N,) int64.
        val: The images to validate on, (M,) int64.
    """
    likeness, nearest = nearest_trained(thumbs, train, val)
    alike = (likeness > ALIKE).nonzero().flatten()
    if not len(alike):
        return []
    share = len(alike) / len(val)
    order = alike[likeness[alike].argsort(descending=True)][:NUM_PAIRS].tolist()
    pairs = [f"{names[int(val[i])]} and {names[int(nearest[i])]}" for i in order]
    groups = nearest[alike].unique().numel()
    text = (
        f"{len(alike)} of {len(val)} images to validate on ({percent(share)}) and images to train on look alike, in "
        f"{groups} groups ({'; '.join(pairs)})"
    )
    if share < MANY_ALIKE:
        return [Finding("note", text)]
    text += ": the validation measures memory more than learning"
    option = "keep such groups on one side: by data.groups, if their names tell, or leave variants out"
    return [Finding("warning", text, option)]


def nearest_trained(thumbs: Tensor, train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """The likeness of each image to validate on to the most similar one that is trained on, (M,), and which, (M,).

    Args:
        thumbs: The thumbnail of each image, (N, D).
        train: The images to train on, (N,) int64.
        val: The images to validate on, (M,) int64.
    """
    trained = thumbs[train]
    rows = max(AT_ONCE // len(trained), 1)
    best = [(part @ trained.T).max(dim=1) for part in thumbs[val].split(rows)]
    return torch.cat([one.values for one in best]), train[torch.cat([one.indices for one in best])]


def thumbnails(images: Sequence[Tensor] | Tensor) -> Tensor:
    """Grey thumbnails of mean 0 and length 1, (N, D) float32; zeros where an image has no content.

    Args:
        images: Images or latents, (C, H, W) each, or all as one tensor (N, C, H, W).
    """
    if isinstance(images, Tensor):
        rows = max(AT_ONCE // images[0].numel(), 1)
        return torch.cat([_thumbnails(part) for part in images.split(rows)])
    return torch.cat([_thumbnails(image[None]) for image in images])


def _thumbnails(images: Tensor) -> Tensor:
    grey = images.float().mean(dim=1, keepdim=True)
    white = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
    height, width = (min(side, SIDE) for side in grey.shape[-2:])
    small = F.adaptive_avg_pool2d(grey, (height, width)).flatten(1) / white
    small = small - small.mean(dim=1, keepdim=True)
    has_content = small.std(dim=1, keepdim=True, correction=0) > LEAST_CONTRAST
    small = F.normalize(small, dim=1) * has_content
    return F.pad(small, (0, SIDE**2 - small.shape[1]))  # all of a set have one size, and labelled ones may differ
