"""How good something is: a denoiser, a segmenter, an autoencoder, or images in a folder that anybody drew."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule
from tqdm import tqdm

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.described import USUAL, Table
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.data.tables import is_table_file
from unet_diffusion.data.tars import is_tar
from unet_diffusion.data.value_ranges import keep_range
from unet_diffusion.evaluation.autoencoders import evaluate_autoencoder
from unet_diffusion.evaluation.denoisers import evaluate_denoiser
from unet_diffusion.evaluation.features import FeatureName, Features, features_named
from unet_diffusion.evaluation.result import Evaluation
from unet_diffusion.evaluation.segmenters import evaluate_segmenter
from unet_diffusion.evaluation.selections import of_data
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.loading import is_checkpoint, load
from unet_diffusion.inference.sample_options import Sampling
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.addresses import is_address, missing_path
from unet_diffusion.runtime.processes import ALONE, ProcessGroup

StrPath = str | os.PathLike[str]
OUTPUT = "evaluation"  # folder in a run folder
NUM_IMAGES = 1000  # samples: the fewest that distances are usually given for


def evaluate(
    model: Denoiser | Segmenter | Autoencoder | StrPath,
    data: LightningDataModule,
    *,
    output: StrPath = OUTPUT,
    subject: str | None = None,
    num_images: int = NUM_IMAGES,
    features: FeatureName = "own",
    features_weights: str | None = None,
    sampling: Sampling | None = None,
    segmenter: Segmenter | None = None,
    overwrite: bool = False,
    group: ProcessGroup = ALONE,
    table: Table = USUAL,
) -> Evaluation:
    """How good a model or images are; the evaluation is printed as text, and `save` writes a page of it.

        evaluation = ud.evaluate("runs/digits", ud.ImageDataModule(Digits()), output="runs/digits/evaluation")
        print(evaluation)
        evaluation.save("runs/digits/evaluation")

    Args:
        model: What is evaluated: a model, a path that `load` takes, or a folder of images.
        data: The data that the model was trained on, with the images that it held out for validation. Where they
            measure their range of values and are not set up yet, they keep that of the model.
        subject: What is evaluated, for the heading; None: the path, or the model as it prints itself.
        output: The folder for samples and the network of the features. What is there is not made again.
        num_images: The number of samples to draw from a denoiser.
        features: What images are compared by: a network trained on these images ("own"), or a pretrained one.
        features_weights: The weights of pretrained features: for inception the file of torch-fidelity, for dinov2 and
            clip a folder of transformers, or a name on the hub.
        sampling: How a denoiser draws; None: as `Denoiser.sample` does by default.
        segmenter: The segmenter that judges whether the samples of a denoiser follow semantic maps and boxes; None:
            that is left out.
        overwrite: Whether samples that were drawn with other settings are replaced.
        group: The processes that share the work; each gets the evaluation.
        table: Which part is used of a folder of images that is a data set.

    Raises:
        FileNotFoundError: If there is neither a model nor a folder of images.
        ValueError: If the model does not fit the data, or there are too few images.
        FileExistsError: If the output folder holds samples of other settings.
    """
    subject = str(model) if subject is None else subject
    if isinstance(model, str | os.PathLike):
        model = subject_of(model)
    if table.named and not isinstance(model, Path):
        raise ValueError(f"table names the parts of a data set of images, and {subject} is a model; leave it out")
    if segmenter is not None and not isinstance(model, Denoiser):
        raise ValueError(f"segmenter judges the samples of a denoiser, and {subject} is none; leave it out")
    if not isinstance(model, Path):
        keep_range(data, model.values)
    if isinstance(model, Denoiser | Path) and isinstance(data, ImageDataModule):
        return evaluate_denoiser(
            model, data, output=Path(output), subject=subject, num_images=num_images, features=features,
            features_weights=features_weights, sampling=sampling, segmenter=segmenter, overwrite=overwrite, group=group,
            table=table,
        )  # fmt: skip
    with tqdm(desc="evaluating", unit="image", disable=group.rank > 0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if isinstance(model, Segmenter) and isinstance(data, SegmentationDataModule):
            return evaluate_segmenter(model, data, subject=subject, progress=show, group=group)
        if isinstance(model, Autoencoder) and isinstance(data, ImageDataModule):
            train, _ = of_data(data)

            def compared_by() -> Features:
                return features_named(features, features_weights, train, Path(output))

            group.on_rank_zero(lambda: compared_by().about)  # trains the network, which the others read
            made = compared_by()
            return evaluate_autoencoder(
                model, data, subject=subject, features=made.network, features_name=made.about, progress=show,
                group=group,
            )  # fmt: skip
    if isinstance(model, Path):
        raise ValueError(f"{model} is a folder of images, and the data are labelled images for a segmenter; evaluate "
                         "the segmenter's run instead")  # fmt: skip
    raise ValueError(f"{type(data).__name__} is no data for a {type(model).__name__}; give the data of its training")


def subject_of(
    path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None
) -> Denoiser | Segmenter | Autoencoder | Path:
    """The model at a path, or the path itself if it is a folder without a model, or a data set.

    Args:
        path: What `load` takes, or a folder of images.
        allow: Modules of one's own, or of somebody one trusts, whose classes a checkpoint may name.
        autoencoder: For a denoiser of latents, the folder where their autoencoder is now; None: where it was.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If there is a model that cannot be read.
    """
    folder = Path(path)
    is_archive = is_tar(str(folder)) and not is_address(folder) and missing_path(folder) is None
    if is_archive or is_table_file(folder):
        return folder
    try:
        is_checkpoint(folder)
    except FileNotFoundError:
        if not folder.exists():
            raise
        return folder
    return load(folder, allow=allow, autoencoder=autoencoder)
