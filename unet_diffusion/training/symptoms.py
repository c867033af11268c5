"""What a run shows when it goes wrong without an error: each symptom as a sentence with what to change, or None."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

MIN_STEPS_TO_JUDGE = 500  # before, networks have learnt too little to be warned about
GAUSSIAN_MARGIN = (0.2, 0.02)  # relative, and of the variance of what is predicted: networks copy their input inexactly
LEAST_DRIFT = 0.1  # of a channel's mean, of the range 2 of images
LEAST_COMPARED = 10  # images, whose deviation is known well enough
STANDARD_ERRORS = 4  # of a difference of means that chance explains once in 16,000


def warn_of(module: LightningModule, symptom: str | None, *, after: int = MIN_STEPS_TO_JUDGE) -> None:
    """Warn of a symptom, unless what shows it was trained for too few steps to be judged.

    Args:
        module: The module in training.
        symptom: The sentence; None: there is nothing to warn of.
        after: The number of steps of the run before which nothing is judged.
    """
    if symptom is not None and module.trainer.global_step >= after:
        rank_zero_warn(symptom)


def worse_than_gaussian(losses: Sequence[float], gaussian: Sequence[float]) -> str | None:
    """Whether a denoiser knows less of its images than their mean and variance.

    Args:
        losses: The validation loss in each quarter of the noise levels, from the least noise to the most.
        gaussian: What the best prediction would lose there if each pixel were Gaussian, see `gaussian_errors`.
    """
    relative, absolute = GAUSSIAN_MARGIN
    for quarter, (loss, bound) in enumerate(zip(losses, gaussian, strict=True), 1):
        if loss > bound * (1 + relative) + absolute:
            return (
                f"val/loss_q{quarter} is {loss:.3g}, and a predictor that knows the mean and variance of each pixel "
                f"alone would have {bound:.3g}; change model.optimizer.lr (usually lower), and look at the images that "
                "are trained on"
            )
    return None


def colour_drift(drawn: Tensor, real: Tensor) -> str | None:
    """Whether samples are brighter, darker or tinted compared with images of the data.

    Args:
        drawn: The mean of each channel of each sample, (N, C) in [-1, 1].
        real: The mean of each channel of images of the data, (M, C), of the same classes in the same shares.
    """
    if min(len(drawn), len(real)) < LEAST_COMPARED:
        return None
    drift = drawn.mean(dim=0) - real.mean(dim=0)
    chance = (drawn.var(dim=0) / len(drawn) + real.var(dim=0) / len(real)).sqrt()
    is_off = (drift.abs() > LEAST_DRIFT) & (drift.abs() > STANDARD_ERRORS * chance)
    if not is_off.any():
        return None
    channels = ", ".join(f"{number:+.2f}" for number in drift.tolist())
    return (
        f"samples differ from the images in the mean of their channels by {channels}, of values in [-1, 1]; if longer "
        "training does not mend it, lower samples.guidance_scale, or set rescale_betas_zero_snr with v_prediction"
    )


def one_class_only(predicted: Tensor, truth: Tensor, names: Sequence[str]) -> str | None:
    """Whether a segmenter gives all pixels the same class.

    Args:
        predicted: How many pixels were given each class, (K,).
        truth: How many pixels have each class, (K,).
        names: The name of each class.
    """
    if int((predicted > 0).sum()) != 1 or int((truth > 0).sum()) < 2:
        return None
    share = (truth.max() / truth.sum()).item()
    return (
        f"the network gives every pixel the class {names[int(predicted.argmax())]}, which is right for {share:.0%}; "
        "set model.loss to both or dice, or train longer"
    )
