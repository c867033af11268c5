"""The command line: `unet-diffusion fit | validate | pack | encode | two-stages | sample | segment | export | import`.

fit and validate are Lightning's own command line, so that every argument of the module, the data and the trainer is an
option; the others are small programs on a checkpoint. Every error is one message; `--traceback` shows its origin.

PyTorch takes seconds to import: a command does so once its arguments are known to be right.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_diffusion.commands.recipes import HEADINGS, all_recipes, recipe_path
from unet_diffusion.diffusion.schedulers import SCHEDULERS
from unet_diffusion.runtime.atomic_files import (
    CONTENTS,
    SETTINGS,
    atomic_write,
    read_json,
    remove_left_behind,
    require_same_settings,
)
from unet_diffusion.runtime.imports import import_lightning, quick_imports
from unet_diffusion.runtime.messages import (
    CommandParser,
    UsageError,
    did_you_mean,
    first_few,
    in_words,
    path_argument,
    printable,
    similar_paths,
)

if TYPE_CHECKING:
    import torch

    from unet_diffusion.data import FolderDataModule
    from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs
    from unet_diffusion.models.autoencoders import AutoencoderNetwork

TRAINING_COMMANDS = ("fit", "validate")  # parsed by Lightning's command line
NUM_DRAWN = "num_drawn"  # in the record of sample: how many images of its folder are its own
MAX_GRID_IMAGES = 100  # more are written as files, but not into the grid
SPEEDS = ("plain", "channels_last", "fused", "compiled", "graphed")  # those of `speed.py`, which imports PyTorch
PRECISIONS = ("float32", "bfloat16", "float16")  # those of `precision.py`, likewise
SHELLS = ("bash", "zsh")
FIT_OPTIONS = (  # that the tab key knows
    *("--trainer.max_steps", "--trainer.default_root_dir", "--trainer.devices", "--trainer.precision", "--data.root"),
    *("--data.init_args.root", "--data.init_args.batch_size", "--model.speed", "--ckpt_path", "--print_config"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 wrong usage.

    Interrupted, it ends with 130 (SIGINT) or 143 (SIGTERM); fit saves first, and the same command goes on from there.

    Args:
        arguments: without the program's name; None: those of this process.
    """
    if arguments is None:
        os.environ["PYTHONSAFEPATH"] = "1"  # processes that this one starts import nothing from the current folder
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot spell does not end a run
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]

    def run() -> None:
        if arguments and arguments[0] in TRAINING_COMMANDS:
            _train(arguments)
        else:
            options = _parse(arguments)
            options.traceback = show_traceback
            options.run(options)

    return exit_status(run, show_traceback=show_traceback)


def exit_status(run: Callable[[], None], *, show_traceback: bool) -> int:
    """Carry out a command; its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        run: The command.
        show_traceback: Raise errors, in place of printing what they say.
    """
    try:
        run()
    except UsageError as error:
        if show_traceback:
            raise
        print(printable(f"unet-diffusion: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unet-diffusion: stopped", file=sys.stderr)
        return 130  # as shells report it
    except Exception as error:  # the one place where errors end: whatever it was, it is said in one message
        if show_traceback:
            raise
        print(printable(f"unet-diffusion: error: {in_words(error)}"), file=sys.stderr)
        print("(--traceback shows where it came from)", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command.

    Raises:
        UsageError: if there is no such command or option, or a value does not fit.
    """
    parser = _parser()
    commands = _commands_of(parser)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        similar = did_you_mean(arguments[0], commands) or "; unet-diffusion --help lists them"
        raise UsageError(f"there is no command {arguments[0]!r}{similar}")
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
        raise UsageError(f"options follow the command, got {arguments[0]} before it; unet-diffusion --help lists both")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        similar = did_you_mean(unknown[0], commands[arguments[0]]._option_string_actions)
        raise UsageError(f"{arguments[0]} takes no {unknown[0]}{similar or f'; unet-diffusion {arguments[0]} --help'}")
    return options


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return commands


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="unet-diffusion",
        description="Train a U-Net to denoise or to segment, draw images or masks, hand it over to diffusers.",
        epilog="Every command has --help, and takes --traceback to show where an error came from.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("fit", help="train a denoiser, segmenter or autoencoder: fit --config digits")
    commands.add_parser("validate", help="validation loss: validate --config RECIPE --ckpt_path CHECKPOINT")
    _add_recipes(commands.add_parser("recipes", help="what fit can train: list, show and copy the recipes", **_STYLE))
    _add_pack(commands.add_parser("pack", help="shards of images, to train on more than a disk holds", **_STYLE))
    _add_encode(commands.add_parser("encode", help="latents of images, to train a denoiser on", **_STYLE))
    _add_two_stages(commands.add_parser("two-stages", help="latent diffusion: from images to samples", **_STYLE))
    _add_sample(commands.add_parser("sample", help="draw images from a checkpoint", **_STYLE))
    _add_segment(commands.add_parser("segment", help="masks for images, from a checkpoint", **_STYLE))
    _add_export(commands.add_parser("export", help="write a checkpoint as a diffusers pipeline folder", **_STYLE))
    _add_import(commands.add_parser("import", help="make a checkpoint from a diffusers pipeline folder", **_STYLE))
    _add_completion(commands.add_parser("completion", help="let the tab key complete commands and options", **_STYLE))
    return parser


_STYLE: dict[str, Any] = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
_CHECKPOINT_HELP = "a .ckpt file, a run folder, or a diffusers pipeline folder"
_AUTOENCODER_HELP = "for a denoiser of latents: where their autoencoder is, if not where it was in training"


def _add_hardware(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU, if there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help=f"What the {of} computes in; auto: 16 bits where the hardware has them, else float32.",
    )


def _check_exists(name: str, path: str | Path) -> None:
    """Refuses a path where there is nothing, before seconds are spent on imports; archives are looked into later.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    wanted = Path(path).expanduser()
    if not wanted.exists() and not any(parent.is_file() for parent in wanted.parents):
        raise FileNotFoundError(f"{name} must exist, got {path}, looked for {wanted.absolute()}{similar_paths(wanted)}")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from unet_diffusion import __version__

        print(f"unet-diffusion {__version__}")
        parser.exit()


# ------------------------------------------------------------------------------------------------------------ recipes


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What fit --config NAME can train: a line for each recipe, and the overlays that are added with another "
        "--config. A copy of a recipe is yours to change: fit --config FILE."
    )
    actions = parser.add_subparsers(metavar="ACTION")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME", help="such as digits")
    show.set_defaults(run=lambda options: print(recipe_path(options.name).read_text(encoding="utf-8"), end=""))
    copy = actions.add_parser("copy", help="write a recipe to a file")
    copy.add_argument("name", metavar="NAME", help="such as digits")
    copy.add_argument("file", metavar="FILE", type=path_argument, help="file to make")
    copy.set_defaults(run=_copy_recipe)
    parser.set_defaults(run=_list_recipes)


def _list_recipes(options: argparse.Namespace) -> None:
    recipes = all_recipes()
    width = max(len(one.name) for one in recipes)
    for recipe in recipes:
        if summary := recipe.summary:
            what, needs, takes = (summary[heading].rstrip(".") for heading in HEADINGS)
            print(f"{recipe.name:{width}}  {what}; needs {needs}; {takes}")
    print(f"overlays, with another --config: {', '.join(one.name for one in recipes if not one.summary)}")


def _copy_recipe(options: argparse.Namespace) -> None:
    text = recipe_path(options.name).read_text(encoding="utf-8")
    try:
        with open(options.file, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileExistsError(f"{options.file} exists and is not overwritten; choose another file") from error
    print(f"to train with it: unet-diffusion fit --config {options.file}")


# ------------------------------------------------------------------------------------------------------ fit, validate


def _train(arguments: list[str]) -> None:
    from unet_diffusion.commands.fit_arguments import check_arguments

    checked = check_arguments(arguments)
    with quick_imports():  # the training stack takes seconds to import; the other commands do without it
        import_lightning()
        from unet_diffusion.commands.training_cli import TrainingCLI

    TrainingCLI.run(checked)


# --------------------------------------------------------------------------------------------------------------- pack


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the images of a folder to DIR as shards, tar archives of many images each, for fit --config "
        "stream --data.init_args.root DIR, or the address that DIR is copied to. Files are kept as they "
        "are, in an order drawn at random, unless they are to be scaled. The same command again goes on where it was "
        "cut off."
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=path_argument, help="a folder, archive.zip, or archive.zip/folder"
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="folder for the shards")
    parser.add_argument("--shard_images", type=int, default=1024,
                        help="images a shard; in training, a process holds 16 of them in memory, as files, and one "
                        "more for each worker (2 * window * num_lanes + num_workers)")  # fmt: skip
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"),
                        help="scale and cut images to this size, as fit would, and keep them as PNG, which takes less "
                        "time in training; default: as they are")  # fmt: skip
    parser.add_argument("--channels", type=int, choices=(1, 3, 4), default=3, help="with --image_size")
    parser.add_argument("--background", default="white", help="with --image_size: behind transparent pixels")
    parser.add_argument("--class_labels", action="store_true", help="folders below IMAGES are classes")
    parser.add_argument("--captions", action="store_true", help="keep captions: metadata.csv, .jsonl or NAME.txt")
    parser.add_argument("--on_bad_file", choices=("error", "skip"), default="error",
                        help="what to do about files that cannot be decoded or are too small; an error lists all of "
                        "them, once the others are packed")  # fmt: skip
    parser.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> None:
    _check_exists("IMAGES", options.images)
    from tqdm import tqdm

    from unet_diffusion.data import ImageFormat, find_images, pack_images
    from unet_diffusion.data.captions import TEXT_EXTENSIONS
    from unet_diffusion.data.checking import bad_files_message
    from unet_diffusion.data.shards import INDEX

    image_format = None
    if options.image_size is not None:
        height, width = options.image_size
        image_format = ImageFormat(height, width, options.channels, options.background)
    files, is_new = find_images(options.images), not options.folder.exists()
    _say_left_out(files.left_out.described(but=TEXT_EXTENSIONS if options.captions else ()))
    with tqdm(total=len(files.names), unit="image", desc="pack") as bar:
        bad_files = pack_images(
            files, options.folder, root=options.images, shard_images=options.shard_images, image_format=image_format,
            class_labels=options.class_labels, captions=options.captions,
            skip_bad_files=options.on_bad_file == "skip", progress=bar.update, say=bar.write,
        )  # fmt: skip
    if is_new and len(bad_files) == len(files.names):
        shutil.rmtree(options.folder)  # it would hold nothing but their names
    if bad_files:
        message = bad_files_message(bad_files, len(files.names))
        if options.on_bad_file == "error":
            is_whole = (options.folder / INDEX).exists()
            state = "the index of an earlier call still holds" if is_whole else f"there is no {INDEX} until all are"
            raise ValueError(f"{message}\nThe others are packed; {state}. Mend these and run the same command again, "
                             "or run it with --on_bad_file skip to leave them out.")  # fmt: skip
        print(f"{message}\nThe others are used.", file=sys.stderr)
    print(f"{len(files.names) - len(bad_files)} images in {options.folder}; to train on them: unet-diffusion fit "
          f"--config stream --data.init_args.root {options.folder}")  # fmt: skip


def _say_left_out(line: str) -> None:
    """Says which files are not used, if there are any."""
    if line not in ("", "nothing"):
        print(printable(f"left out: {line}"), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- encode


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the latents of images to DIR, for fit --config latents --data.init_args.root DIR. Images "
        "are scaled and cut to the autoencoder's size. The same command again goes on where it was cut off. "
        "ProcessGroup of torchrun share the work, as of sample."
    )
    parser.add_argument(
        "autoencoder", metavar="AUTOENCODER", type=path_argument, help="a run folder, or a diffusers folder"
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=path_argument, help="a folder, archive.zip, or archive.zip/folder"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder for the latents")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="default: the autoencoder's")
    parser.add_argument("--class_labels", action="store_true", help="folders below IMAGES are classes")
    parser.add_argument("--captions", action="store_true", help="keep captions: metadata.csv, .jsonl or NAME.txt")
    parser.add_argument("--horizontal_flip", action="store_true", help="encode mirror images too")
    parser.add_argument("--background", default="white", help="colour behind transparent pixels")
    parser.add_argument("--on_bad_file", choices=("error", "skip"), default="error",
                        help="what to do about files that cannot be decoded or are too small")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at once")
    _add_hardware(parser, of="autoencoder")
    parser.set_defaults(run=_encode)


def _encode(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
    _check_exists("AUTOENCODER", options.autoencoder)
    _check_exists("IMAGES", options.images)
    with quick_imports():
        import_lightning()
        import torch
        from tqdm import tqdm

        from unet_diffusion.data import scale_to_unit_range
        from unet_diffusion.latents.store import encode_images
        from unet_diffusion.models.autoencoders import latent_moments, pretrained_autoencoder
        from unet_diffusion.models.speed import keep_freed_memory
        from unet_diffusion.runtime.precision import autocast, chosen_precision
        from unet_diffusion.runtime.processes import own_device, process_group

    options.device = own_device(options.device)
    options.precision = chosen_precision(options.precision, torch.device(options.device))
    autoencoder = pretrained_autoencoder(options.autoencoder).eval()
    data = _images_to_encode(options, autoencoder)
    settings = _latents_settings(options, autoencoder, data)
    device_type = torch.device(options.device).type
    if device_type == "cpu":
        keep_freed_memory()
    autoencoder.to(options.device, memory_format=torch.channels_last)

    def images(numbers: range) -> torch.Tensor:
        return scale_to_unit_range(data.image_set.images.index_select(0, torch.tensor(list(numbers))))

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(device_type, getattr(torch, options.precision)):
            return latent_moments(autoencoder, pixels.to(options.device))

    with process_group() as group:
        if group.rank == 0:
            _say_left_out(data.left_out())
        share = settings["num_images"] // group.count
        with tqdm(total=share, unit="image", desc="encode", disable=group.rank > 0) as bar:
            encode_images(
                options.output, images, encode, settings=settings,
                contents=data.image_set.contents or (), labels=data.image_set.labels,
                batch_size=options.batch_size, progress=bar.update, say=bar.write, group=group,
            )  # fmt: skip
        if group.rank > 0:
            return
    recipe = "latents_text" if options.captions else "latents"
    print(f"latents of {settings['num_images']} images in {options.output}; to train on them: unet-diffusion fit "
          f"--config {recipe} --data.init_args.root {options.output}")  # fmt: skip


def _images_to_encode(options: argparse.Namespace, autoencoder: "AutoencoderNetwork") -> "FolderDataModule":
    """The images at the size asked for, or the autoencoder's."""
    from unet_diffusion.data import FolderDataModule
    from unet_diffusion.models.autoencoders import downsampling

    size = options.image_size or autoencoder.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height % downsampling(autoencoder) or width % downsampling(autoencoder):
        raise ValueError(f"--image_size must be multiples of {downsampling(autoencoder)}, got {height} {width}")
    data = FolderDataModule(
        options.images,
        image_size=(height, width),
        channels=autoencoder.config["in_channels"],
        class_labels=options.class_labels,
        captions=options.captions,
        background=options.background,
        on_bad_file=options.on_bad_file,
    )
    data.setup()
    return data


def _latents_settings(
    options: argparse.Namespace, autoencoder: "AutoencoderNetwork", data: "FolderDataModule"
) -> dict[str, Any]:
    """What decides what the latents are, see `latents.encode_images`."""
    from diffusers import VQModel

    from unet_diffusion.latents.space import fingerprint

    return {
        "autoencoder": str(options.autoencoder.resolve()),
        "fingerprint": fingerprint(autoencoder, autoencoder.config),
        "image_shape": data.image_shape,
        "num_images": len(data.image_set.images),
        "has_mirrored": options.horizontal_flip,
        "has_codes": isinstance(autoencoder, VQModel),
        "class_names": data.class_names,
        "captions": data.captions,
        "names": data.image_set.names,
        "images": str(options.images.resolve()),
        "background": options.background,
        "precision": options.precision,
    }


# --------------------------------------------------------------------------------------------------------- two-stages


def _add_two_stages(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Latent diffusion in one command: train an autoencoder, encode the images, train a denoiser of the latents. "
        "DIR/denoiser then holds samples.png and the pipeline. The same command again goes on where it was cut off."
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=path_argument, help="a folder, archive.zip, or archive.zip/folder"
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="DIR", help="folder for runs and latents"
    )
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--captions", action="store_true", help="text to image: metadata.csv, .jsonl or NAME.txt")
    known.add_argument("--class_labels", action="store_true", help="folders below IMAGES are classes")
    parser.add_argument("--autoencoder", metavar="RECIPE", default="autoencoder_kl", help="recipe of the first stage")
    parser.add_argument("--denoiser", metavar="RECIPE",
                        help="recipe of the second; default: latents or latents_text")  # fmt: skip
    parser.add_argument("--allow", metavar="MODULE", action="append", default=[],
                        help="a module of your own, or of somebody you trust, that the recipes may name")  # fmt: skip
    parser.set_defaults(run=_two_stages)


def _two_stages(options: argparse.Namespace) -> None:
    autoencoder = recipe_path(options.autoencoder)
    default = "latents_text" if options.captions else "latents"
    denoiser = recipe_path(default if options.denoiser is None else options.denoiser)
    _check_exists("IMAGES", options.images)
    from unet_diffusion.commands.two_stages import TwoStages

    stages = TwoStages(options.images, options.output, autoencoder, denoiser, options.class_labels, options.captions)
    allowed = [f"--allow={module}" for module in options.allow]
    stages.run(lambda line: print(line, flush=True), ["--traceback"] if options.traceback else [], allowed)
    captions = " --captions TEXT" if options.captions else ""
    print(f"{options.output / 'denoiser'} holds samples.png; to draw more: unet-diffusion sample "
          f"{options.output / 'denoiser'}{captions} --output DIR")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- sample


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw images: DIR/000000.png, ... and DIR/grid.png. "
        "Image i depends on the seed and i alone, not on the batch size, nor on how many processes share the work "
        "(torchrun --nproc_per_node 8 --no-python unet-diffusion sample ...). From noise; with --image from a picture, "
        "with --image and --mask into the masked part of one; with --interpolate a sequence from one image to another."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT_HELP)
    parser.add_argument("--num_images", type=int, default=64, help="images to draw")
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler", help="name of a diffusers scheduler")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps")
    parser.add_argument(
        "--labels", nargs="+", help="class numbers or names, used in turn; default: all classes in turn"
    )
    parser.add_argument("--captions", nargs="+", metavar="TEXT", help="what to draw, used in turn; of a model of text")
    parser.add_argument("--condition", metavar="NAME=VALUE", type=_name_and_value, action="append",
                        help="a value for a condition of your own; may be given several times")  # fmt: skip
    parser.add_argument("--allow", metavar="MODULE", action="append", default=[],
                        help="a module of your own, or of one you trust, that the checkpoint may name")  # fmt: skip
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1: off; larger: closer to label or caption")
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="0 to 1: how much of the contrast that guidance adds is undone",
    )
    parser.add_argument(
        "--guidance_interval",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="timesteps that are guided; default: all",
    )
    parser.add_argument(
        "--autoguidance",
        metavar="CHECKPOINT",
        help="guide away from this earlier checkpoint (fit keeps them with --checkpoint.save_top_k -1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    _add_size_and_start(parser)
    parser.add_argument("--autoencoder", metavar="DIR", help=_AUTOENCODER_HELP)
    parser.add_argument(
        "--output", type=path_argument, default=Path("generated"), metavar="DIR", help="folder for the images"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace images that are in DIR")
    existing.add_argument("--resume", action="store_true", help="keep images that are in DIR and draw the missing ones")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at once")
    _add_hardware(parser, of="network")
    parser.add_argument(
        "--speed",
        choices=SPEEDS,
        help="how the network runs; default: as in training, but channels_last for one that was compiled as a whole, "
        "which takes minutes and pays with many images",
    )
    parser.set_defaults(run=_sample)


def _add_size_and_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels of the images; default: as in training"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="for images larger than in training: the network sees overlapping windows of NxN pixels, and each step "
        "blends them; the size of training is a good N; default: all at once",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        help="with --window: share of a window, in [0, 1), that it has in common with the next, at least; more takes "
        "longer and hides better where windows end; default: 0.5",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="start from this picture, scaled and cut to the size to draw, not from noise; of a "
        "model that enlarges, what to enlarge",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="with --image: share of the steps that are taken, in (0, 1]; the less, the more of the picture is left; "
        "default: 0.8, with --mask 1",
    )
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help="with --image: as large; white is painted anew, black stays as in the picture; of a model for inpainting "
        "both must be given",
    )
    parser.add_argument(
        "--noise_level",
        type=int,
        help="with --image, of a model that enlarges: 0 to 350, the more, the less of the picture is kept; default: 20",
    )
    parser.add_argument(
        "--interpolate",
        type=int,
        nargs=2,
        metavar=("SEED_A", "SEED_B"),
        help="in place of --seed: num_images frames from the first image of one seed to the first of the other",
    )


def _sample(options: argparse.Namespace) -> None:
    for name, path in {"image": options.image, "mask": options.mask}.items():
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} must be an image file, and there is none at {path}")
    _check_exists("CHECKPOINT", options.checkpoint)
    if options.scheduler not in SCHEDULERS:
        similar = did_you_mean(options.scheduler, SCHEDULERS)
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {options.scheduler!r}{similar}")
    with quick_imports():
        import torch

        from unet_diffusion.inference.loading import load_denoiser
        from unet_diffusion.inference.record import contents_of
        from unet_diffusion.inference.sample_options import SampleOptions
        from unet_diffusion.models.speed import prepare_weights

    denoiser = load_denoiser(options.checkpoint, allow=options.allow, autoencoder=options.autoencoder)
    worse = options.autoguidance and load_denoiser(options.autoguidance, allow=options.allow)
    names = {"checkpoint": denoiser, **({"autoguidance": worse} if worse else {})}
    contents = {name: contents_of(one) for name, one in names.items()}
    denoiser.to(options.device, precision=options.precision, speed=options.speed)
    prepare_weights(denoiser.unet, getattr(torch, denoiser.precision or "float32"))
    request = SampleOptions(
        num_images=options.num_images,
        labels=options.labels,
        captions=options.captions,
        conditions=dict(options.condition or []),
        image=options.image,
        mask=options.mask,
        strength=options.strength,
        noise_level=options.noise_level,
        scheduler=options.scheduler,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval and tuple(options.guidance_interval),
        autoguidance=worse,
        image_size=options.image_size and tuple(options.image_size),
        window=options.window,
        overlap=options.overlap,
        interpolate=options.interpolate and tuple(options.interpolate),
        seed=options.seed,
        batch_size=options.batch_size,
    )
    drawing = denoiser.drawing(request)
    options.classes, options.contents, options.precision = drawing.classes, contents, denoiser.precision
    _draw_and_save(options, drawing.draw, drawing.num_steps)


def _name_and_value(text: str) -> tuple[str, str]:
    """What `--condition NAME=VALUE` says.

    Raises:
        ArgumentTypeError: If there is no =.
    """
    name, is_there, value = text.partition("=")
    if not is_there:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _draw_and_save(
    options: argparse.Namespace, draw: Callable[[list[int], Callable[[int], object]], "torch.Tensor"], num_steps: int
) -> None:
    """Draw what the output folder lacks, batch by batch, shared out over the processes, and make the grid."""
    from tqdm import tqdm

    from unet_diffusion.runtime.pictures import read_images, save_grid, save_images
    from unet_diffusion.runtime.processes import process_group

    with process_group() as group:
        todo = group.shard(group.on_rank_zero(lambda: _prepare_output(options)))
        with tqdm(total=len(todo) * num_steps, unit="image step", disable=group.rank > 0) as bar:
            for indices in [todo[i : i + options.batch_size] for i in range(0, len(todo), options.batch_size)]:
                save_images(draw(indices, bar.update), options.output, indices=indices)
        group.barrier()
        if group.rank > 0:
            return
    first = [options.output / f"{i:06d}.png" for i in range(min(options.num_images, MAX_GRID_IMAGES))]
    save_grid(read_images(first), options.output / "grid.png")
    print(f"{options.num_images} images and grid.png in {options.output}")


def _prepare_output(options: argparse.Namespace) -> list[int]:
    """Make the output folder and return the numbers of the images to draw; nothing is overwritten unasked."""
    folder: Path = options.output
    unasked = {"run", "output", "overwrite", "resume", "num_images", "batch_size", "device", "speed", "autoencoder"}
    unasked |= {"traceback", "allow"}
    if options.interpolate is not None:  # a frame depends on how many there are
        unasked -= {"num_images"}
    settings = {key: value for key, value in vars(options).items() if key not in unasked}
    settings |= {f"{CONTENTS}{name}": contents for name, contents in settings.pop("contents").items()}
    for name in ("image", "mask"):  # a path may lead to another picture later
        if settings[name] is not None:
            settings[f"{CONTENTS}{name}"] = hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()
    record = folder / SETTINGS
    before = _drawn_before(record)
    drawn = {f"{i:06d}.png" for i in range(before.get(NUM_DRAWN, 0))}
    wanted = [f"{i:06d}.png" for i in range(options.num_images)]
    present = {path.name for path in folder.glob("*.png")} if folder.exists() else set()
    if others := sorted(present & {*wanted, "grid.png"} - (drawn | {"grid.png"} if before else set())):
        raise FileExistsError(
            f"{folder} holds {others[0]}, which was not drawn there by sample; choose another --output"
        )
    if present & drawn and not (options.overwrite or options.resume):
        raise FileExistsError(
            f"{folder} holds {len(present & drawn)} images already; choose another --output, "
            "--resume to draw only the missing ones, or --overwrite"
        )
    if options.resume and before:
        differ = ", ".join(key for key in settings if before.get(key) != json.loads(json.dumps(settings[key])))
        if differ:
            raise ValueError(
                f"the images in {folder} were drawn with other settings ({differ}); --resume needs the same"
            )
    if options.overwrite:  # first: if this run is cut off, none of the old ones stands under the new settings
        for name in present & drawn:
            (folder / name).unlink()
        present -= drawn
    remove_left_behind(folder)
    num_drawn = options.num_images if options.overwrite else max(options.num_images, before.get(NUM_DRAWN, 0))
    with atomic_write(record) as partial:
        partial.write_text(json.dumps({**settings, NUM_DRAWN: num_drawn}, indent=1))
    return [i for i, name in enumerate(wanted) if name not in present]


def _drawn_before(record: Path) -> dict[str, Any]:
    """The settings that images of a folder were drawn with; {} if there are none.

    Raises:
        FileExistsError: If the file there is of something else.
    """
    if not record.exists():
        return {}
    try:
        before = read_json(record)
    except ValueError:
        before = None
    if not isinstance(before, dict) or not isinstance(before.get(NUM_DRAWN), int):
        raise FileExistsError(f"{record} was not written by sample and is not replaced; choose another --output")
    return before


# ------------------------------------------------------------------------------------------------------------ segment


def _add_segment(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a mask for each image: DIR/NAME, 255 for foreground, or class indices. Images may have any size; the "
        "pages of a TIFF file become pages of its mask. The same command again goes on where it was cut off, and makes "
        "the masks of images again that have changed. "
        "ProcessGroup of torchrun share the work, as of sample."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file or a run folder, of a segmenter")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", type=path_argument, help="image files, folders or zip archives"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder for the masks")
    parser.add_argument("--instances", action="store_true", help="also DIR/instances/NAME: a number for each object")
    parser.add_argument("--overlays", action="store_true", help="also DIR/overlays/NAME.png: outlines on the image")
    parser.add_argument(
        "--probabilities", action="store_true", help="also DIR/probabilities/NAME.npy: float16 (classes, height, width)"
    )
    parser.add_argument("--views", action="store_true", help="average over rotations and flips; 8 times the work")
    parser.add_argument("--overwrite", action="store_true", help="replace the masks that an earlier run left in DIR")
    parser.add_argument("--window_size", type=int, help="pixels given to the network at once; default: as in training")
    parser.add_argument("--allow", metavar="MODULE", action="append", default=[],
                        help="a module of your own, or of one you trust, that the checkpoint may name")  # fmt: skip
    _add_hardware(parser, of="network")
    parser.add_argument(
        "--speed",
        choices=SPEEDS,
        help="how the network runs; default: as in training, but nothing is compiled as a whole",
    )
    parser.set_defaults(run=_segment)


def _segment(options: argparse.Namespace) -> None:
    _check_exists("CHECKPOINT", options.checkpoint)
    for images in options.images:
        _check_exists("IMAGES", images)
    with quick_imports():
        import torch
        from tqdm import tqdm

        from unet_diffusion.inference.record import contents_of, read_segmenter
        from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs, segment_images
        from unet_diffusion.models.speed import prepare_weights
        from unet_diffusion.runtime.processes import process_group

    trained = read_segmenter(options.checkpoint, allow=options.allow)
    contents = contents_of(trained)
    if options.window_size is not None:
        if options.window_size < 1:
            raise ValueError(f"--window_size must be at least 1, got {options.window_size}")
        trained.window_size = options.window_size
    if options.instances and trained.kind == "classes":
        raise ValueError("--instances needs a model of objects, and this one was trained on classes; leave it out")
    images = ImagesToSegment(options.images)
    trained.to(options.device, precision=options.precision, speed=options.speed)
    options.precision = trained.precision
    prepare_weights(trained.unet, getattr(torch, trained.precision or "float32"))
    outputs = Outputs(options.output, options.probabilities, options.overlays, options.instances)

    @torch.inference_mode()
    def predict(image: torch.Tensor) -> torch.Tensor:
        return trained.probabilities(image, views=options.views)

    is_new = not options.output.exists()
    with process_group() as group:
        group.on_rank_zero(lambda: _prepare_masks(options, images, outputs, contents))
        if group.rank == 0:
            _say_left_out(images.left_out)
        share = len(group.shard(list(images.sources)))
        with tqdm(total=share, unit="image", disable=group.rank > 0) as bar:
            failed = segment_images(trained, images, outputs, predict=predict, progress=bar.update, group=group)
        if group.rank > 0:
            return
    if is_new and len(failed) == len(images):
        shutil.rmtree(options.output)
    print(f"{len(images) - len(failed)} masks in {options.output}")
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} of {len(images)} images could not be segmented:", *failed]))


def _prepare_masks(options: argparse.Namespace, images: "ImagesToSegment", outputs: "Outputs", contents: str) -> None:
    """Make the output folder; what lies there must be of the same command, which is then gone on with.

    Masks of images that have changed are removed, and so are, to overwrite them, those of all these images.
    """
    folder: Path = options.output
    unasked = {"run", "images", "output", "overwrite", "device", "speed", "traceback", "allow"}
    settings = {key: str(value) for key, value in vars(options).items() if key not in unasked}
    settings[f"{CONTENTS}checkpoint"] = contents
    record = folder / SETTINGS
    if options.overwrite and record.is_file() and read_json(record).keys() == settings.keys():
        outputs.made_of.doubt()  # masks of other images stay, and are not counted as done with these settings
        for mask in images.sources:
            outputs.remove(mask)
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(settings, indent=1))
    require_same_settings(folder, settings, "masks of this command", "choose another --output, or --overwrite")
    remove_left_behind(folder)
    changed = images.changed(outputs)
    for mask in changed:
        outputs.remove(mask)
    if changed:
        print(f"{len(changed)} masks are made again, because their images have changed or they were not finished: "
              f"{first_few(changed)}", flush=True)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- export, import


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a diffusers pipeline, or an autoencoder, that loads without this package, load it again and compare it "
        "before saying done. Where no pipeline of diffusers draws the same, the folder holds one of its own."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT_HELP)
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--autoencoder", metavar="DIR", help=_AUTOENCODER_HELP)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    _check_exists("CHECKPOINT", options.checkpoint)
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.loading import load

    model = load(options.checkpoint, autoencoder=options.autoencoder)
    model.export(options.folder, overwrite=options.overwrite)
    what = "autoencoder" if isinstance(model, Autoencoder) else "pipeline"
    print(f"{options.folder} holds the {what}; loaded again with diffusers, it gives the same output")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a checkpoint of a diffusers pipeline, exported or such as Stable Diffusion 1, and a configuration for "
        "fit --config RECIPE --config CHECKPOINT.yaml --ckpt_path CHECKPOINT."
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="diffusers pipeline folder")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path_argument, help=".ckpt file to make")
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> None:
    _check_exists("DIR", options.folder)
    import yaml

    from unet_diffusion.diffusers_io.importing import DROPOUT, import_pipeline
    from unet_diffusion.inference.record import denoiser_record, save_denoiser

    recipe = options.checkpoint.with_suffix(".yaml")
    if recipe == options.checkpoint:
        raise UsageError(f"CHECKPOINT must not end in .yaml, as the configuration beside it does, got {recipe}; "
                         "name it .ckpt")  # fmt: skip
    if recipe.exists():
        raise FileExistsError(f"{recipe} exists and is not overwritten; choose another path, or remove it")
    trained = import_pipeline(options.folder)
    save_denoiser(trained, options.checkpoint)
    record = denoiser_record(trained)
    schedule = {"class_path": "unet_diffusion.diffusion.schedule.NoiseSchedule", "init_args": trained.schedule.config}
    settings: dict[str, Any] = {"model": {"unet": record["unet"], "schedule": schedule}}
    if trained.conditions:
        settings["model"]["conditions"] = record["conditions"]
    if trained.null_label is not None:
        settings["model"]["label_dropout"] = DROPOUT
    if (space := trained.codec.space) is not None and space.scaling_factor is not None:
        settings["data"] = {"init_args": {"scaling_factor": space.scaling_factor}}
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    print(f"{options.checkpoint} continues with: unet-diffusion fit --config RECIPE --config {recipe} "
          f"--ckpt_path {options.checkpoint}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------- completion


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Print what a shell needs to complete commands, options and recipes: eval "$(unet-diffusion completion bash)" '
        "in ~/.bashrc; zsh: unet-diffusion completion zsh > a folder of $fpath/_unet-diffusion."
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=_print_completion)


def _print_completion(options: argparse.Namespace) -> None:
    import shtab

    parser = _parser()
    for command in TRAINING_COMMANDS:  # Lightning's own parser knows all their options, and takes seconds to make
        for option in FIT_OPTIONS:
            _commands_of(parser)[command].add_argument(option)
        _commands_of(parser)[command].add_argument("--config", choices=[one.name for one in all_recipes()])
    print(shtab.complete(parser, options.shell))


if __name__ == "__main__":
    sys.exit(main())
