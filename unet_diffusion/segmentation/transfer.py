"""From denoising to segmenting: a segmenter that starts with the weights of a trained denoiser.

A network that has learnt to denoise without labels gets a new head and is fine-tuned at a fixed timestep on few labels
(Brempong et al. 2022, https://arxiv.org/abs/2205.11423).
"""

from torch import Tensor

from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.features import FeatureClassifier

# The head predicts noise in a denoiser and classes in a segmenter; images to segment have no class to embed.
HEADS = ("conv_out.", "class_embedding.")


def is_of_denoiser(name: str) -> bool:
    """Whether a segmenter that starts with a denoiser's weights takes over the tensor of this name."""
    return not name.startswith(HEADS)


def load_denoiser_weights(network: PixelNetwork, denoiser: DenoiserParts) -> str:
    """Copy the weights of a denoiser into a segmenter, in place, and return a sentence about what was copied.

    A FeatureClassifier gets all weights of its frozen denoiser; another network gets all except those of the head and
    of a class embedding.

    Args:
        network: The network of the segmenter; it must have the widths of the denoiser.
        denoiser: The trained denoiser.

    Raises:
        ValueError: If the networks differ in more than the head; the error names a difference, and nothing is copied.
    """
    if isinstance(network, FeatureClassifier):
        if network.schedule.config != denoiser.schedule.config:
            raise ValueError(
                f"the schedule must be the denoiser's, {denoiser.schedule.config}, got {network.schedule.config}"
            )
        network.denoiser.load_state_dict(_fitting_weights(network.denoiser, denoiser.unet, heads=()))
        return f"copied all {_millions(denoiser.unet.state_dict())} weights of the denoiser, which stay frozen"
    weights = _fitting_weights(network, denoiser.unet, heads=HEADS)
    own = network.state_dict()
    network.load_state_dict({**own, **weights})
    new = sorted(name for name in own if name not in weights)
    left = sorted(name for name in denoiser.unet.state_dict() if name not in weights)
    return (
        f"copied {len(weights)} tensors, {_millions(weights)} weights of the denoiser; new in the segmenter: "
        f"{', '.join(new)}; not copied: {', '.join(left)}"
    )


def _fitting_weights(network: PixelNetwork, denoiser: PixelNetwork, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the denoiser's weights by name, without the heads, if the network has the same names and shapes."""
    theirs, ours = (
        {name: value for name, value in unet.state_dict().items() if not name.startswith(heads)}
        for unet in (denoiser, network)
    )
    differ = [
        f"{name}: {_shape(theirs.get(name))} in the denoiser, {_shape(ours.get(name))} in the segmenter"
        for name in sorted(theirs.keys() | ours.keys())
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    if differ:
        raise ValueError(
            f"the segmenter must have the network of the denoiser, and {len(differ)} tensors differ, such as "
            f"{differ[0]}; give model.unet the arguments that the denoiser was trained with"
        )
    return theirs


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _millions(weights: dict[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in weights.values()) / 1e6:.2f} M"
