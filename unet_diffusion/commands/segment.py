"""segment: masks for images, from a trained segmenter."""

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unet_diffusion.commands.arguments import (
    Folder,
    Model,
    Precision,
    Speed,
    check_exists,
    claimed,
    say_left_out,
)
from unet_diffusion.data.described import USUAL, Table, check_only_images
from unet_diffusion.runtime.atomic_files import remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings
from unet_diffusion.runtime.imports import quick_imports
from unet_diffusion.runtime.messages import first_few

if TYPE_CHECKING:
    from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs


def segment(
    checkpoint: Model,
    images: list[Path],
    *,
    output: Folder,
    instances: bool = False,
    overlays: bool = False,
    probabilities: bool = False,
    views: bool = False,
    diameter: float | None = None,
    threshold: float | None = None,
    min_size: int | None = None,
    overwrite: bool = False,
    window_size: int | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    speed: Speed | None = None,
    table: Table = USUAL,
) -> None:
    """Write a mask for each image.

        unet-diffusion segment runs/cells images --output masks

    The mask of NAME is DIR/NAME: 255 for foreground, or the class of each pixel. Images may have any size. The pages of
    a TIFF file become pages of its mask. The same command again continues where it was cut off, and makes the masks of
    changed images again. Several processes of torchrun share the work.

    Args:
        checkpoint: The .ckpt file, run folder or exported folder of a segmenter, a file of weights, or a name on the
            hub.
        images: The image files, folders, zip archives or data sets to segment.
        output: The folder for the masks.
        instances: Also write DIR/instances/NAME, with a number for each object, and DIR/objects.csv, a table of all
            objects: area, centre, bounding box and mean intensity.
        overlays: Also write DIR/overlays/NAME.png, with outlines on the image.
        probabilities: Also write DIR/probabilities/NAME.npy, float16 (classes, height, width).
        views: Average over rotations and flips, which takes 8 times the work.
        diameter: The typical diameter of the objects in pixels, for a segmenter that was trained on objects of one
            size. By default each image is segmented once or twice to see it, and then at the right scale.
        threshold: The foreground is where its probability is larger. The default was fitted in training.
        min_size: Least number of pixels in an object, with --instances or --overlays; smaller objects are left out. The
            default was fitted in training.
        overwrite: Replace the masks that an earlier run left in DIR.
        window_size: The number of pixels along a side that the network sees at once. The default is as in training.
        allow: The modules of your own, or of somebody you trust, that the checkpoint may name.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the network computes in; "auto" takes 16 bits where the hardware has them,
            else float32.
        speed: How the network runs. The default is as in training, but nothing is compiled as a whole.
        table: The split and the column, or the members, of a data set that are used.

    Raises:
        FileNotFoundError: If there is no such checkpoint or image, or the hub cannot be reached.
        FileExistsError: If the output folder holds something else, or masks with other settings.
        ValueError: If an option does not fit the checkpoint, or some images cannot be segmented.
    """
    check_only_images(table)
    check_exists("CHECKPOINT", checkpoint)
    for path in images:
        check_exists("IMAGES", path)
    if window_size is not None and window_size < 1:
        raise ValueError(f"--window_size must be at least 1, got {window_size}")
    with quick_imports():
        import torch
        from tqdm import tqdm

        from unet_diffusion.inference.loading import load_segmenter
        from unet_diffusion.inference.objects import TABLE, write_objects
        from unet_diffusion.inference.reading import contents_of
        from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs, segment_images
        from unet_diffusion.models.speed import prepare_weights
        from unet_diffusion.runtime.processes import process_group
        from unet_diffusion.segmentation.labels import check_threshold

    if min_size is not None and not (instances or overlays):
        raise ValueError("--min_size is of objects, and a mask shows none; add --instances or --overlays")
    trained = load_segmenter(checkpoint, allow=allow or ())
    settings: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "instances": instances,
        "overlays": overlays,
        "probabilities": probabilities,
        "views": views,
        "diameter": diameter,
        "threshold": trained.threshold if threshold is None else threshold,
        "min_size": trained.min_size if min_size is None else min_size,
        "window_size": window_size,
        **table.settings(),
        f"{CONTENTS}checkpoint": contents_of(trained),
    }
    if instances and trained.kind == "classes":
        raise ValueError("--instances needs a model of objects, and this one was trained on classes; leave it out")
    check_threshold(trained.kind, threshold, min_size)
    trained.check_diameter(diameter)
    if window_size is not None:
        trained.window_size = window_size
    sources, outputs = ImagesToSegment(images, table), Outputs(output, probabilities, overlays, instances)
    trained.to(device, precision=precision, speed=speed)
    settings["precision"] = trained.precision
    prepare_weights(trained.unet, getattr(torch, trained.precision or "float32"))

    predict = partial(trained.segment, views=views, diameter=diameter, threshold=threshold, min_size=min_size)
    is_new = not output.exists()
    with process_group() as group, claimed(output, group):
        group.on_rank_zero(lambda: _prepare_masks(settings, sources, outputs, overwrite=overwrite))
        if group.rank == 0:
            say_left_out(sources.left_out)
        share = len(group.shard(list(sources.sources)))
        with tqdm(total=share, unit="image", disable=group.rank > 0) as bar:
            failed = segment_images(trained, sources, outputs, predict=predict, progress=bar.update, group=group)
        if group.rank > 0:
            return
    is_empty = is_new and len(failed) == len(sources)
    if is_empty:
        shutil.rmtree(output)
    print(f"{len(sources) - len(failed)} masks in {output}")
    if instances and not is_empty:
        print(f"{write_objects(sources, outputs, trained.unet.in_channels)} objects in {output / TABLE}")
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} of {len(sources)} images could not be segmented:", *failed]))


def _prepare_masks(settings: dict[str, Any], images: "ImagesToSegment", outputs: "Outputs", *, overwrite: bool) -> None:
    """Make the output folder, or continue in one with the same settings; masks of changed images are removed."""

    def remove_masks() -> None:
        outputs.made_of.doubt()  # masks of other images stay, and are not counted as done with these settings
        for mask in images.sources:
            outputs.remove(mask)

    require_same_settings(
        outputs.folder,
        settings,
        "masks",
        fix="choose another --output, or --overwrite",
        replace=remove_masks if overwrite else None,
    )
    remove_left_behind(outputs.folder)
    changed = images.changed(outputs)
    for mask in changed:
        outputs.remove(mask)
    if changed:
        print(f"{len(changed)} masks are made again, because their images have changed or they were not finished: "
              f"{first_few(changed)}", flush=True)  # fmt: skip
