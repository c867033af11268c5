"""encode: images become latents, which a denoiser is trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_diffusion.commands.arguments import (
    BadFiles,
    File,
    Folder,
    Precision,
    Size,
    check_exists,
    claimed,
    say_left_out,
)
from unet_diffusion.data.described import USUAL, Table, check_used
from unet_diffusion.runtime.addresses import absolute_place
from unet_diffusion.runtime.imports import import_lightning, quick_imports

if TYPE_CHECKING:
    from unet_diffusion.data import ImageDataModule
    from unet_diffusion.models.autoencoders import AutoencoderNetwork


def encode(
    autoencoder: Path,
    images: Path,
    *,
    output: Folder,
    image_size: Size | None = None,
    class_labels: bool = False,
    captions: bool = False,
    semantic_map: Folder | None = None,
    paired_image: Folder | None = None,
    boxes: File | None = None,
    horizontal_flip: bool = False,
    background: str = "white",
    on_bad_file: BadFiles = "error",
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    table: Table = USUAL,
) -> None:
    """Write the latents of images, to train a denoiser on.

        unet-diffusion encode runs/autoencoder images --output latents

    Images are scaled and cropped to the autoencoder's size, and their numbers have the range of its training images. A
    denoiser trains on the latents with:

        unet-diffusion fit --config latents --data.root latents

    The same command again continues where it was cut off. Several processes of torchrun share the work.

    Args:
        autoencoder: The run folder, diffusers folder or file of weights of the autoencoder.
        images: The folder of images, archive.zip, or archive.zip/folder; or a data set, as in pack.
        output: The folder for the latents.
        image_size: The height and width of the images in pixels. The default is the autoencoder's size.
        class_labels: Use the folders directly below IMAGES as classes, or those of the data set.
        captions: Store the captions in metadata.csv, metadata.jsonl or NAME.txt, or those of the data set.
        semantic_map: Store the label images of this folder, of the same names and sizes as IMAGES.
        paired_image: Store the pictures of this folder, of the same names and sizes as IMAGES.
        boxes: Store the boxes in this JSON file of COCO's form.
        horizontal_flip: Encode the mirror image of each image, too.
        background: The colour behind transparent pixels.
        on_bad_file: What happens to files that cannot be decoded or are too small. "error" ends the command; "skip"
            leaves them out.
        batch_size: The number of images that are encoded at once.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the autoencoder computes in; "auto" takes 16 bits where the hardware has them,
            else float32.
        table: The split, columns or members of a data set that are used.

    Raises:
        FileNotFoundError: If there are no such images or no such autoencoder.
        FileExistsError: If the output folder holds something else, or latents with other settings.
        ValueError: If a number is out of range, or a file cannot be used.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    check_used(table, class_labels=class_labels, captions=captions)
    check_exists("AUTOENCODER", autoencoder)
    check_exists("IMAGES", images)
    asked = {"semantic_map": semantic_map, "paired_image": paired_image, "boxes": boxes}
    beside = {key: place for key, place in asked.items() if place is not None}
    for key, place in beside.items():
        check_exists(f"--{key}", place)
    with quick_imports():
        import_lightning()
        import torch
        from tqdm import tqdm

        from unet_diffusion.data import Folder as ImageFolder
        from unet_diffusion.data import ImageDataModule
        from unet_diffusion.diffusers_io.values_file import read_values
        from unet_diffusion.latents.store import encode_images
        from unet_diffusion.models.autoencoders import latent_moments, pretrained_autoencoder
        from unet_diffusion.models.speed import keep_freed_memory
        from unet_diffusion.runtime.pictures import in_unit_range
        from unet_diffusion.runtime.precision import autocast, chosen_precision
        from unet_diffusion.runtime.processes import own_device, process_group

    device = own_device(device)
    dtype = chosen_precision(precision, torch.device(device))
    network = pretrained_autoencoder(autoencoder).eval()
    channels = network.config["in_channels"]
    values = read_values(autoencoder, channels)
    source = ImageFolder(
        images,
        image_size=_image_size(network, image_size),
        channels=channels,
        value_range=values.value_range,
        shown_channels=values.shown,
        class_labels=class_labels,
        captions=captions,
        **beside,
        background=background,
        on_bad_file=on_bad_file,
        table=table,
    )
    data = ImageDataModule(source)
    data.setup()
    settings = {
        **_latents_settings(network, data),
        "autoencoder": str(autoencoder.resolve()),
        "has_mirrored": horizontal_flip,
        "images": absolute_place(images),
        **table.settings(),
        "background": background,
        "precision": dtype,
        **{key: None if place is None else str(place.resolve()) for key, place in asked.items()},
    }
    device_type = torch.device(device).type
    if device_type == "cpu":
        keep_freed_memory()
    network.to(device, memory_format=torch.channels_last)

    def images_of(numbers: range) -> torch.Tensor:
        return in_unit_range(data.image_set.images.index_select(0, torch.tensor(list(numbers))))

    @torch.inference_mode()
    def moments(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(device_type, getattr(torch, dtype)):
            return latent_moments(network, pixels.to(device))

    with process_group() as group, claimed(output, group):
        if group.rank == 0:
            say_left_out(data.source.left_out())
        share = settings["num_images"] // group.count
        with tqdm(total=share, unit="image", desc="encode", disable=group.rank > 0) as bar:
            encode_images(
                output, images_of, moments, settings=settings,
                contents=data.image_set.contents or (), entries=data.entries, crops=source.crops,
                batch_size=batch_size, progress=bar.update, say=bar.write, group=group,
            )  # fmt: skip
        if group.rank > 0:
            return
    print(f"latents of {settings['num_images']} images in {output}; to train on them: "
          f"{_next_command(output, settings, captions=captions)}")  # fmt: skip


def _next_command(output: Path, settings: Mapping[str, Any], *, captions: bool) -> str:
    """The command that trains a denoiser of these latents by the recipe."""
    words = ["unet-diffusion fit --config", "latents_text" if captions else "latents", "--data.root", output]
    if not settings["has_mirrored"]:
        words.append("--data.horizontal_flip false")
    if names := settings["class_names"]:
        words.append(f"--model.unet.num_class_embeds {len(names) + 1} --model.label_dropout 0.1")
    return " ".join(map(str, words))


def _image_size(autoencoder: "AutoencoderNetwork", image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The height and width of the images: those asked for, or the autoencoder's."""
    from unet_diffusion.models.autoencoders import downsampling

    size = image_size or autoencoder.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    factor = downsampling(autoencoder)
    if height % factor or width % factor:
        raise ValueError(f"--image_size must be multiples of {factor}, got {height} {width}")
    return height, width


def _latents_settings(autoencoder: "AutoencoderNetwork", data: "ImageDataModule") -> dict[str, Any]:
    """Those settings of `latents.encode_images` that follow from the autoencoder and the images."""
    from unet_diffusion.latents.space import fingerprint
    from unet_diffusion.models.autoencoders import num_codes

    return {
        "fingerprint": fingerprint(autoencoder, autoencoder.config),
        "image_shape": data.image_shape,
        "num_images": len(data.image_set.images),
        "has_codes": num_codes(autoencoder) > 0,
        "class_names": data.class_names,
        "names": data.image_set.names,
        "values": data.values.plain(),
    }
