"""Which of the files below a root are images to use, and which are left out and why.

Names come out composed (Unicode's NFC), so that a name from macOS, whose accents are characters of their own, and one
from anywhere else are the same name. What is an image is told from the extension: all spellings of the formats in
`stored_pillow.FORMATS`, NumPy's, DICOM's and NIfTI's. Left out are files of other kinds, what systems put beside files
of people, and folders that this package has written.
"""

import json
import os
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from unet_diffusion.runtime.folder_settings import LOCK, RUN_HEADER, SETTINGS
from unet_diffusion.runtime.messages import MOST_NAMED, first_few, printable

ARRAY_EXTENSIONS = (".npy", ".npz")
MEDICAL_EXTENSIONS = (".dcm", ".dicom", ".nii", ".nii.gz")
TIFF_EXTENSIONS = (".btf", ".tf2", ".tf8", ".tif", ".tiff")
IMAGE_EXTENSIONS = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", *TIFF_EXTENSIONS, ".webp"),
    *(*ARRAY_EXTENSIONS, *MEDICAL_EXTENSIONS),
)
OF_SYSTEMS = {  # files and folders, in lower case, beside those that begin with a dot
    *("__macosx", "lost+found", "desktop.ini", "thumbs.db", "ehthumbs.db"),
    *("$recycle.bin", "system volume information"),  # Windows
    *("@eadir", "@tmp", "#recycle", "#snapshot"),  # network drives of Synology
}
RUN, PIPELINE = "config.yaml", "model_index.json"  # of a run, and of an exported pipeline
DRAWN, SEGMENTED = {"num_drawn"}, {"probabilities", "overlays", "instances"}  # in records of sample, and of segment
METADATA = "metadata.parquet"
HIDDEN, WRITTEN = "hidden or of the system", "written by unet-diffusion"
SHEET = "grid.png"  # where `sample` shows all images that it drew


class LeftOut:
    """Files and folders below a root that are not used.

    Attributes:
        extensions: How many files there are of each extension that is none of an image.
        names: Other files and folders, by the reason.
        num_metadata: How many of the files are called metadata.parquet, as `datasets` has tables of what is known of
            the images beside them.
    """

    def __init__(self) -> None:
        self.extensions: Counter[str] = Counter()
        self.num_metadata = 0
        self.names: dict[str, set[str]] = defaultdict(set)

    def described(self, but: Iterable[str] = ()) -> str:
        """What is left out, in a line; "" if nothing is.

        Args:
            but: Extensions of files that are used after all.
        """
        others = Counter({kind: count for kind, count in self.extensions.items() if kind not in but})
        parts = [f"{count} {kind or 'without an extension'}" for kind, count in others.most_common(MOST_NAMED)]
        if rest := sum(others.values()) - sum(count for _, count in others.most_common(MOST_NAMED)):
            parts.append(f"{rest} of other kinds")
        for reason, names in self.names.items():
            parts.append(f"{len(names)} {reason} ({first_few(sorted(names))})")
        return printable("; ".join(parts))


def composed(name: str) -> str:
    """The name with each accent in one character with its letter, as Unicode's NFC has it."""
    return unicodedata.normalize("NFC", name)


def without_ending(name: str) -> str:
    """A file's name without its extension, of which .nii.gz is one."""
    name = name[: -len(".gz")] if name.lower().endswith(".nii.gz") else name
    return str(PurePosixPath(name).with_suffix(""))


def leads_outside(name: str) -> bool:
    """Whether a name in an archive, joined to a folder, would leave it; on Windows too.

    Args:
        name: The name as the archive holds it.
    """
    path = PureWindowsPath(name)  # takes both kinds of slashes
    return bool(path.anchor) or ".." in path.parts


def image_names(names: Iterable[str], read: Callable[[str], bytes], left_out: LeftOut) -> list[str]:
    """Those of images to use, sorted.

    Args:
        names: Paths of all files, composed, with forward slashes.
        read: The contents of one of them.
        left_out: The others are added to it.
    """
    names = list(names)
    folders = _output_folders(names, read)
    outputs = tuple(f"{folder}/" for folder in folders if folder)
    images = []
    for name in names:
        if name.startswith(outputs):
            left_out.names[WRITTEN].add(next(one[:-1] for one in outputs if name.startswith(one)))
        elif name == SHEET and "" in folders:
            left_out.names[WRITTEN].add(name)
        elif name.rpartition("/")[2] == LOCK:  # of a run that begins below the images
            continue
        elif hidden := of_a_system(name):
            left_out.names[HIDDEN].add(hidden)
        elif name.lower().endswith(IMAGE_EXTENSIONS):
            images.append(name)
        else:
            left_out.extensions[PurePosixPath(name).suffix.lower()] += 1
            left_out.num_metadata += PurePosixPath(name).name == METADATA
    return sorted(images)


def walk(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every regular file below a folder. Links to folders are followed, but for those to a folder that they lie in.

    Args:
        root: An existing folder.
        left_out: What is no file, and what is not walked into, is added to it.
    """

    def below(folder: Path, ancestors: frozenset[Path]) -> Iterator[Path]:
        real = folder.resolve()
        if real in ancestors:
            left_out.names["links to a folder that they lie in"].add(_below(root, folder))
            return
        for path in folder.iterdir():
            if os.path.isfile(path):  # follows links, and is False for what it cannot follow
                yield path
            elif _is_of_a_system(path.name):
                left_out.names[HIDDEN].add(_below(root, path))
            elif os.path.isdir(path):
                yield from below(path, ancestors | {real})
            else:
                left_out.names["no files: pipes, devices or broken links"].add(_below(root, path))

    yield from below(root, frozenset(root.resolve().parents))


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_of_a_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def of_a_system(name: str) -> str | None:
    """The path down to its first part that is hidden or of a system, if there is one.

    Args:
        name: A path with forward slashes.
    """
    parts = name.split("/")
    return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if _is_of_a_system(part)), None)


def _output_folders(names: Iterable[str], read: Callable[[str], bytes]) -> list[str]:
    """Folders that this package has written, as a record or a checkpoint there says; none in another.

    The root is "". Its images are used, as it was given on purpose.
    """
    outputs = set()
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in (RUN, SETTINGS, PIPELINE) and _is_a_record(file, read, name):
            outputs.add(folder)
        elif file.endswith(".ckpt") and folder.endswith("/checkpoints"):
            outputs.add(folder.removesuffix("/checkpoints"))
    outermost: list[str] = []
    for folder in sorted(outputs - {""}):
        if not folder.startswith(tuple(f"{one}/" for one in outermost)):
            outermost.append(folder)
    return [*outermost, *outputs & {""}]


def _is_a_record(file: str, read: Callable[[str], bytes], name: str) -> bool:
    """Whether a file with the name of a record of this package is one."""
    try:
        content = read(name).decode()
        return content.startswith(RUN_HEADER) if file == RUN else _is_ours(file, json.loads(content))
    except (OSError, ValueError, RecursionError, RuntimeError, zipfile.BadZipFile, zlib.error):
        # Too large, no text, no JSON, or encrypted or damaged in an archive.
        return False


def _is_ours(file: str, record: object) -> bool:
    if not isinstance(record, dict):
        return False
    wanted = [{"_class_name"}] if file == PIPELINE else [DRAWN, SEGMENTED]
    return any(keys.issubset(record) for keys in wanted)
