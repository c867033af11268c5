"""Settings that are likely to waste a run, each with the reason and the option that mends it.

The limits leave room for everything that the recipes do; tests/checks/test_advice.py holds that.
"""

import math

from unet_diffusion.checks.captions import WORD
from unet_diffusion.checks.findings import Finding, percent
from unet_diffusion.checks.plan import Plan

FEW_TIMES, MANY_TIMES = 3, 3000  # an image is shown
FEW_SHOWN = 30_000  # images in all; with more, a large set need not be shown several times
STRUCTURE = 300_000  # images in all after which public runs of small images begin to show structure
SMALLEST = 256  # pixels of those images, or numbers of latents
VISIBLE_MEAN = 1.0  # signal to noise of an image's mean at the noisiest timestep
ADAMS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
# The least, a usual and the largest rate:
ADAM_RATES = (1.0e-5, 2.0e-4, 5.0e-3)  # at BATCH images a step; the rates that work grow with the root of the batch
BATCH = 16
SGD_RATES = (1.0e-4, 0.1, 1.0)  # divided by 1 - momentum
FEW_VALIDATED = 10  # images
DIRECTIONS = {  # words of captions
    *("left", "right", "leftwards", "rightwards"),
    *("letter", "letters", "digit", "digits", "clock", "text", "word", "words"),
}
MANY_DIRECTIONS = 0.01  # of the captions
DIGITS = [str(digit) for digit in range(10)]


def advice(plan: Plan) -> list[Finding]:
    """What is likely to go wrong with these settings."""
    rules = (_batch_norm, _rate, _warmup, _times_shown, _average, _noise, _flips, _guidance, _validation)
    return [finding for rule in rules for finding in rule(plan)]


def _batch_norm(plan: Plan) -> list[Finding]:
    if not plan.has_batch_norm or plan.batch_size > 1:
        return []
    text = "batch norm with batches of one: it normalises by statistics of that image alone, and predicts with others"
    return [Finding("warning", text, "--data.batch_size 4, or --model.unet.norm null")]


def _rate(plan: Plan) -> list[Finding]:
    """Of optimisers whose usual rates are known: others have rates of their own, such as 1 for Prodigy."""
    if plan.optimizer in ADAMS:
        rates, scale = ADAM_RATES, math.sqrt(plan.images_a_step / BATCH)
    elif plan.optimizer == "SGD":
        rates, scale = SGD_RATES, 1 - plan.momentum
    else:
        return []
    low, usual, high = (rate * scale for rate in rates)
    if low <= plan.learning_rate <= high:
        return []
    is_low = plan.learning_rate < low
    word, what = ("low", "hardly learns in the steps of a run") if is_low else ("high", "is likely to diverge")
    text = (
        f"a learning rate of {plan.learning_rate:.3g} is {word} for {plan.optimizer} at {plan.images_a_step} images a "
        f"step; it {what}"
    )
    return [Finding("advice", text, f"--model.optimizer.lr {usual:.1e}, or another near it")]


def _warmup(plan: Plan) -> list[Finding]:
    if plan.lr_warmup_steps < plan.num_steps or not plan.lr_warmup_steps:
        return []
    text = f"the learning rate rises over {plan.lr_warmup_steps:,} steps, and the run has {plan.num_steps:,.0f}"
    return [Finding("advice", text, f"--model.lr_warmup_steps {max(int(plan.num_steps) // 10, 1)}")]


def _times_shown(plan: Plan) -> list[Finding]:
    if plan.num_steps == math.inf:
        return []
    times, total = plan.times_shown, plan.num_steps * plan.images_a_step
    enough = math.ceil(FEW_TIMES * plan.num_train / plan.images_a_step)
    if times < FEW_TIMES and total < FEW_SHOWN:
        text = f"each image is shown {times:.2g} times, {total:,.0f} in all, which is little to learn from"
        return [Finding("advice", text, f"--trainer.max_steps {enough} or more")]
    if times > MANY_TIMES:
        text = f"each image is shown {times:,.0f} times, so that the network learns the {plan.num_train:,} by heart"
        most = math.floor(MANY_TIMES * plan.num_train / plan.images_a_step)
        return [
            Finding("advice", text, f"--trainer.max_steps {most}, more images, and the checkpoint of the best loss")
        ]
    if plan.task == "denoise" and total < STRUCTURE and math.prod(plan.image_shape[1:]) >= SMALLEST:
        text = f"{total:,.0f} images are shown in all; samples with clear structure often take {STRUCTURE:,} and more"
        return [Finding("note", text, "--trainer.max_steps")]
    return []


def _average(plan: Plan) -> list[Finding]:
    length = 1 / (1 - plan.ema_decay)
    if not plan.ema_decay or length <= plan.num_steps:
        return []
    text = (
        f"ema_decay {plan.ema_decay:g} averages over about {length:,.0f} steps, and the run has {plan.num_steps:,.0f}: "
        "it is never reached, and the average is what its warm-up makes of it"
    )
    decay = 1 - 10 / max(plan.num_steps, 20)
    return [Finding("advice", text, f"--model.ema_decay {decay:.4g}, a tenth of the run")]


def _noise(plan: Plan) -> list[Finding]:
    """The mean of an image averages its noise away: it is seen at the noisiest timestep, and missing in sampling.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891; Hoogeboom et al. 2023, https://arxiv.org/abs/2301.11093.
    """
    if plan.last_snr is None:
        return []
    height, width = plan.image_shape[1:]
    visible = plan.last_snr * height * width
    if visible <= VISIBLE_MEAN:
        return []
    text = (
        f"at the noisiest timestep the mean of a {height}x{width} image is still {visible:.2g} times as strong as its "
        "noise; sampling begins without it, and brightness and colours come out grey"
    )
    option = "--model.schedule.beta_schedule squaredcos_cap_v2, or rescale_betas_zero_snr with v_prediction"
    return [Finding("advice", text, option)]


def _flips(plan: Plan) -> list[Finding]:
    if not plan.horizontal_flip:
        return []
    option = "--data.horizontal_flip false"
    if [(*WORD.findall(name), "")[0] for name in plan.class_names] == DIGITS:
        return [Finding("advice", "digits are mirrored, and most mirrored digits are not digits", option)]
    meant = [text for text in plan.captions if DIRECTIONS & {*WORD.findall(text.lower())}]
    if len(meant) > MANY_DIRECTIONS * len(plan.captions):
        text = (
            f"{len(meant)} captions ({percent(len(meant) / len(plan.captions))}) are of directions or signs, "
            f'such as "{meant[0]}"; images are mirrored and captions are not'
        )
        return [Finding("advice", text, option)]
    return []


def _guidance(plan: Plan) -> list[Finding]:
    if plan.can_be_guided is not False:
        return []
    text = "classes or captions are never left out in training, so that sampling cannot be guided (guidance_scale)"
    return [Finding("advice", text, "--model.label_dropout 0.1, or dropout 0.1 of the condition")]


def _validation(plan: Plan) -> list[Finding]:
    if plan.num_val >= FEW_VALIDATED or plan.task == "segment":
        return []
    text = f"with only {plan.num_val} validation images the loss is mostly chance"
    return [Finding("note", text, "--data.num_val N, a larger one")]
