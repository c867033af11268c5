"""A trained denoiser, which draws images."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.inference.running import ExportFormat, Running, StrPath
from unet_diffusion.inference.sample_options import ImageLike, SampleOptions
from unet_diffusion.models.speed import Speed
from unet_diffusion.runtime.tensor_files import is_single_file_name

if TYPE_CHECKING:  # it imports diffusers, which takes seconds, so `drawing` imports it when the first image is drawn
    from unet_diffusion.inference.drawing import Drawing


class Denoiser(DenoiserParts, Running):
    """A trained denoiser with its noise schedule, conditions and codec. `unet_diffusion.load` reads one from files."""

    formats: ClassVar[tuple[ExportFormat, ...]] = ("pipeline", "adapter", "onnx", "torch")

    def sample(
        self,
        num_images: int = 1,
        *,
        labels: Sequence[str | int] | str | int | None = None,
        captions: Sequence[str] | str | None = None,
        conditions: Mapping[str, Any] | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        strength: float | None = None,
        noise_level: int | None = None,
        scheduler: Any = "DPMSolverMultistepScheduler",
        num_inference_steps: int = 25,
        thresholding: bool = False,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        autoguidance: "Denoiser | None" = None,
        image_size: tuple[int, int] | int | None = None,
        window: int | None = None,
        overlap: float | None = None,
        interpolate: tuple[int, int] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
        watch: Callable[[float, Tensor], object] | None = None,
    ) -> Tensor:
        """Images drawn from noise, (N, C, H, W) float32 on the CPU, in about [-1, 1].

        Image i is a function of (seed, i) and its conditions, up to rounding; the batch size does not matter.

        Args:
            num_images: Number of images.
            labels: Numbers or names of classes, used in turn; None: all classes in turn.
            captions: Captions to draw, used in turn, for a denoiser that takes captions.
            conditions: Values for your own kinds of conditions, by the name of their option.
            image: Image to start from instead of noise, scaled and cropped to the size to draw; for an upscaler, the
                image to enlarge. It is a file, a PIL image, an array, or a tensor (C, H, W) in [-1, 1].
            mask: Mask of the size of the image; white is painted, black stays. A tensor (1, H, W) may be bool, True
                where the image is painted.
            strength: Share in (0, 1] of the steps that are taken from the image; a smaller share keeps more of the
                image. None: 0.8, or 1 with a mask.
            noise_level: Noise level of the image to enlarge, 0 to 350; a higher level keeps less of it. None: 20.
            scheduler: A diffusers scheduler, or the name of its class.
            num_inference_steps: Denoising steps.
            thresholding: Keep pixels in [-1, 1] at every step also with DPM-Solver++, DEIS and UniPC, which do so only
                when they are asked; DDPM, DDIM and Heun always do.
            guidance_scale: Strength of the pull towards labels or captions; 1 is off.
            guidance_rescale: Share in [0, 1] of the contrast added by guidance that is removed again.
            guidance_interval: Lowest and highest timestep that is guided; None: all timesteps.
            autoguidance: A worse denoiser to guide away from, such as an earlier checkpoint of the run.
            image_size: Height and width of the images in pixels, or one number for both; None: as in training.
            window: Side in pixels of overlapping windows for images larger than in training; None: the network sees the
                whole image at once.
            overlap: Share in [0, 1) of a window that it has in common with the next, at least; None: 0.5.
            interpolate: Two seeds; the images lead from the first image of one to the first image of the other.
            seed: Seed of the noise.
            indices: Numbers of the images to draw, from 0 to num_images - 1; None: all.
            batch_size: Number of images drawn at once.
            progress: Called with the number of images that took a step, as tqdm's update.
            watch: Called at each step as watch(t, x0), with the timestep and the x0 that the network takes a batch for,
                (B, C, h, w); `decode` shows it as images.

        Raises:
            ValueError: If options do not fit each other or this denoiser; the message says which values do.
            FileNotFoundError: If a file is missing.
        """
        options = SampleOptions.among(locals())
        drawn = range(num_images) if indices is None else indices
        if not {*drawn} <= {*range(num_images)}:
            raise ValueError(f"indices must be from 0 to {num_images - 1}, got {list(drawn)}; raise num_images")
        return self.drawing(options).draw(drawn, progress, watch)

    def drawing(
        self,
        options: SampleOptions,
        numbers: Sequence[int] | None = None,
        entries: Mapping[str, Tensor] | None = None,
    ) -> "Drawing":
        """A drawing of the request, which is read and checked once and then drawn batch by batch.

        Args:
            options: The request.
            numbers: The number of each image, from which its noise is drawn; None: from 0.
            entries: The entries that the conditions read, (num_images, ...) each, as in a batch of the data; None: the
                entries follow from the options.

        Raises:
            ValueError: If options do not fit each other or this denoiser.
            FileNotFoundError: If a file is missing.
        """
        from unet_diffusion.inference.drawing import Drawing

        if options.autoguidance is not None:
            for module in options.autoguidance._modules_to_move():
                module.to(self.device)
        return Drawing(self, options, device=self.device, entries=entries, numbers=numbers, context=self._context)

    def encode(self, images: Tensor) -> Tensor:
        """The x0 of images, (B, C, h, w) on the CPU: their normalised latents, or the images themselves.

        Args:
            images: Images, (B, C, H, W) in [-1, 1].
        """
        with self._context():
            return self.codec.encode(images.to(self.device)).cpu()

    def decode(self, x0: Tensor) -> Tensor:
        """The images of x0, (B, C, H, W) float32 on the CPU, in about [-1, 1].

        Args:
            x0: Normalised latents, or images, (B, C, h, w).
        """
        self.codec.to(self.device)
        with self._context():
            return self.codec.decode(x0)

    def save(self, path: StrPath) -> None:
        """Write a checkpoint file that `load` reads, and from which `fit --ckpt_path` continues with a new optimiser.

        Raises:
            FileExistsError: If the file exists; nothing is overwritten.
        """
        save_denoiser(self, path)

    def _export(self, folder: StrPath, format: ExportFormat, *, overwrite: bool) -> None:
        if format == "adapter":
            from unet_diffusion.diffusers_io.adapter_files import export_adapter

            export_adapter(self, folder, overwrite=overwrite)
            return
        if format in ("onnx", "torch"):
            from unet_diffusion.inference.portable import export_denoiser

            export_denoiser(self, folder, format=format, overwrite=overwrite)
            return
        if is_single_file_name(folder):
            from unet_diffusion.diffusers_io.single_file.exporting import export_single_file

            export_single_file(self, folder, overwrite=overwrite)
            return
        from unet_diffusion.diffusers_io.exporting import export_pipeline

        export_pipeline(self, folder, overwrite=overwrite)

    def load_lora_weights(self, path: StrPath, *, scale: float = 1.0) -> None:
        """Add a LoRA to the weights, as diffusers' pipelines load it, for all images from now on.

        Args:
            path: The .safetensors file, or a folder with pytorch_lora_weights.safetensors.
            scale: Factor of the change; 0 changes nothing.

        Raises:
            FileNotFoundError: If there is no such file.
            ImportError: If the package peft is missing.
            ValueError: If the file holds no LoRA of this denoiser; nothing is changed.
        """
        from unet_diffusion.diffusers_io.adapter_files import merge_lora

        merge_lora(self, path, scale=scale)

    def load_textual_inversion(self, path: StrPath) -> str:
        """Add a word to the text encoder, as diffusers' pipelines load it, and return it for use in captions.

        Args:
            path: The .safetensors file, or a folder with learned_embeds.safetensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the denoiser takes no captions, or the file does not hold one vector of its text encoder's
                width, or the tokenizer knows the word; nothing is changed.
        """
        from unet_diffusion.diffusers_io.adapter_files import add_word

        return add_word(self, path)

    def __repr__(self) -> str:
        weights = sum(parameter.numel() for parameter in self.unet.parameters())
        kinds = [type(condition).__name__ for condition in self.all_conditions]
        size = " x ".join(map(str, self.image_shape))
        by = "" if self.codec.name == "images" else f" by their {self.codec.name}"
        return (
            f"Denoiser of {size} images{by}, {type(self.unet).__name__} of {weights / 1e6:.2f} M weights, conditions: "
            f"{', '.join(kinds) or 'none'}; on {self.device} in {self.precision or 'float32'}"
        )

    def _modules_to_move(self) -> list[nn.Module]:
        return [self.unet, self.conditions]

    def _networks(self) -> list[tuple[nn.Module, Speed]]:
        return [(self.unet, self.speed)]
