"""sample: images drawn from a trained denoiser, and the folder that they lie in."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unet_diffusion.commands.arguments import (
    Checkpoint,
    File,
    Folder,
    Model,
    Precision,
    Size,
    Speed,
    check_exists,
    check_scheduler,
    claimed,
)
from unet_diffusion.runtime.atomic_files import remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings, settings_of
from unet_diffusion.runtime.imports import quick_imports
from unet_diffusion.runtime.messages import UsageError

if TYPE_CHECKING:
    import torch

    from unet_diffusion.runtime.image_files import NumberedImages

NUM_DRAWN = "num_drawn"  # in the settings of a folder: the number of images there that sample has drawn
MAX_GRID_IMAGES = 100  # further images are written as files, but not into the grid
NOT_OF_AN_IMAGE = (  # arguments that an image does not depend on
    *("output", "overwrite", "resume", "num_images", "batch_size", "device", "speed", "autoencoder"),
    "allow",
)


def sample_images(
    checkpoint: Model,
    *,
    num_images: int = 64,
    labels: list[str] | None = None,
    captions: Annotated[list[str], "TEXT"] | None = None,
    condition: Annotated[list[str], "NAME=VALUE"] | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
    guidance_scale: float = 1.0,
    scheduler: str = "DPMSolverMultistepScheduler",
    num_inference_steps: int = 25,
    thresholding: bool = False,
    seed: int = 0,
    output: Folder = Path("generated"),
    overwrite: bool = False,
    resume: bool = False,
    image_size: Size | None = None,
    window: int | None = None,
    overlap: float | None = None,
    image: File | None = None,
    strength: float | None = None,
    mask: File | None = None,
    noise_level: int | None = None,
    interpolate: Annotated[tuple[int, int], "SEED_A SEED_B"] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Annotated[tuple[int, int], "LOW HIGH"] | None = None,
    autoguidance: Model | None = None,
    autoencoder: Folder | None = None,
    lora: Checkpoint | None = None,
    lora_scale: float = 1.0,
    textual_inversion: Checkpoint | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: Precision = "auto",
    speed: Speed | None = None,
) -> None:
    """Draw images from a checkpoint.

        unet-diffusion sample runs/digits --num_images 16 --labels 3 7 --output threes_and_sevens
        unet-diffusion sample runs/two_stages/denoiser --captions "red heart" --guidance_scale 3

    The images are DIR/000000.png and so on, or DIR/000000.tif, of the type and range of the training images, where PNG
    of 8 bits does not hold them. DIR/grid.png shows them side by side. Image i depends on the seed and i alone, not on
    the batch size, nor on the number of processes that share the work:

        torchrun --nproc_per_node 8 --no-python unet-diffusion sample ...

    Images begin as noise. With --image they begin as a picture, with --image and --mask only the masked part of a
    picture is painted, and with --interpolate they are a sequence from one image to another.

    Args:
        checkpoint: The .ckpt file, run folder or diffusers pipeline folder of a denoiser, a file of weights, or a name
            on the hub.
        num_images: The number of images to draw.
        labels: The numbers or names of the classes to draw, which take turns. By default all classes take turns.
        captions: The texts to draw, which take turns, for a model of captions.
        condition: The values of further conditions, each as NAME=VALUE: semantic_map=PATH or paired_image=PATH, with an
            image file or a folder of them, which take turns; boxes=FILE.json; or one of your own.
        allow: The modules of your own, or of somebody you trust, that the checkpoint may name.
        guidance_scale: How much closer images come to their label or caption; 1 turns guidance off.
        scheduler: The name of a diffusers scheduler.
        num_inference_steps: The number of denoising steps.
        thresholding: Keep pixels in their range at every step also with DPMSolver, DEIS and UniPC, for fewer specks
            where guidance is strong. DDPM, DDIM and Heun always do; other schedulers cannot.
        seed: The seed of the noise.
        output: The folder for the images.
        overwrite: Replace images that sample has drawn in DIR.
        resume: Keep images that are in DIR and draw only the missing ones.
        image_size: The height and width of the images in pixels. The default is as in training.
        window: Show the network overlapping windows of N x N pixels, which each step blends, for images larger than in
            training. The size of training is a good N. By default the network sees the whole image.
        overlap: The share of a window, in [0, 1), that it has in common with the next, with --window. More takes longer
            and hides better where windows end. The default is 0.5.
        image: The picture to start from instead of noise, which is scaled and cropped to the size to draw. For a model
            that enlarges, it is the picture to enlarge.
        strength: The share of the steps, in (0, 1], that are taken with --image. Less keeps more of the picture. The
            default is 0.8, and 1 with --mask.
        mask: The mask of --image, as large as the picture. White is painted, black stays as in the picture. A model for
            inpainting needs both.
        noise_level: The noise that is added to --image, 0 to 350, for a model that enlarges. More keeps less of the
            picture. The default is 20.
        interpolate: Draw num_images frames from the first image of one seed to the first image of another, in place of
            --seed.
        guidance_rescale: How much of the contrast that guidance adds is undone, 0 to 1.
        guidance_interval: The lowest and the highest timestep with guidance. By default all have it.
        autoguidance: The earlier checkpoint to guide away from (fit keeps them with --checkpoint.save_top_k -1).
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        lora: The LoRA to draw with: a .safetensors file as diffusers loads it, or a folder with one. A run that trained
            one needs no such option.
        lora_scale: How strongly --lora changes the model; 0 does not.
        textual_inversion: The new word for --captions: a .safetensors file as diffusers loads it, or a folder with one.
        batch_size: The number of images that are drawn at once.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the network computes in; "auto" takes 16 bits where the hardware has them,
            else float32.
        speed: How the network runs. The default is as in training, but channels_last for a network that was compiled
            as a whole, which takes minutes and pays with many images.

    Raises:
        UsageError: If overwrite and resume are both given.
        FileNotFoundError: If there is no such checkpoint or picture, or the hub cannot be reached.
        FileExistsError: If the output folder holds other files of the same names, or images of other settings.
        ValueError: If an option does not fit the checkpoint, or a number is out of range.
    """
    arguments = locals().copy()
    if overwrite and resume:
        raise UsageError("--overwrite replaces images and --resume keeps them; give one of the two")
    _check_files_and_scheduler(checkpoint, {"image": image, "mask": mask}, scheduler)
    values = _conditions(condition or [])
    with quick_imports():
        import torch

        from unet_diffusion.inference.loading import load_denoiser
        from unet_diffusion.inference.reading import contents_of
        from unet_diffusion.inference.sample_options import SampleOptions
        from unet_diffusion.models.speed import prepare_weights
        from unet_diffusion.runtime.image_files import NumberedImages

    denoiser = load_denoiser(checkpoint, allow=allow or (), autoencoder=autoencoder)
    if lora is not None:
        denoiser.load_lora_weights(lora, scale=lora_scale)
    if textual_inversion is not None:
        denoiser.load_textual_inversion(textual_inversion)
    files = NumberedImages(denoiser.values, denoiser.image_shape[0])
    worse = None if autoguidance is None else load_denoiser(autoguidance, allow=allow or ())
    networks = {"checkpoint": denoiser} if worse is None else {"checkpoint": denoiser, "autoguidance": worse}
    contents = {name: contents_of(network) for name, network in networks.items()}
    denoiser.to(device, precision=precision, speed=speed)
    prepare_weights(denoiser.unet, getattr(torch, denoiser.precision or "float32"))
    request = SampleOptions.among({**arguments, "conditions": values, "autoguidance": worse})
    drawing = denoiser.drawing(request)
    arguments["precision"] = denoiser.precision
    settings = _settings_of_images(arguments, drawing.classes, contents)
    settings["values"] = denoiser.values.plain()
    _draw_and_save(
        drawing.draw, drawing.num_steps, files, output, settings, num_images=num_images, batch_size=batch_size,
        overwrite=overwrite, resume=resume,
    )  # fmt: skip


def _conditions(words: list[str]) -> dict[str, str]:
    """The values of conditions by their names, from NAME=VALUE."""
    if wrong := [word for word in words if "=" not in word]:
        raise UsageError(f"--condition must be NAME=VALUE, got {wrong[0]!r}")
    values = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if len(values) < len(words):
        names = [word.partition("=")[0] for word in words]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--condition has one value for each name, got {names.count(repeated)} for {repeated}; "
                         "give one, which may be a folder of images or a file of several lists of boxes")  # fmt: skip
    return values


def _check_files_and_scheduler(checkpoint: Path | str, pictures: dict[str, Path | None], scheduler: str) -> None:
    for name, path in pictures.items():
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name} must be an image file, and there is none at {path}")
    check_exists("CHECKPOINT", checkpoint)
    check_scheduler(scheduler)


def _settings_of_images(
    arguments: dict[str, Any], classes: list[str] | None, contents: dict[str, str]
) -> dict[str, Any]:
    """Plain values that decide what image i is.

    Args:
        arguments: The arguments of `sample`.
        classes: The number and name of each class that is drawn.
        contents: Hashes of the networks, by the arguments that name them.
    """
    settings = {key: value for key, value in arguments.items() if key not in NOT_OF_AN_IMAGE}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    settings["num_images"] = arguments["num_images"] if arguments["interpolate"] else None  # frames depend on it
    settings["classes"] = classes
    for name in ("checkpoint", "autoguidance"):
        settings[f"{CONTENTS}{name}"] = contents.get(name)
    for name in ("image", "mask"):  # a path may lead to another picture later
        picture = arguments[name]
        settings[f"{CONTENTS}{name}"] = picture and hashlib.sha256(picture.read_bytes()).hexdigest()
    for name, value in _conditions(arguments["condition"] or []).items():
        settings[f"{CONTENTS}{name}"] = _hash_of_files(Path(value))
    return settings


def _hash_of_files(path: Path) -> str | None:
    """A hash of a file, or of the files in a folder and their names; None if there is neither."""
    if not path.exists():
        return None
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _draw_and_save(
    draw: Callable[[list[int], Callable[[int], object]], "torch.Tensor"],
    num_steps: int,
    files: "NumberedImages",
    output: Path,
    settings: dict[str, Any],
    *,
    num_images: int,
    batch_size: int,
    overwrite: bool,
    resume: bool,
) -> None:
    """Draw the images that the output folder lacks, batch by batch, shared by the processes, and make the grid."""
    from tqdm import tqdm

    from unet_diffusion.runtime.pictures import save_grid
    from unet_diffusion.runtime.processes import process_group

    with process_group() as group, claimed(output, group):
        missing = group.on_rank_zero(
            lambda: _prepare_output(output, settings, files, num_images, overwrite=overwrite, resume=resume)
        )
        todo = group.shard(missing)
        with tqdm(total=len(todo) * num_steps, unit="image step", disable=group.rank > 0) as bar:
            for indices in [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]:
                files.save(draw(indices, bar.update), output, indices=indices)
        group.barrier()
        if group.rank > 0:
            return
        first = [output / files.name(i) for i in range(min(num_images, MAX_GRID_IMAGES))]
        save_grid(files.values.seen(files.read(first)), output / "grid.png")
    print(f"{num_images} images and grid.png in {output}")


def _prepare_output(
    folder: Path, settings: dict[str, Any], files: "NumberedImages", num_images: int, *, overwrite: bool, resume: bool
) -> list[int]:
    """Make the output folder and return the numbers of the images to draw; nothing is overwritten unasked."""
    num_before = _num_drawn(folder)
    present = {path.name for kind in ("*.png", "*.tif") for path in folder.glob(kind)}
    stems = {Path(files.name(i)).stem for i in range(num_before or 0)}
    drawn = {name for name in present if Path(name).stem in stems}  # a model before may have written the other kind
    ours = drawn if num_before is None else {*drawn, "grid.png"}
    if others := sorted(present & {*(files.name(i) for i in range(num_images)), "grid.png"} - ours):
        raise FileExistsError(
            f"{folder} holds {others[0]}, which was not drawn there by sample; choose another --output"
        )
    if drawn and not (overwrite or resume):
        raise FileExistsError(
            f"{folder} holds {len(drawn)} images already; choose another --output, "
            "--resume to draw only the missing ones, or --overwrite"
        )

    def remove_images() -> None:
        for name in drawn:
            (folder / name).unlink()

    require_same_settings(
        folder,
        settings,
        "images",
        fix="choose another --output, or --overwrite",
        notes={NUM_DRAWN: num_images if overwrite else max(num_images, num_before or 0)},
        replace=None if resume else remove_images,
        among_others=True,
    )
    remove_left_behind(folder)
    kept = drawn if resume else set()
    return [i for i in range(num_images) if files.name(i) not in kept]


def _num_drawn(folder: Path) -> int | None:
    """The number of images that sample has drawn in a folder; None if it has not been at work there."""
    number = (settings_of(folder, "images") or {}).get(NUM_DRAWN)
    return number if isinstance(number, int) else None
