"""A plan that deserves no advice, to be changed."""

from dataclasses import replace
from typing import Any

from unet_diffusion.checks.plan import Plan

GOOD = Plan(
    task="denoise",
    image_shape=(3, 32, 32),
    num_train=10_000,
    num_val=500,
    batch_size=32,
    images_a_step=32,
    num_steps=20_000,
    num_parameters=1_000_000,
    num_trained=1_000_000,
    num_moments=2,
    optimizer="AdamW",
    learning_rate=2.0e-4,
    momentum=0.0,
    lr_warmup_steps=100,
    ema_decay=0.999,
    has_batch_norm=False,
    horizontal_flip=True,
    last_snr=1.0e-5,
)


def plan(**changes: Any) -> Plan:
    return replace(GOOD, **changes)
