"""A pipeline from noise and conditions to images, with classifier-free guidance.

Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598). This file becomes the `pipeline.py` of an exported folder. It
needs only torch and diffusers, and for captions transformers.
"""

import inspect
import math

import numpy as np
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
    """Draws images from classes, captions, boxes, maps or images, in any combination, or from noise alone.

    Args:
        unet: The denoiser. Input channels beyond its output channels are maps beside the noised image.
        scheduler: Any diffusers scheduler with the network's noise schedule.
        vae: The autoencoder of the latents, with its scaling_factor, latents_mean and latents_std; None: the network
            denoises images.
        text_encoder: The encoder of captions; None: the network takes no captions.
        tokenizer: The tokenizer of captions.
        class_tokens: Embeds classes as tokens to attend to; None: the network embeds classes itself, or takes none.
        tokens: Turns something else that is known of an image, such as boxes, into tokens to attend to; None: nothing.
        maps: Turns something else that is known of an image into maps beside the noised one, such as a semantic map;
            None: nothing.
        maps_2: As maps, for something further.
        low_res_scheduler: Noises the small image to a level that is the network's class label; None: there is no small
            image, or it is not noised.
        class_names: The name of each label from 0; None: labels are numbers only.
        unconditional: The values that stood for "not known" in training, by name: any of "class_labels",
            "class_tokens", "prompt", "concat", and the arguments of tokens and maps. Without any there is no guidance.
        max_noise_level: Highest noise level of a small image.
        scale_factor: Height of the network's output divided by that of a small image.
        conditions: All that is known of an image in the order of training, in which maps stand beside the noised image:
            pairs of a name, "class_labels", "class_tokens", "prompt", "concat", "mask", "low_res" or the argument of
            tokens and maps, and of the class that trained it, which is not needed to draw.
        values: Type of the numbers of the training images, "dtype", and the numbers that became -1 and 1, "low" and
            "high"; None: they were pictures.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("path/to/folder", trust_remote_code=True)
        >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        >>> pipe(class_labels=[0, 1, 2], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "text_encoder->class_tokens->tokens->maps->maps_2->unet->vae"
    _optional_components = [  # noqa: RUF012  # diffusers' own form
        *("vae", "text_encoder", "tokenizer", "class_tokens", "tokens", "maps", "maps_2", "low_res_scheduler")
    ]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
        class_tokens: ModelMixin | None = None,
        tokens: ModelMixin | None = None,
        maps: ModelMixin | None = None,
        maps_2: ModelMixin | None = None,
        low_res_scheduler: DDPMScheduler | None = None,
        class_names: list[str] | None = None,
        unconditional: dict | None = None,
        max_noise_level: int = 350,
        scale_factor: int = 1,
        conditions: list[list[str]] | None = None,
        values: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            class_tokens=class_tokens,
            tokens=tokens,
            maps=maps,
            maps_2=maps_2,
            low_res_scheduler=low_res_scheduler,
        )
        self.register_to_config(
            class_names=class_names,
            unconditional=unconditional or {},
            max_noise_level=max_noise_level,
            scale_factor=scale_factor,
            conditions=conditions or [],
            values=values,
        )
        # the height of an image divided by the height of its latents
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        channels = unet.config.out_channels if vae is None else vae.config.in_channels
        self.num_channels = channels  # of images
        names = [name for name, _ in conditions or []]
        self.enlarges, self.paints = "low_res" in names, "mask" in names
        self.small_image = "small_image" if self.paints else "image"  # the argument
        mode = {"do_convert_rgb": channels == 3, "do_convert_grayscale": channels == 1, "vae_latent_channels": 0}
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, **mode)
        self.small_image_processor = VaeImageProcessor(do_resize=False, **mode)
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
        small_image: PipelineImageInput | None = None,
        concat: Tensor | None = None,
        noise_level: int | None = None,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others,
    ) -> ImagePipelineOutput | tuple:
        """Images for the conditions: each condition has one value for all images, or N values for N images.

        Args:
            class_labels: Numbers or names of classes.
            prompt: Captions; long captions are cut.
            image: Images to paint into, which are scaled to height and width, or small images to enlarge. Tensors and
                arrays must be in [0, 1].
            mask_image: Mask of the size of `image`; white, or 1, is painted, and the rest stays as it is.
            small_image: Small images to enlarge beside an image to paint into, of the size of the network's output
                divided by scale_factor.
            concat: Maps beside the noised image, (1 or N, K, h, w), of the size of the network's output.
            noise_level: Noise level of small images, in [0, max_noise_level]; a higher level keeps less detail. None:
                20, where the network takes one.
            batch_size: Number of images, if the conditions have one value or none.
            height: Height of the images in pixels; None: as in training. The size of a small image decides it.
            width: Width of the images in pixels; None: as in training. The size of a small image decides it.
            guidance_scale: Prediction = uncond + guidance_scale * (cond - uncond); 1 is off, and twice as fast.
            num_inference_steps: Denoising steps; second-order schedulers call the network more often.
            generator: Generator of the noise for all images, or a list with one generator per image.
            latents: Initial standard normal noise, (N, C, h, w); None: noise of the generator.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], "numbers" (N, C, H, W) of
                the type and range of the training images, or "latent" for the network's
                own space.
            return_dict: Return an object with `.images` instead of a tuple of one element.
            others: What tokens and maps take, such as `semantic_map`; see `arguments`, and their `prepare`.

        Raises:
            ValueError: If an argument is missing, not taken, unknown or of a wrong size, or if guidance_scale is not 1
                for a network that was trained without dropout of its conditions.
        """
        conditions = {
            "class_labels": class_labels,
            "prompt": prompt,
            "image": image,
            "mask_image": mask_image,
            "small_image": small_image,
            "concat": concat,
            **others,
        }
        self._check(conditions, guidance_scale, noise_level, output_type)
        tensors, shape = self._tensors(conditions, noise_level, batch_size, self._size(height, width))
        x = self._noise(shape, latents, generator)
        self._check_maps(tensors, x)
        tensors |= self._maps(tensors, x, generator)
        inputs = self._inputs(tensors, {})
        if guidance_scale != 1:
            unconditional = self._inputs(tensors, self.config.unconditional)
            inputs = {name: torch.cat([value, unconditional[name]]) for name, value in inputs.items()}
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        x = x * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            prediction = self._predict(self.scheduler.scale_model_input(x, t), t, inputs, guidance_scale)
            x = self.scheduler.step(prediction, t, x, **step_options).prev_sample
        images = x if output_type == "latent" else self._converted(self._pasted(self._decode(x), tensors), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _converted(self, images: Tensor, output_type: str) -> object:
        """Images in [-1, 1] as a type of output."""
        return (
            self._numbers(images) if output_type == "numbers" else self.image_processor.postprocess(images, output_type)
        )

    def _numbers(self, images: Tensor) -> np.ndarray:
        """Images in [-1, 1] as the numbers of files, (N, C, H, W): of the type and range of the training images."""
        values = self.config.values or {"dtype": "uint8", "low": 0, "high": 255}
        low, high, dtype = values["low"], values["high"], np.dtype(values["dtype"])
        numbers = (images.clamp(-1, 1).double().cpu().numpy() + 1) * ((high - low) / 2) + low
        return (np.rint(numbers) if dtype.kind in "ui" else numbers).astype(dtype)

    @property
    def arguments(self) -> list[str]:
        """Names of the conditions among the arguments of a call; all of them are required."""
        embeds_classes = self.unet.config.num_class_embeds is not None and self.low_res_scheduler is None
        is_taken = {
            "class_labels": embeds_classes or self.class_tokens is not None,
            "prompt": self.text_encoder is not None,
            "image": self.enlarges or self.paints,
            "mask_image": self.paints,
            "small_image": self.enlarges and self.paints,
            "concat": "concat" in self.channels_beside,
        }
        return [name for name, taken in is_taken.items() if taken] + [one.argument for one in self._others]

    @property
    def _others(self) -> list[ModelMixin]:
        return [one for one in (self.tokens, self.maps, self.maps_2) if one is not None]

    @property
    def channels_beside(self) -> dict[str, int]:
        """The number of channels of each of the maps beside the noised image, by names in their order."""
        config = self.unet.config
        known = {one.argument: one.config.channels for one in (self.maps, self.maps_2) if one is not None}
        known |= {"mask": 1 + config.out_channels, "low_res": self.num_channels}
        names = [name for name, _ in self.config.conditions if name in ("concat", *known)]
        rest = config.in_channels - config.out_channels - sum(known.get(name, 0) for name in names)
        return {name: known.get(name, rest) for name in names}

    def _check(self, conditions: dict, guidance_scale: float, noise_level: int | None, output_type: str) -> None:
        for name, value in conditions.items():
            if (value is not None) != (name in self.arguments):
                rule = "be given to" if value is None else "be left out for"
                raise ValueError(f"{name} must {rule} this model, which takes {', '.join(self.arguments) or 'nothing'}")
        if guidance_scale != 1 and not self.config.unconditional:
            raise ValueError(f"guidance_scale must be 1, got {guidance_scale}; this model was trained without dropout "
                             "of conditions")  # fmt: skip
        if noise_level is not None and self.low_res_scheduler is None:
            raise ValueError(f"noise_level must be left out for this model, which adds no noise, got {noise_level}")
        if not 0 <= (noise_level or 0) <= self.config.max_noise_level:
            raise ValueError(f"noise_level must be in [0, {self.config.max_noise_level}], got {noise_level}")
        if output_type not in ("pil", "np", "pt", "latent", "numbers"):
            raise ValueError(f"output_type must be pil, np, pt, latent or numbers, got {output_type!r}")
        if output_type == "pil" and self.num_channels not in (1, 3, 4):
            raise ValueError(f"output_type must be numbers, np or pt for images of {self.num_channels} channels, which "
                             "are no pictures, got pil")  # fmt: skip

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the images."""
        if self.enlarges and not self.paints and (height, width) != (None, None):
            raise ValueError(f"height and width must be left out, because image decides the size, got {height} and "
                             f"{width}")  # fmt: skip
        size = self.unet.config.sample_size
        default = (size, size) if isinstance(size, int) else size
        height = default[0] * self.vae_scale_factor if height is None else height
        return height, default[1] * self.vae_scale_factor if width is None else width

    def _tensors(
        self, conditions: dict, noise_level: int | None, batch_size: int, size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """The conditions as tensors, (N, ...) each on the device, and the shape (N, C, h, w) of x."""
        converters = {"class_labels": self._labels, "prompt": self._token_ids, "concat": torch.as_tensor}
        tensors = {
            name: convert(conditions[name]) for name, convert in converters.items() if conditions[name] is not None
        }
        if self.enlarges:
            tensors[self.small_image] = self.small_image_processor.preprocess(conditions[self.small_image])
        if self.low_res_scheduler is not None:
            tensors["noise_level"] = torch.tensor([20 if noise_level is None else noise_level])
        if self.enlarges and not self.paints:
            size = tuple(side * self.config.scale_factor * self.vae_scale_factor for side in tensors["image"].shape[2:])
        if self.paints:
            tensors["image"] = self.image_processor.preprocess(conditions["image"], *size)
            tensors["mask_image"] = self.mask_processor.preprocess(conditions["mask_image"], *size)
        for one in self._others:
            tensors[one.argument] = one.prepare(conditions[one.argument], size, self._encode)
        for name in ("image", "small_image"):
            if name in tensors and tensors[name].shape[1] != self.num_channels:
                raise ValueError(f"{name} must have {self.num_channels} channels, got {tensors[name].shape[1]}; "
                                 "convert it")  # fmt: skip
        tensors = {name: tensor.to(self._execution_device) for name, tensor in tensors.items()}
        count = max([batch_size, *(len(tensor) for tensor in tensors.values())])
        if wrong := [f"{len(tensor)} of {name}" for name, tensor in tensors.items() if len(tensor) not in (1, count)]:
            raise ValueError(f"each argument must have 1 or {count} values, got {', '.join(wrong)}")
        shape = (count, self.unet.config.out_channels, *self._latent_size(size))
        return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in tensors.items()}, shape

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of x for images of this size."""
        network = self.unet.config
        takes_any = isinstance(self.unet, UNet2DConditionModel) and network.downsample_padding == 1
        step = 1 if takes_any else 2 ** (len(network.block_out_channels) - 1)
        step = self.vae_scale_factor * math.lcm(step, self.config.scale_factor)
        if any(side % step for side in size):
            factor = self.vae_scale_factor * self.config.scale_factor
            enlarged = f", {factor} times those of image," if self.enlarges and not self.paints else ""
            raise ValueError(f"height and width{enlarged} must be multiples of {step}, got {size[0]} and {size[1]}")
        return size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor

    def _check_maps(self, tensors: dict[str, Tensor], x: Tensor) -> None:
        """Refuse small images and maps of another size than the noised image x needs."""
        shapes = {
            "small_image": (self.num_channels, *(side // self.config.scale_factor for side in x.shape[2:])),
            "concat": (self.channels_beside.get("concat"), *x.shape[2:]),
        }
        for name in shapes.keys() & tensors.keys():
            expected, got = shapes[name], tuple(tensors[name].shape)
            if got[1:] != expected:
                raise ValueError(f"{name} must be (N, {', '.join(map(str, expected))}), got {got}")

    def _maps(
        self, tensors: dict[str, Tensor], x: Tensor, generator: Generator | list[Generator] | None
    ) -> dict[str, Tensor]:
        """The maps beside the noised image x that a mask and a small image become, by name."""
        maps = {}
        if self.paints:
            mask = tensors["mask_image"]  # the masked area is grey; a latent is masked if its first pixel is
            latents = self._encode(tensors["image"] * (1 - mask))
            maps["mask"] = torch.cat([nn.functional.interpolate(mask, x.shape[2:]), latents], dim=1)
        if self.enlarges:
            maps["low_res"] = tensors[self.small_image]
        if self.low_res_scheduler is not None:
            noise = randn_tensor(maps["low_res"].shape, generator=generator, device=x.device)
            maps["low_res"] = self.low_res_scheduler.add_noise(maps["low_res"], noise, tensors["noise_level"])
        if self.config.scale_factor > 1:
            maps["low_res"] = nn.functional.interpolate(maps["low_res"], x.shape[2:], mode="bicubic")
        return maps

    def _inputs(self, tensors: dict[str, Tensor], unconditional: dict) -> dict[str, Tensor]:
        """The network's inputs beside x and t, (N, ...) each, with the nulls of `unconditional` in place of values."""

        def or_null(name: str, value: Tensor) -> Tensor:
            if name not in unconditional:
                return value
            null = self._token_ids(unconditional[name]) if name == "prompt" else torch.tensor(unconditional[name])
            return null.to(value).expand_as(value)

        def known(encoder: ModelMixin) -> Tensor:
            entry = tensors[encoder.argument]
            return encoder.null(entry) if encoder.argument in unconditional else entry

        inputs, tokens = {}, []  # the order of tokens does not matter
        if self.unet.config.num_class_embeds is not None:
            entry = tensors["class_labels" if self.low_res_scheduler is None else "noise_level"]
            inputs["class_labels"] = or_null("class_labels", entry)
        if self.class_tokens is not None:
            tokens.append(self.class_tokens(or_null("class_tokens", tensors["class_labels"])))
        if self.text_encoder is not None:
            tokens.append(self.text_encoder(or_null("prompt", tensors["prompt"]))[0])
        if self.tokens is not None:
            tokens.append(self.tokens(known(self.tokens)))
        if tokens:
            inputs["encoder_hidden_states"] = torch.cat(tokens, dim=1).to(self.unet.dtype)
        encoders = {one.argument: one for one in (self.maps, self.maps_2) if one is not None}
        maps = [
            encoders[name](known(encoders[name])) if name in encoders else or_null(name, tensors[name])
            for name in self.channels_beside
        ]
        if maps:
            inputs["concat"] = torch.cat(maps, dim=1)
        return inputs

    def _noise(
        self, shape: tuple[int, ...], latents: Tensor | None, generator: Generator | list[Generator] | None
    ) -> Tensor:
        """Standard normal noise of this shape, float32 on the device."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or a list of {shape[0]}, one per image, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device)
        if latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        return latents.float().to(self._execution_device)

    def _predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """The guided prediction, float32; guidance takes one doubled batch, conditional half first."""
        conditions = {name: value for name, value in inputs.items() if name != "concat"}
        x = x if guidance_scale == 1 else torch.cat([x, x])
        x = torch.cat([x, inputs["concat"]], dim=1) if "concat" in inputs else x
        prediction = self.unet(x.to(self.unet.dtype), t, **conditions).sample.float()
        if guidance_scale == 1:
            return prediction
        cond, uncond = prediction.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def _encode(self, images: Tensor) -> Tensor:
        """The x0 of images in [-1, 1], float32: their normalised latents (means), or the images themselves."""
        images = images.to(self._execution_device)
        if self.vae is None:
            return images
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latents if isinstance(self.vae, VQModel) else encoded.latent_dist.mean
        mean, std = self._moments(images.device)
        return (latents.float() - mean) / std

    def _decode(self, x: Tensor) -> Tensor:
        """The images of x0, float32, in about [-1, 1]."""
        if self.vae is None:
            return x
        mean, std = self._moments(x.device)
        return self.vae.decode((x * std + mean).to(self.vae.dtype)).sample.float()

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of the autoencoder's latents, (1 or C, 1, 1) each."""
        config = self.vae.config
        mean, std = config.get("latents_mean") or [0.0], config.get("latents_std") or [1.0]
        mean, std = (torch.tensor(moment, device=device).view(-1, 1, 1) for moment in (mean, std))
        return mean, std / config.scaling_factor

    def _pasted(self, images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The images, with the original image outside the mask."""
        return torch.where(tensors["mask_image"] == 1, images, tensors["image"]) if self.paints else images

    def _labels(self, class_labels: int | str | list[int | str]) -> Tensor:
        """The number of each label, (N,) int64."""
        names, count = self.config.class_names or [], self._num_classes()
        labels = []
        for label in [class_labels] if isinstance(class_labels, int | str) else class_labels:
            name = str(label)  # names win over numbers, as classes may be called 1 to 12
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
        """The token ids of captions, (N, L) int64."""
        options = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True}
        return self.tokenizer([prompt] if isinstance(prompt, str) else prompt, **options, return_tensors="pt").input_ids
