"""Class-conditional image generation with classifier-free guidance.

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598). This file is the `pipeline.py` of an exported folder: it needs
torch and diffusers, nothing else.
"""

import inspect

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of given classes from a UNet2DModel with a class embedding.

    Args:
        unet: the denoiser, called `unet(x_t, t, class_labels=...)`.
        scheduler: any diffusers scheduler for the network's noise schedule.
        null_label: the label that stands for no class; None: trained without, so no guidance.
        class_names: the name of each label from 0; None: labels are numbers only.
        vae: makes images of what is denoised, divided by its scaling_factor; None: images are denoised.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("path/to/folder", trust_remote_code=True)
        >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        >>> pipe([0, 1, 2], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012  # diffusers' own form

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        null_label: int | None = None,
        class_names: list[str] | None = None,
        vae: AutoencoderKL | VQModel | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(null_label=null_label, class_names=class_names)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        *,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: Generator | list[Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image for each label.

        Args:
            class_labels: numbers or names; one image is made for each.
            guidance_scale: prediction = uncond + guidance_scale * (cond - uncond); 1 is off, and twice as fast.
            num_inference_steps: evaluations of the network, roughly (a scheduler of second order makes more).
            generator: of the noise; one for all images, or a list with one for each.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], or "pt" (N, C, H, W) in [0, 1].
            return_dict: an object with `.images`, instead of a tuple of one element.

        Raises:
            ValueError: if a class or the output type is unknown, or guidance is asked for without a null label.
        """
        self._check(guidance_scale, output_type)
        labels = self._labels(class_labels).to(self._execution_device)
        self.scheduler.set_timesteps(num_inference_steps, device=labels.device)
        x = randn_tensor(self._shape(len(labels)), generator=generator, device=labels.device)
        x = x * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            prediction = self._predict(self.scheduler.scale_model_input(x, t), t, labels, guidance_scale)
            x = self.scheduler.step(prediction, t, x, **step_options).prev_sample
        images = self._finish((self._decode(x) / 2 + 0.5).clamp(0, 1), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, guidance_scale: float, output_type: str) -> None:
        if guidance_scale != 1.0 and self.config.null_label is None:
            raise ValueError(f"guidance_scale must be 1, as there is no null label, got {guidance_scale}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """The guided prediction, float32: both halves of one doubled batch, where there is guidance."""
        x = x.to(self.unet.dtype)
        if guidance_scale == 1.0:
            return self.unet(x, t, class_labels=labels).sample.float()
        null_labels = torch.full_like(labels, self.config.null_label)
        both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null_labels])).sample.float()
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def _decode(self, x: Tensor) -> Tensor:
        """Images in about [-1, 1], float32."""
        if self.vae is None:
            return x
        return self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()

    def _labels(self, class_labels: int | str | list[int | str]) -> Tensor:
        """Labels as numbers, (N,) int64."""
        names = self.config.class_names or []
        count = len(names) or self.unet.config.num_class_embeds
        labels = []
        for label in [class_labels] if isinstance(class_labels, int | str) else class_labels:
            if isinstance(label, str) and label not in names:
                raise ValueError(f"class_labels must be numbers or among {names}, got {label!r}")
            labels.append(names.index(label) if isinstance(label, str) else int(label))
            if not 0 <= labels[-1] < count and labels[-1] != self.config.null_label:
                raise ValueError(f"class_labels must be in [0, {count}), got {label}")
        return torch.tensor(labels, dtype=torch.int64)

    def _shape(self, count: int) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (count, self.unet.config.in_channels, height, width)

    def _finish(self, images: Tensor, output_type: str):
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()  # (N, C, H, W) -> (N, H, W, C)
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
