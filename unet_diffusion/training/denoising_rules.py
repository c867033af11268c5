"""What may be trained together: a denoiser's network, settings, conditions and batches, and what a run keeps."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from unet_diffusion.diffusion.conditions.class_labels import NOISE_LEVEL_ENTRY, ClassLabels
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.losses import LossWeighting
from unet_diffusion.diffusion.parts import channels_beside
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.latents.codec import Codec
from unet_diffusion.models.unet import PixelNetwork


def check_batch(batch: Any, *, needs_index: bool) -> None:
    """Refuse a batch that is not a dict with images or x0.

    Args:
        batch: The batch.
        needs_index: Whether it must hold the numbers of its images, as in validation.

    Raises:
        ValueError: If the batch is not such a dict, or lacks the numbers.
    """
    has_images = isinstance(batch, Mapping) and ("images" in batch or "x0" in batch)
    if has_images and ("index" in batch or not needs_index):
        return
    got = f"entries {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(
        'a batch must be a dict with "images" (B, C, H, W) in [-1, 1], or "x0", and "index" (B,), the number of each '
        f"image in its data set, got {got}; make such a dict in the dataset or in collate_fn"
    )


def check_settings(
    schedule: NoiseSchedule,
    loss_weighting: LossWeighting,
    label_dropout: float,
    num_class_embeds: int | None,
) -> None:
    """Refuse settings that contradict each other.

    Args:
        schedule: The noise schedule.
        loss_weighting: The weighting of the loss.
        label_dropout: The probability of training on the null label.
        num_class_embeds: The rows of the network's class embedding; None: it has none.

    Raises:
        ValueError: If two settings contradict each other.
    """
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout must be in [0, 1), got {label_dropout}")
    if label_dropout > 0 and num_class_embeds is None:
        raise ValueError(
            f"label_dropout {label_dropout} needs a network with classes; set num_class_embeds to their number + 1"
        )
    if loss_weighting == "min_snr" and schedule.rescale_betas_zero_snr:
        raise ValueError(
            "min_snr gives the last timestep of rescale_betas_zero_snr no weight, and sampling starts there; "
            "use loss_weighting uniform"
        )


def space_identity(space: dict[str, Any] | None) -> dict[str, Any]:
    """What may not change of the latents while a run goes on; their autoencoder may be moved.

    Args:
        space: The record of the latents; None: images are denoised.
    """
    return {f"latent {name}": (space or {}).get(name) for name in ("fingerprint", "mean", "std")}


def check_denoises(unet: PixelNetwork) -> None:
    """Refuse a network that takes no timestep, or gives a prediction of another size than its input.

    Raises:
        ValueError: If the network is one.
    """
    if unet.time_embedding is None:
        raise ValueError(f"a denoiser needs a timestep: set timestep_embedding of {type(unet).__name__} to true")
    if unet.margin:
        raise ValueError(
            f"a denoiser must keep height and width, and this network takes {unet.margin} pixels off each side; "
            "set padding to same"
        )


def sample_shape_of(datamodule: Any, codec: Codec) -> tuple[int, int, int]:
    """(C, h, w) of what is denoised, by the codec where the data hold images."""
    channels, height, width = datamodule.image_shape
    holds_x0 = getattr(datamodule, "codec", None) is not None
    return (channels, height, width) if holds_x0 else codec.sample_shape((channels, height, width))


def check_conditions(unet: PixelNetwork, conditions: Sequence[Condition]) -> None:
    """Refuse conditions that give what the network does not take, or lack what it takes.

    Raises:
        ValueError: If there is one; it is named.
    """
    if unet.config.get("vector_dim") is not None and not any("vector" in one.network_arguments for one in conditions):
        raise ValueError(f"vector_dim must be None to be trained without a condition that gives a vector, got "
                         f"{unet.config['vector_dim']}")  # fmt: skip
    if any(isinstance(one, ClassLabels) for one in conditions):
        raise ValueError("ClassLabels must not be among the conditions; set num_class_embeds and label_dropout instead")
    for condition in conditions:
        condition.check_config()
        reads = [one.batch_key for one in conditions]
        is_single = condition.provides or condition.batch_key in ("captions", "concat")
        if is_single and reads.count(condition.batch_key) > 1:
            raise ValueError(f"there must be at most one condition that reads {condition.batch_key!r}, as there is one "
                             "an image")  # fmt: skip
        needed = {name: type(one).__name__ for one in conditions for name in one.needs}
        if refused := [name for name in condition.refuses if name in needed]:
            of_small_image = isinstance(condition, LowResolution)
            fix = "set its option to small_image, or remove one of them" if of_small_image else "remove one of them"
            raise ValueError(f"{type(condition).__name__} draws without the {refused[0]} that {needed[refused[0]]} "
                             f"needs; {fix}")  # fmt: skip
    taken = inspect.signature(unet.forward).parameters
    for condition in conditions:
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
        others = [name for name in condition.network_arguments if name not in taken]
        if others and not takes_all:
            raise ValueError(f"{type(unet).__name__} takes no {others[0]!r}, which the condition "
                             f"{type(condition).__name__} gives; use a DenoiserUNet")  # fmt: skip
    if "context_dim" not in unet.config:
        return  # a network of one's own
    takes = unet.config["context_dim"]
    widths = {one.config["context_dim"] for one in conditions if one.network_argument == "context"}
    if widths != ({takes} if takes else set()):
        raise ValueError(
            f"context_dim of the network and of its conditions must be the same, got {takes} and "
            f"{', '.join(map(str, sorted(widths))) or 'no condition with one'}; set model.unet.context_dim and "
            "model.conditions"
        )


def check_channels(
    unet: PixelNetwork, sample_shape: tuple[int, int, int], conditions: nn.ModuleList, codec: Codec
) -> None:
    """Refuse a network for other channels, or another size, than the data and the conditions give.

    A small image that is as large as the image is refused, too: the network would copy it.

    Args:
        unet: The network.
        sample_shape: (C, h, w) of what is denoised.
        conditions: The conditions beside the class labels.
        codec: The codec between images and what is denoised.

    Raises:
        ValueError: If the network takes another number of channels, or not this size, or if nothing is enlarged.
    """
    beside = channels_beside(conditions)
    if sample_shape[0] + beside != unet.in_channels:
        more = f" plus {beside} channels from conditions" if beside else ""
        raise ValueError(
            f"the {codec.name} have {sample_shape[0]} channels{more} and the network takes {unet.in_channels}; set "
            "model.unet.in_channels or data.channels"
        )
    unet.check_size(*sample_shape[1:])
    is_small = [one.scale_factor * codec.downsampling > 1 for one in conditions if isinstance(one, LowResolution)]
    if not all(is_small):
        raise ValueError("scale_factor of LowResolution must be above 1 where images are denoised themselves, got 1, "
                         "which enlarges nothing; set it, to 4 for example")  # fmt: skip


def check_noise_levels(conditions: Sequence[Condition], provided: set[str]) -> None:
    """Refuse a class embedding with more or fewer rows than the levels of noise that another condition provides.

    Args:
        conditions: All conditions, the class labels first.
        provided: The entries that conditions provide.

    Raises:
        ValueError: If the number of rows differs.
    """
    if NOISE_LEVEL_ENTRY not in provided or not isinstance(conditions[0], ClassLabels):
        return
    wanted = next(one.num_classes for one in conditions[1:] if NOISE_LEVEL_ENTRY in one.provides)
    if (rows := conditions[0].num_embeddings) != wanted:
        raise ValueError(f"num_class_embeds must be {wanted}, a class for each level of noise, got {rows}")


def conditions_identity(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What may not change of the conditions while a run goes on.

    How often a condition is dropped may change, and whether its weights are trained.

    Args:
        records: The records of the conditions.
    """
    identities = []
    for record in records:
        init_args = {name: one for name, one in record["init_args"].items() if name not in ("dropout", "frozen")}
        identities.append({**record, "init_args": init_args})
    return identities
