"""pack: a folder of images becomes shards, tar archives of many images each."""

import shutil
import sys
from contextlib import closing
from pathlib import Path

from unet_diffusion.commands.arguments import BadFiles, Folder, Size, check_exists, say_left_out
from unet_diffusion.data.described import USUAL, Table, check_used


def pack(
    images: Path,
    folder: Folder,
    *,
    shard_images: int = 1024,
    image_size: Size | None = None,
    channels: int = 3,
    background: str = "white",
    class_labels: bool = False,
    captions: bool = False,
    on_bad_file: BadFiles = "error",
    table: Table = USUAL,
) -> None:
    """Write shards of images, to train on more images than a disk holds.

        unet-diffusion pack images shards --image_size 64 64

    Shards are tar archives of many images each. Training reads them from the folder, or from the address to which it is
    copied:

        unet-diffusion fit --config stream --data.root shards

    Shards hold images, their classes and their captions. Semantic maps, paired images and boxes are read from folders,
    and from the latents that encode makes of them.

    The image files are stored unchanged, in an order drawn at random, unless they are scaled. The same command again
    continues where it was cut off.

    Args:
        images: The folder of images, archive.zip, or archive.zip/folder; or a data set: hf://owner/name, a folder that
            the library datasets saved, Parquet or Arrow files, or tar archives of others, also behind an address.
        folder: The folder for the shards.
        shard_images: The number of images in a shard. In training a process holds 16 shards in memory, as files, and
            one more for each worker (2 * window * num_lanes + num_workers).
        image_size: Scale and crop images to this height and width, as fit would, and store them as PNG or TIFF, which
            takes less time in training. By default they are stored unchanged.
        channels: The number of channels of the images: 1 (grey), 3 (RGB) or 4 (RGB and alpha), to which colours are
            converted with --image_size, or the number that the files hold.
        background: The colour behind transparent pixels, with --image_size.
        class_labels: Use the folders directly below IMAGES as classes, or those of the data set.
        captions: Store the captions in metadata.csv, metadata.jsonl or NAME.txt, or those of the data set.
        on_bad_file: What happens to files that cannot be decoded or are too small. With "error", the command packs the
            others and then lists the bad files; with "skip", it leaves them out.
        table: The split, columns or members of a data set that are used.

    Raises:
        FileNotFoundError: If there are no such images.
        FileExistsError: If the folder holds something else, or shards with other settings.
        ValueError: If files cannot be used and are not to be left out.
    """
    check_exists("IMAGES", images)
    if channels < 1:
        raise ValueError(f"--channels must be at least 1, got {channels}")
    from tqdm import tqdm

    from unet_diffusion.data import ImageFormat, find_images, pack_images
    from unet_diffusion.data.captions import TEXT_EXTENSIONS
    from unet_diffusion.data.checking import bad_files_message
    from unet_diffusion.data.folder import entries_of
    from unet_diffusion.data.shards import INDEX
    from unet_diffusion.runtime.folder_settings import ClaimedFolder

    image_format = None if image_size is None else ImageFormat(*image_size, channels, background)
    check_used(table, class_labels=class_labels, captions=captions)
    files, is_new = find_images(images, table), not folder.exists()
    say_left_out(files.left_out.described(but=TEXT_EXTENSIONS if captions else ()))
    entries, class_names = entries_of(files, files.names, images, class_labels=class_labels, captions=captions)
    with closing(ClaimedFolder(folder)), tqdm(total=len(files.names), unit="image", desc="pack") as bar:
        bad_files = pack_images(
            files, folder, root=images, shard_images=shard_images, image_format=image_format, channels=channels,
            entries=entries, class_names=class_names, skip_bad_files=on_bad_file == "skip",
            progress=bar.update, say=bar.write,
        )  # fmt: skip
    if is_new and len(bad_files) == len(files.names):
        shutil.rmtree(folder)  # it would hold nothing but their names
    if bad_files:
        message = bad_files_message(bad_files, len(files.names))
        if on_bad_file == "error":
            is_whole = (folder / INDEX).exists()
            state = "the index of an earlier call is still valid" if is_whole else f"{INDEX} is written once all are"
            raise ValueError(f"{message}\nThe others are packed; {state}. Repair these files and run the same command "
                             "again, or add --on_bad_file skip to leave them out.")  # fmt: skip
        print(f"{message}\nThe others are used.", file=sys.stderr)
    print(f"{len(files.names) - len(bad_files)} images in {folder}; to train on them: unet-diffusion fit "
          f"--config stream --data.root {folder}")  # fmt: skip
