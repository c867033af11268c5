"""What `unet-diffusion sample` draws with: a checkpoint, and all that its options add."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusers_io.interop import load_denoiser
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.guidance import Denoiser, Guidance
from unet_diffusion.diffusion.image_to_image import InitImage
from unet_diffusion.diffusion.sampling import check_sampling, num_network_steps, sample
from unet_diffusion.diffusion.tiling import windowed
from unet_diffusion.inference.record import TrainedDenoiser, contents_of
from unet_diffusion.inference.sample_options import (
    Picture,
    check_options,
    frames_noise,
    image_shape,
    maps_from,
    read_picture,
    start_from,
    window_overlap,
    window_size,
)
from unet_diffusion.latents.codec import autoencoder_of, decode_latents
from unet_diffusion.models.autoencoders import Autoencoder
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.precision import autocast


@dataclass(frozen=True)
class Drawing:
    """Networks on their device, and what they are given.

    Args:
        options: of the command.
        trained: the denoiser.
        weaker: to be led away from; None: there is none.
        shape: (C, H, W) of what is denoised.
        given: what the conditions are called with, (N, ...) each of N images.
        picture: to start from, or to be seen by the network; None: there is none.
        init_image: where sampling starts; None: from noise.
        autoencoder: of the latents; None: images are denoised.
        contents: hashes of the networks, by the options that name them.
    """

    options: argparse.Namespace
    trained: TrainedDenoiser
    weaker: TrainedDenoiser | None
    shape: tuple[int, int, int]
    given: dict[str, Tensor]
    picture: Picture | None
    init_image: InitImage | None
    autoencoder: Autoencoder | None
    contents: dict[str, str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Drawing":
        """Load what the options name, and refuse what cannot be drawn.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: if options do not fit each other or the checkpoint.
        """
        trained = load_denoiser(options.checkpoint)
        check_options(options, trained)
        weaker = _weaker(options, trained)
        networks = {"checkpoint": trained} if weaker is None else {"checkpoint": trained, "autoguidance": weaker}
        contents = {name: contents_of(network) for name, network in networks.items()}
        given = _given(options, trained)
        shape = image_shape(options, trained)
        window_size(options, trained)
        picture = read_picture(options, trained, shape)
        autoencoder = _autoencoder(options, trained)
        given |= maps_from(picture, options, trained, autoencoder)
        init_image = start_from(picture, options, trained, autoencoder)
        for one in (trained, weaker):
            if one is not None:
                one.unet.to(options.device)
                one.conditions.to(options.device)
        drawing = cls(options, trained, weaker, shape, given, picture, init_image, autoencoder, contents)
        check_sampling(
            trained.schedule, (1, *shape), init_image=init_image, **drawing._inputs([0]), **drawing._settings
        )
        return drawing

    @property
    def classes(self) -> list[str] | None:
        """Number and name of each class that is drawn, in turn; None of a model without classes."""
        if "labels" not in self.given:
            return None
        names = self.trained.class_names or []
        numbers = label_numbers(self.options.labels, self.trained)
        return [f"{number}: {names[number]}" if names else str(number) for number in numbers]

    @property
    def num_steps(self) -> int:
        """Calls of the network for a batch."""
        options = self.options
        return num_network_steps(self.trained.schedule, options.scheduler, options.num_inference_steps, self.init_image)

    def draw(self, indices: list[int], progress: Callable[[int], object]) -> Tensor:
        """The images of these numbers, (N, C, H, W) float32 on the CPU, in about [-1, 1].

        Args:
            indices: N numbers among all images of the seed.
            progress: called with the number of images that took a step.
        """
        options = self.options
        with autocast(torch.device(options.device).type, getattr(torch, options.precision)):
            images = sample(
                self._seen_through_windows(self.trained.unet),
                self.trained.schedule,
                (len(indices), *self.shape),
                seed=options.seed,
                indices=indices,
                noise=frames_noise(options, indices, self.shape),
                init_image=self.init_image,
                batch_size=options.batch_size,
                device=options.device,
                progress=progress,
                clip_sample=self.autoencoder is None,
                **self._inputs(indices),
                **self._settings,
            )
            if self.trained.latent_space is not None and self.autoencoder is not None:
                images = decode_latents(self.autoencoder, self.trained.latent_space, images)
        return images if self.picture is None else self.picture.pasted(images)

    @torch.no_grad()
    def _inputs(self, indices: list[int]) -> dict[str, Any]:
        """Those of the network, and those of the worse prediction of guidance."""
        part = {name: one[indices].to(self.options.device) for name, one in self.given.items()}
        inputs, unconditional = self.trained.inputs(part)
        return {"inputs": inputs, "unconditional": self.weaker.inputs(part)[0] if self.weaker else unconditional}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        options = self.options
        worse = None if self.weaker is None else self._seen_through_windows(self.weaker.unet)
        interval = options.guidance_interval and tuple(options.guidance_interval)
        guidance = Guidance(options.guidance_scale, options.guidance_rescale, interval, worse)
        return {
            "scheduler": options.scheduler,
            "num_inference_steps": options.num_inference_steps,
            "guidance": guidance,
        }

    def _seen_through_windows(self, network: PixelNetwork) -> Denoiser:
        options = self.options
        side = window_size(options, self.trained)
        if side is None:
            return network
        return windowed(network, (side, side), overlap=window_overlap(options), batch_size=options.batch_size)


def _autoencoder(options: argparse.Namespace, trained: TrainedDenoiser) -> Autoencoder | None:
    """Of the latents that the network denoises, on the device; None: it denoises images."""
    if trained.latent_space is not None:
        return autoencoder_of(trained.latent_space, options.autoencoder).to(options.device)
    if options.autoencoder:
        raise ValueError("--autoencoder is for a denoiser of latents, and this one denoises images; leave it out")
    return None


def _given(options: argparse.Namespace, trained: TrainedDenoiser) -> dict[str, Tensor]:
    """What the conditions are called with for all images: the options' labels and captions, by turns."""
    takes = {condition.batch_key for condition in trained.all_conditions}
    for name in ("labels", "captions"):
        if getattr(options, name) and name not in takes:
            raise ValueError(f"--{name}: the checkpoint was trained without {name}; leave --{name} out")
    turns = torch.arange(options.num_images)
    given = {}
    if "labels" in takes:
        labels = torch.tensor(label_numbers(options.labels, trained))
        given["labels"] = labels[turns % len(labels)]
    if text := trained.condition(TextTokens):
        if not options.captions:
            raise ValueError('--captions must be given, as the model draws what they say: --captions "a red heart"')
        given["captions"] = text.token_ids(options.captions)[turns % len(options.captions)]
    return given


def label_numbers(labels: list[str] | None, trained: TrainedDenoiser) -> list[int]:
    """The number of each class that is named; of all classes, where none is.

    Args:
        labels: Names of classes. What is no name but a number is that of a class.
        trained: The denoiser.

    Raises:
        ValueError: If there is no such class.
    """
    num_classes, names, numbers = trained.num_classes, trained.class_names or [], []
    if labels is None:
        return list(range(num_classes))
    for label in labels:
        number = names.index(label) if label in names else int(label) if label.isdecimal() else -1
        if not 0 <= number < num_classes:
            known = f"names of classes ({', '.join(names)}), or " if names else ""
            raise ValueError(f"--labels must be {known}numbers from 0 to {num_classes - 1}; got {label!r}")
        numbers.append(number)
    return numbers


def _weaker(options: argparse.Namespace, trained: TrainedDenoiser) -> TrainedDenoiser | None:
    """The checkpoint to be led away from."""
    if options.autoguidance is None:
        return None
    weaker = load_denoiser(options.autoguidance)
    if weaker.image_shape != trained.image_shape or weaker.schedule.config != trained.schedule.config:
        raise ValueError(f"--autoguidance must have the same images and schedule; {options.autoguidance} has not")
    if _what_is_given(weaker) != _what_is_given(trained):
        raise ValueError(f"--autoguidance must have the same classes and words; {options.autoguidance} has not")
    return weaker


def _what_is_given(trained: TrainedDenoiser) -> list[Any]:
    """What decides which labels and token ids mean what."""
    text = trained.condition(TextTokens)
    words = None if text is None else (text.get_extra_state().tolist(), text.config["max_length"])
    return [trained.num_classes, trained.class_names, words]
