"""From denoising to segmenting: the weights of a trained denoiser as the start of a segmenter.

After denoising without labels, the same network at a fixed timestep, with a new head, is fine-tuned on few labels
(Brempong et al. 2022, https://arxiv.org/abs/2205.11423).
"""

from torch import Tensor

from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.features import FeatureClassifier

HEADS = ("conv_out.", "class_embedding.")  # predicts noise before, classes after; images to segment have no class


def load_denoiser_weights(network: PixelNetwork, denoiser: DenoiserParts) -> str:
    """Copy a denoiser's weights into a segmenter, in place, and say what was copied and what was not.

    Of a FeatureClassifier, all weights of its frozen denoiser are copied; of another network, all but the head's and
    those of a class embedding.

    Args:
        network: to segment with; of the same widths as the denoiser.
        denoiser: the trained one.

    Raises:
        ValueError: if the networks differ in more than the head, naming what differs; nothing is copied then.
    """
    if isinstance(network, FeatureClassifier):
        if network.schedule.config != denoiser.schedule.config:
            raise ValueError(
                f"the schedule must be the denoiser's, {denoiser.schedule.config}, got {network.schedule.config}"
            )
        network.denoiser.load_state_dict(_fitting(network.denoiser, denoiser.unet, heads=()))
        return f"taken over: all {_millions(denoiser.unet.state_dict())} weights of the denoiser, frozen"
    weights = _fitting(network, denoiser.unet, heads=HEADS)
    own = network.state_dict()
    network.load_state_dict({**own, **weights})
    new = {name: value for name, value in own.items() if name not in weights}
    left = sorted(name for name in denoiser.unet.state_dict() if name not in weights)
    return (
        f"taken over: {len(weights)} tensors, {_millions(weights)} weights of the denoiser; "
        f"new: {', '.join(sorted(new))}; not taken over: {', '.join(left)}"
    )


def _fitting(network: PixelNetwork, denoiser: PixelNetwork, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The denoiser's weights by name, without the heads, if the network has the same ones in the same shapes."""
    theirs = {name: value for name, value in denoiser.state_dict().items() if not name.startswith(heads or ("\0",))}
    ours = {name: value for name, value in network.state_dict().items() if not name.startswith(heads or ("\0",))}
    differ = [
        f"{name}: {_shape(theirs.get(name))} in the denoiser, {_shape(ours.get(name))} here"
        for name in sorted(theirs.keys() | ours.keys())
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    if differ:
        raise ValueError(
            f"the denoiser has another network than the segmenter, {len(differ)} tensors differ, such as {differ[0]}; "
            "give model.unet the arguments that the denoiser was trained with"
        )
    return theirs


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _millions(weights: dict[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in weights.values()) / 1e6:.2f} M"
