"""synthesize: labelled training data from a denoiser that draws images for masks."""

from pathlib import Path
from typing import Annotated, Any

from unet_diffusion.commands.arguments import (
    Folder,
    Model,
    Precision,
    Size,
    Speed,
    check_exists,
    check_scheduler,
    claimed,
)
from unet_diffusion.runtime.imports import quick_imports


def synthesize_pairs(
    denoiser: Annotated[Path | str, "DENOISER"],
    *,
    labels: Folder,
    num_labels: int,
    output: Folder,
    segmenter: Model | None = None,
    min_dice: float = 0.8,
    num_images: int = 64,
    copy_from: Folder | None = None,
    image_size: Size | None = None,
    guidance_scale: float = 1.0,
    scheduler: str = "DPMSolverMultistepScheduler",
    num_inference_steps: int = 25,
    thresholding: bool = False,
    seed: int = 0,
    allow: Annotated[list[str], "MODULE"] | None = None,
    autoencoder: Folder | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: Precision = "auto",
    speed: Speed | None = None,
) -> None:
    """Make labelled training data: masks from real ones, and an image drawn for each.

        unet-diffusion synthesize RUN --labels label --num_labels 320 --image_size 160 160 --output new

    A mask is a window of a real label image, turned by quarters, mirrored and a little enlarged or reduced, with
    objects of other images at free places. A pair is kept where the segmenter finds the mask in the image. The pairs
    are DIR/image/000000.png, DIR/label/000000.png and so on, where the label image has a number for each object, and
    DIR/pairs.png shows some. DIR/synthesize.json has the settings, the share that was kept, and the Dice of each pair.
    To train a segmenter on them, too:

        unet-diffusion fit --config nuclei_segment --data.synthetic.root new --data.synthetic.num_batches 2000

    Mask i depends on the label files, the size, the seed and i alone. The same command again continues where it was cut
    off, and with a larger --num_images it adds pairs.

    Args:
        denoiser: The .ckpt file, run folder or diffusers pipeline folder of a denoiser that draws from masks, such as a
            run of the recipe nuclei_from_masks; or owner/name, a model on the hub.
        labels: The label images to make masks of, with a number for each object: a folder or archive.
        num_labels: The number of label files to use at most, the first by name. Labels that segmenters are tested on
            must not be among them.
        output: The folder for the pairs.
        segmenter: The .ckpt file or run folder of a segmenter that was trained on real labels, or owner/name, a model
            on the hub. By default all pairs are kept.
        min_dice: Keep pairs whose Dice of the mask and what the segmenter finds is at least this, from 0 to 1.
        num_images: The number of pairs to make; those that are not kept count.
        copy_from: Copy the pixels of the images that the labels belong to, which move with the objects, and draw
            nothing. Bright and dark images are not mixed, nor are grey and coloured ones. This is the control that
            tells what drawing adds; of DENOISER only the size and channels count.
        image_size: The height and width of the pairs in pixels. The default is as in training.
        guidance_scale: How much closer images come to their mask; 1 turns guidance off. After a short training, 3 to 5
            lets more pairs be kept.
        scheduler: The name of a diffusers scheduler.
        num_inference_steps: The number of denoising steps.
        thresholding: Keep pixels in their range at every step also with DPMSolver, DEIS and UniPC, for fewer specks
            where guidance is strong. DDPM, DDIM and Heun always do; other schedulers cannot.
        seed: The seed of the masks and the noise.
        allow: The modules of your own, or of somebody you trust, that the checkpoints may name.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        batch_size: The number of images that are drawn at once.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the networks compute in; "auto" takes 16 bits where the hardware has them,
            else float32.
        speed: How the networks run. The default is as in training, but nothing is compiled as a whole.

    Raises:
        FileNotFoundError: If there is no such checkpoint, there are no such labels or images, or the hub cannot be
            reached.
        FileExistsError: If the output folder holds something else, or pairs of other settings.
        ValueError: If denoiser, segmenter and labels do not fit each other, a number is out of range, or no pair was
            kept.
    """
    places = {"DENOISER": denoiser, "--labels": labels, "--segmenter": segmenter, "--copy_from": copy_from}
    for name, path in places.items():
        if path is not None:
            check_exists(name, path)
    check_scheduler(scheduler)
    with quick_imports():
        from tqdm import tqdm

        from unet_diffusion.inference.loading import load_denoiser, load_segmenter
        from unet_diffusion.inference.sample_options import Sampling
        from unet_diffusion.inference.synthesis import (
            IMAGES,
            LABELS,
            RECORD,
            SHEET,
            copy_paste,
            is_stretched,
            synthesize,
        )
        from unet_diffusion.runtime.processes import ALONE

    drawing = load_denoiser(denoiser, allow=allow or (), autoencoder=autoencoder)
    judging = None if segmenter is None else load_segmenter(segmenter, allow=allow or ())
    for network in (drawing, judging):
        if network is not None:
            network.to(device, precision=precision, speed=speed)
    with claimed(output, ALONE), tqdm(unit="image step") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pairs: dict[str, Any] = {"num_labels": num_labels, "output": output, "num_images": num_images}
        pairs |= {"segmenter": judging, "min_dice": min_dice, "progress": show}
        if copy_from is None:
            sampling = Sampling(scheduler, num_inference_steps, guidance_scale, seed, batch_size, thresholding)
            made = synthesize(drawing, labels, image_size=image_size, sampling=sampling, **pairs)
        else:
            channels, *trained_size = drawing.image_shape
            size, stretch = image_size or trained_size, is_stretched(drawing)
            pairs |= {"image_size": size, "channels": channels, "stretch": stretch, "seed": seed}
            made = copy_paste(copy_from, labels, **pairs)
    print(f"kept {len(made.kept)} of {len(made.dice)} pairs ({made.share_kept:.0%}): {output / IMAGES} and "
          f"{output / LABELS}; {SHEET} shows some, and {RECORD} has the Dice of each")  # fmt: skip
