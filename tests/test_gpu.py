"""What only a GPU can show: nothing waits for it, and what is compiled for it computes the same."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from ours import our_step

from unet_diffusion.diffusion.sampling import build_scheduler, denoise, image_generators
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.speed import set_speed, speeds_for
from unet_diffusion.training.health import SkipBadSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
SPEEDS = speeds_for(GPU)
SCHEDULERS = [
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
]


@pytest.fixture(autouse=True)
def compiled_anew():
    """Else the networks of all tests would be compiled as one that changes, and after eight no more."""
    torch.compiler.reset()


@contextmanager
def waiting_refused():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_bare_training_step_does_not_wait(tiny_unet, speed):
    step = our_step(tiny_unet().to(GPU), torch.rand(4, 1, 8, 8, device=GPU), speed=speed)
    for _ in range(3):  # a graph is captured in the second and replayed from the third
        step()
    with waiting_refused():
        step()


class RefuseWaiting(Callback):
    """In the second of two steps and later, from the batch to the moved average."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step >= 3 else "default")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("speed", ["plain", "graphed"])
def test_a_training_step_of_fit_does_not_wait(tiny_module, tiny_images, quiet_trainer, speed):
    module = tiny_module(num_class_embeds=3, label_dropout=0.1, speed=speed)
    trainer = quiet_trainer(
        accelerator="gpu", precision="bf16-mixed", gradient_clip_val=1.0, max_steps=6, limit_val_batches=0,
        log_every_n_steps=50, callbacks=[RefuseWaiting(), SkipBadSteps()],
    )  # fmt: skip
    trainer.fit(module, tiny_images())
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    ("name", "speed"), [*((name, "plain") for name in SCHEDULERS), ("UniPCMultistepScheduler", "graphed")]
)
def test_a_sampling_loop_does_not_wait(tiny_unet, name, speed):
    unet = tiny_unet().eval().to(GPU)
    set_speed(unet, speed)

    def draw():
        noise = torch.ones(2, 1, 8, 8, device=GPU)
        scheduler = build_scheduler(NoiseSchedule(), name)
        return denoise(
            unet, scheduler, image_generators(0, range(2)), noise.shape, num_inference_steps=10, noise=noise, device=GPU
        )

    draw()
    with waiting_refused():
        draw()


@pytest.mark.parametrize("speed", SPEEDS)
def test_every_speed_trains_the_same(tiny_unet, speed):
    unet, x, t = tiny_unet(scale_shift=True).to(GPU), torch.randn(2, 1, 8, 8, device=GPU), torch.tensor([1, 99]).to(GPU)
    for parameter in unet.parameters():  # many start at zero, where errors would not show
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = unet(x, t)
        expected_grads = torch.autograd.grad(expected.square().mean(), list(unet.parameters()))
        set_speed(unet, speed)
        for _ in range(3):
            found = unet(x, t)
            grads = torch.autograd.grad(found.square().mean(), list(unet.parameters()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "speed"), [*((name, "plain") for name in SCHEDULERS), ("DEISMultistepScheduler", "graphed")]
)
def test_a_gpu_draws_what_a_cpu_draws(tiny_unet, name, speed):
    drawn = []
    for device in ("cpu", "cuda"):
        unet = tiny_unet().eval().to(device)
        set_speed(unet, "plain" if device == "cpu" else speed)
        scheduler = build_scheduler(NoiseSchedule(prediction_type="v_prediction"), name, clip_sample=False)
        with torch.backends.cudnn.flags(allow_tf32=False):
            drawn.append(
                denoise(unet, scheduler, image_generators(0, range(2)), (2, 1, 8, 8), device=device).cpu()
            )  # fmt: skip
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)
