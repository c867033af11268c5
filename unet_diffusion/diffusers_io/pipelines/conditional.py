"""Images from noise and from all that a network was told of them in training, with classifier-free guidance.

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598). This file is the `pipeline.py` of an exported folder: it needs
torch and diffusers, and transformers where there are captions; nothing else.
"""

import inspect

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn


class ConditionalPipeline(DiffusionPipeline):
    """Images of classes and captions, of what a mask leaves of a picture, or of a small picture; or of nothing.

    Args:
        unet: the denoiser. Its channels beyond those that it draws are maps beside the noised image.
        scheduler: any diffusers scheduler for the network's noise schedule.
        vae: makes images of what is denoised, by its scaling_factor, latents_mean and latents_std; None: images are.
        text_encoder: of captions; None: it takes none.
        tokenizer: of captions.
        class_tokens: makes a token to attend to of a class; None: the network itself embeds classes, or has none.
        low_res_scheduler: noises a small picture to enlarge, to a level that is its class; None: it takes none.
        class_names: the name of each label from 0; None: labels are numbers only.
        unconditional: what stood for not known in training, by name, any of "class_labels", "class_tokens", "prompt"
            and "concat"; guidance leads away from it. Without any there is no guidance.
        takes_mask: whether the maps are a mask and what it leaves of a picture.
        max_noise_level: highest level of a small picture's noise.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("path/to/folder", trust_remote_code=True)
        >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        >>> pipe(class_labels=[0, 1, 2], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "text_encoder->class_tokens->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "class_tokens", "low_res_scheduler"]  # noqa: RUF012  # diffusers' own form

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
        class_tokens: ModelMixin | None = None,
        low_res_scheduler: DDPMScheduler | None = None,
        class_names: list[str] | None = None,
        unconditional: dict | None = None,
        takes_mask: bool = False,
        max_noise_level: int = 350,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            class_tokens=class_tokens,
            low_res_scheduler=low_res_scheduler,
        )
        self.register_to_config(
            class_names=class_names,
            unconditional=unconditional or {},
            takes_mask=takes_mask,
            max_noise_level=max_noise_level,
        )
        # pixels along a side for one of what is denoised
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        channels = unet.config.out_channels if vae is None else vae.config.in_channels
        self.num_channels = channels  # of images
        kind = {"do_convert_rgb": channels == 3, "do_convert_grayscale": channels == 1, "vae_latent_channels": 0}
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, **kind)
        self.small_image_processor = VaeImageProcessor(do_resize=False, **kind)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @torch.no_grad()
    def __call__(
        self,
        *,
        class_labels: int | str | list[int | str] | None = None,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        concat: Tensor | None = None,
        noise_level: int = 20,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of what is given: one of it for all of them, or N for N images.

        Args:
            class_labels: numbers or names.
            prompt: captions; what is too long is cut off.
            image: pictures to paint into, scaled to height and width; or small ones to enlarge. Tensors and arrays are
                in [0, 1].
            mask_image: of the size of `image`; white, or 1, is painted anew, and the rest stays as it is.
            concat: what else the network has beside the noised image, (1 or N, K, h, w) of the size of what is
                denoised.
            noise_level: of small pictures, in [0, max_noise_level]; the more, the less their detail counts.
            batch_size: how many images, if what is given does not say it.
            height: of the images in pixels; None: as in training. A small picture decides it itself.
            width: as height.
            guidance_scale: prediction = uncond + guidance_scale * (cond - uncond); 1 is off, and twice as fast.
            num_inference_steps: evaluations of the network, roughly (a scheduler of second order makes more).
            generator: of the noise; one for all images, or a list with one for each.
            latents: standard normal noise to begin with, (N, C, h, w); None: that of the generator.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], or "latent" for what was
                denoised.
            return_dict: an object with `.images`, instead of a tuple of one element.

        Raises:
            ValueError: if something is missing, unknown or of another size, or guidance is asked for without
                null.
        """
        told = {
            "class_labels": class_labels,
            "prompt": prompt,
            "image": image,
            "mask_image": mask_image,
            "concat": concat,
        }
        self._check(told, guidance_scale, noise_level, output_type)
        given, shape = self._tensors(told, noise_level, batch_size, self._size(height, width))
        x = self._noise(shape, latents, generator)
        given |= self._maps(given, x, generator)
        inputs = self._inputs(given, {})
        if guidance_scale != 1:
            unconditional = self._inputs(given, self.config.unconditional)
            inputs = {name: torch.cat([one, unconditional[name]]) for name, one in inputs.items()}
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        x = x * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            prediction = self._predict(self.scheduler.scale_model_input(x, t), t, inputs, guidance_scale)
            x = self.scheduler.step(prediction, t, x, **step_options).prev_sample
        if output_type != "latent":
            x = self.image_processor.postprocess(self._pasted(self._decode(x), given), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    @property
    def arguments(self) -> list[str]:
        """Those of a call that say what is drawn; all of them must be given."""
        network, enlarges, paints = self.unet.config, self.low_res_scheduler is not None, self.config.takes_mask
        has_classes = network.num_class_embeds is not None or self.class_tokens is not None
        has_maps = network.in_channels > network.out_channels
        is_taken = {
            "class_labels": has_classes and not enlarges,
            "prompt": self.text_encoder is not None,
            "image": enlarges or paints,
            "mask_image": paints,
            "concat": has_maps and not enlarges and not paints,
        }
        return [name for name, taken in is_taken.items() if taken]

    def _check(self, told: dict, guidance_scale: float, noise_level: int, output_type: str) -> None:
        for name, value in told.items():
            if (value is not None) != (name in self.arguments):
                rule = "be given to" if value is None else "be left out for"
                raise ValueError(f"{name} must {rule} this model, which takes {', '.join(self.arguments) or 'nothing'}")
        if guidance_scale != 1 and not self.config.unconditional:
            raise ValueError(
                f"guidance_scale must be 1, got {guidance_scale}, as this model was not trained without its conditions"
            )
        if not 0 <= noise_level <= self.config.max_noise_level:
            raise ValueError(f"noise_level must be in [0, {self.config.max_noise_level}], got {noise_level}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the images."""
        if self.low_res_scheduler is not None and (height, width) != (None, None):
            raise ValueError(f"height and width must be left out, as the size of image decides, got {height}, {width}")
        size = self.unet.config.sample_size
        default = (size, size) if isinstance(size, int) else size
        height = default[0] * self.vae_scale_factor if height is None else height
        return height, default[1] * self.vae_scale_factor if width is None else width

    def _tensors(
        self, told: dict, noise_level: int, batch_size: int, size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """What is told, (N, ...) each on the device, and the shape (N, C, h, w) of what is denoised for it."""
        made = {"class_labels": self._labels, "prompt": self._token_ids, "concat": torch.as_tensor}
        tensors = {name: make(told[name]) for name, make in made.items() if told[name] is not None}
        if self.low_res_scheduler is not None:
            tensors["image"] = self.small_image_processor.preprocess(told["image"])
            height, width = tensors["image"].shape[2:]
            size = height * self.vae_scale_factor, width * self.vae_scale_factor
            tensors["class_labels"] = torch.tensor([noise_level])
        elif self.config.takes_mask:
            tensors["image"] = self.image_processor.preprocess(told["image"], *size)
            tensors["mask_image"] = self.mask_processor.preprocess(told["mask_image"], *size)
        if "image" in tensors and tensors["image"].shape[1] != self.num_channels:
            raise ValueError(
                f"image must have {self.num_channels} channels, got {tensors['image'].shape[1]}; convert it"
            )
        tensors = {name: one.to(self._execution_device) for name, one in tensors.items()}
        count = max([batch_size, *(len(one) for one in tensors.values())])
        if wrong := [f"{len(one)} of {name}" for name, one in tensors.items() if len(one) not in (1, count)]:
            raise ValueError(f"there must be 1 or {count} of all that is given, got {', '.join(wrong)}")
        shape = (count, self.unet.config.out_channels, *self._latent_size(size))
        return {name: one.expand(count, *one.shape[1:]) for name, one in tensors.items()}, shape

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what is denoised for images of that size."""
        network = self.unet.config
        takes_any = isinstance(self.unet, UNet2DConditionModel) and network.downsample_padding == 1
        step = self.vae_scale_factor * (1 if takes_any else 2 ** (len(network.block_out_channels) - 1))
        if any(side % step for side in size):
            enlarged = f", {self.vae_scale_factor} times those of image," if self.low_res_scheduler is not None else ""
            raise ValueError(f"height and width{enlarged} must be multiples of {step}, got {size[0]} and {size[1]}")
        return size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor

    def _maps(
        self, given: dict[str, Tensor], x: Tensor, generator: Generator | list[Generator] | None
    ) -> dict[str, Tensor]:
        """What the network has beside the noised image x, as "concat"; nothing if it has none."""
        if self.config.takes_mask:
            mask = given["mask_image"]  # what is covered is grey; a latent is covered where its first pixel is
            latents = self._encode(given["image"] * (1 - mask))
            concat = torch.cat([nn.functional.interpolate(mask, x.shape[2:]), latents], dim=1)
        elif self.low_res_scheduler is not None:
            noise = randn_tensor(given["image"].shape, generator=generator, device=x.device)
            concat = self.low_res_scheduler.add_noise(given["image"], noise, given["class_labels"])
        elif "concat" in given:
            concat = given["concat"]
        else:
            return {}
        wanted = (self.unet.config.in_channels - self.unet.config.out_channels, *x.shape[2:])
        if concat.shape[1:] != wanted:
            raise ValueError(f"concat must be (N, {', '.join(map(str, wanted))}), got {tuple(concat.shape)}")
        return {"concat": concat}

    def _inputs(self, given: dict[str, Tensor], unconditional: dict) -> dict[str, Tensor]:
        """What the network is called with beside noise and timestep, (N, ...) each; where there is a null, that."""

        def or_null(name: str, value: Tensor) -> Tensor:
            if name not in unconditional:
                return value
            null = self._token_ids(unconditional[name]) if name == "prompt" else torch.tensor(unconditional[name])
            return null.to(value).expand_as(value)

        inputs, tokens = {}, []  # of tokens the order does not matter
        if self.unet.config.num_class_embeds is not None:
            inputs["class_labels"] = or_null("class_labels", given["class_labels"])
        if self.class_tokens is not None:
            tokens.append(self.class_tokens(or_null("class_tokens", given["class_labels"])))
        if self.text_encoder is not None:
            tokens.append(self.text_encoder(or_null("prompt", given["prompt"]))[0])
        if tokens:
            inputs["encoder_hidden_states"] = torch.cat(tokens, dim=1).to(self.unet.dtype)
        if "concat" in given:
            inputs["concat"] = or_null("concat", given["concat"])
        return inputs

    def _noise(
        self, shape: tuple[int, ...], latents: Tensor | None, generator: Generator | list[Generator] | None
    ) -> Tensor:
        """Standard normal noise of that shape, float32 on the device."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or {shape[0]} for as many images, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device)
        if latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        return latents.float().to(self._execution_device)

    def _predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """The guided prediction, float32: both halves of one doubled batch, where there is guidance."""
        conditions = {name: one for name, one in inputs.items() if name != "concat"}
        x = x if guidance_scale == 1 else torch.cat([x, x])
        x = torch.cat([x, inputs["concat"]], dim=1) if "concat" in inputs else x
        prediction = self.unet(x.to(self.unet.dtype), t, **conditions).sample.float()
        if guidance_scale == 1:
            return prediction
        cond, uncond = prediction.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def _encode(self, images: Tensor) -> Tensor:
        """What is denoised for images in [-1, 1], float32; of latents, the means."""
        if self.vae is None:
            return images
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latents if isinstance(self.vae, VQModel) else encoded.latent_dist.mean
        mean, std = self._moments(images.device)
        return (latents.float() - mean) / std

    def _decode(self, x: Tensor) -> Tensor:
        """Images in about [-1, 1], float32."""
        if self.vae is None:
            return x
        mean, std = self._moments(x.device)
        return self.vae.decode((x * std + mean).to(self.vae.dtype)).sample.float()

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, (1 or C, 1, 1) each."""
        config = self.vae.config
        mean, std = config.get("latents_mean") or [0.0], config.get("latents_std") or [1.0]
        mean, std = (torch.tensor(one, device=device).view(-1, 1, 1) for one in (mean, std))
        return mean, std / config.scaling_factor

    def _pasted(self, images: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The images, and what a mask leaves of a picture as it is there."""
        return torch.where(given["mask_image"] == 1, images, given["image"]) if self.config.takes_mask else images

    def _labels(self, class_labels: int | str | list[int | str]) -> Tensor:
        """Labels as numbers, (N,) int64."""
        names, count = self.config.class_names or [], self._num_classes()
        labels = []
        for label in [class_labels] if isinstance(class_labels, int | str) else class_labels:
            name = str(label)  # of folders 0 to 11, say: a number is that of a class only if it is no name
            number = names.index(name) if name in names else int(name) if name.isdecimal() else -1
            if not 0 <= number < count:
                known = f"names of classes ({', '.join(names)}), or " if names else ""
                raise ValueError(f"class_labels must be {known}numbers from 0 to {count - 1}, got {label!r}")
            labels.append(number)
        return torch.tensor(labels, dtype=torch.int64)

    def _num_classes(self) -> int:
        if self.class_tokens is not None:
            return self.class_tokens.config.num_classes
        return self.unet.config.num_class_embeds - ("class_labels" in self.config.unconditional)

    def _token_ids(self, prompt: str | list[str]) -> Tensor:
        """Tokens of captions, (N, L) int64."""
        options = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True}
        return self.tokenizer([prompt] if isinstance(prompt, str) else prompt, **options, return_tensors="pt").input_ids
