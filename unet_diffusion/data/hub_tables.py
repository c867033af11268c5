"""Data sets of the Hugging Face Hub, of which the files of one split are downloaded and no others.

The library datasets tells the files of each split, by their names or by the card of the data set, but downloads and
prepares all splits, whichever is asked for. Here its builder is given the files of one split. What it makes of them
lies in a cache of that split, so that nobody takes it for the whole data set.
"""

from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from unet_diffusion.data.described import Table
from unet_diffusion.runtime.addresses import PREFIX
from unet_diffusion.runtime.hub import check_hub_name, hub_answers

BY_SPLIT = "by_split"  # folder in the cache of datasets, with a cache for each split
USUAL_SPLIT = "train"


class MissingSplit(ValueError):
    """A data set does not have the split that is asked for."""


def load_from_hub(datasets: ModuleType, place: str, table: Table) -> Any:
    """The rows of a data set of the hub, by the name of the split.

    Args:
        datasets: The library.
        place: hf://owner/name, or hf://owner/name@revision.
        table: The split and the configuration.

    Raises:
        ConnectionError: If the hub cannot be reached, or may not be asked and the cache lacks the data set.
        MissingSplit: If there is no such split.
        Exception: Of the library, if it cannot read the data set.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, revision = place.removeprefix(PREFIX).partition("@")
    options: dict[str, Any] = {"path": check_hub_name(name), "name": table.config, "revision": revision or None}
    if HF_HUB_OFFLINE:
        return _from_the_cache(datasets, options, table.split or USUAL_SPLIT)
    if not hub_answers(options["path"], "dataset"):
        raise ConnectionError  # the library would wait for minutes
    builder = datasets.load_dataset_builder(**options)
    files = builder.config.data_files or {}
    if len(files) < 2 or Path(builder.cache_dir).is_dir():  # the whole data set has been prepared before
        return datasets.load_dataset(**options)
    split = table.split or USUAL_SPLIT
    check_split(split, files, place, table)
    if _folders_are_classes(builder, files[split]):  # and those of all splits together are numbered
        return datasets.load_dataset(**options)
    builder = datasets.load_dataset_builder(**options, cache_dir=_cache_of(datasets, split))
    builder.config.data_files = type(files)({split: files[split]})
    builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
    return builder.as_dataset()


def check_split(split: str, splits: Any, place: str, table: Table) -> None:
    """Refuse a split that a data set does not have.

    Args:
        split: The name of the split.
        splits: The names of those that there are.
        place: The place of the data set, for the message.
        table: What is chosen.

    Raises:
        MissingSplit: If it is none of them.
    """
    if split not in splits:
        there = ", ".join(map(str, splits))
        raise MissingSplit(f"{place} has no split {split}, but {there}; {table.advice('split')} one of them")


def _folders_are_classes(builder: Any, files: list[str]) -> bool:
    """Whether the library takes the folders of image files for their classes; it does not where metadata lie there."""
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

    metadata = {PurePosixPath(file).name for file in files} & set(FolderBasedBuilder.METADATA_FILENAMES)
    return isinstance(builder, FolderBasedBuilder) and not metadata


def _from_the_cache(datasets: ModuleType, options: dict[str, Any], split: str) -> Any:
    """What was downloaded before: the split alone, or else the whole data set."""
    try:
        return datasets.load_dataset(**options, cache_dir=_cache_of(datasets, split))
    except (ConnectionError, FileNotFoundError):
        return datasets.load_dataset(**options)
    except ValueError:
        if options["name"] is None:  # there are several configurations, and none is named
            raise
        return datasets.load_dataset(**options)  # which may hold the one that is missing there


def _cache_of(datasets: ModuleType, split: str) -> str:
    return str(Path(datasets.config.HF_DATASETS_CACHE) / BY_SPLIT / split)
