"""evaluate: figures that say how good a model or a folder of images is, and a page that explains them."""

from pathlib import Path
from typing import Annotated, Literal

from unet_diffusion.commands.arguments import (
    Checkpoint,
    Folder,
    Model,
    Precision,
    check_exists,
    check_scheduler,
    claimed,
)
from unet_diffusion.data.described import USUAL, Table, check_only_images
from unet_diffusion.runtime.imports import import_lightning, quick_imports
from unet_diffusion.runtime.messages import UsageError


def evaluate_run(
    run: Annotated[Path, "RUN"],
    *,
    data: Annotated[list[str], "NAME=VALUE"] | None = None,
    config: str | None = None,
    num_images: int = 1000,
    output: Folder | None = None,
    features: Literal["own", "inception", "dinov2", "clip"] = "own",
    features_weights: str | None = None,
    scheduler: str = "DPMSolverMultistepScheduler",
    num_inference_steps: int = 25,
    thresholding: bool = False,
    guidance_scale: float = 1.0,
    seed: int = 0,
    segmenter: Model | None = None,
    overwrite: bool = False,
    allow: Annotated[list[str], "MODULE"] | None = None,
    autoencoder: Checkpoint | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: Precision = "auto",
    table: Table = USUAL,
) -> None:
    """Say how good a model is, with figures, pictures and what they mean.

        unet-diffusion evaluate runs/digits
        unet-diffusion evaluate runs/digits --num_images 5000 --guidance_scale 2 --output evaluations/guided
        unet-diffusion evaluate generated --config runs/digits/config.yaml
        unet-diffusion evaluate imported.ckpt --data.source Folder --data.root images --data.image_size 64

    RUN is a run folder, a checkpoint, a diffusers folder, or a folder of images that anybody drew. Samples are compared
    with the images that the run was trained on, and held-out images say what a perfect model would reach. A denoiser
    that draws from maps, boxes or images gets those of the held-out images. The output folder gets evaluation.html, a
    page that needs nothing else, evaluation.json, and the samples. Several processes of torchrun share the work. After
    an interruption the same command continues the drawing of samples; segmenters and autoencoders are evaluated again
    from the start.

    Args:
        run: The run folder, checkpoint, diffusers folder or folder of images.
        data: Data other than those of the configuration; --data.root DIR is the same as --data root=DIR.
        config: The file of the configuration that says what the data are, or the name of a recipe. The default is the
            config.yaml of the run.
        num_images: The number of samples to draw.
        output: The folder for the page and the samples. The default is evaluation in the run folder, or
            NAME-evaluation beside anything else.
        features: What images are compared by: a small network that is trained on your images, or a pretrained one.
        features_weights: The weights of pretrained features: a file for inception; for dinov2 and clip a folder of
            transformers, or a name on the hub, which is downloaded.
        scheduler: The name of a diffusers scheduler.
        num_inference_steps: The number of denoising steps.
        thresholding: Keep pixels in their range at every step also with DPMSolver, DEIS and UniPC, for fewer specks
            where guidance is strong. DDPM, DDIM and Heun always do; other schedulers cannot.
        guidance_scale: How much closer samples come to their label or caption; 1 turns guidance off.
        seed: The seed of the noise.
        segmenter: The run folder or .ckpt file of a segmenter, or owner/name, a model on the hub. The segmenter
            judges whether samples follow the semantic maps or boxes that they were drawn for.
        overwrite: Replace samples that were drawn with other settings.
        allow: The modules of your own, or of somebody you trust, that the files may name.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        batch_size: The number of samples that are drawn at once.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the network computes in; "auto" takes 16 bits where the hardware has them,
            else float32.
        table: The split and the column, or the members, that are used where RUN is a data set of images that somebody
            drew. For the data the options are --data.table.image NAME and the like.

    Raises:
        UsageError: If it is not known what the data are.
        FileNotFoundError: If there is no such model, or weights or images are missing.
        FileExistsError: If the output folder holds samples of other settings.
        ValueError: If the data do not fit the model, or a number is out of range.
    """
    check_only_images(table)
    check_exists("RUN", run)
    if segmenter is not None:
        check_exists("--segmenter", segmenter)
    check_scheduler(scheduler)
    if config is None and not data and not (run / "config.yaml").exists() and run.parent.name != "checkpoints":
        raise UsageError(f"{run} does not say what it was trained on; give its data, with --config FILE, or with "
                         "--data.source Folder --data.root DIR")  # fmt: skip
    with quick_imports():
        import_lightning()
        from unet_diffusion.commands.run_data import config_of, data_of
        from unet_diffusion.evaluation.evaluation import evaluate, subject_of
        from unet_diffusion.evaluation.result import PAGE_NAME
        from unet_diffusion.inference.loading import load_segmenter
        from unet_diffusion.inference.running import Running
        from unet_diffusion.inference.sample_options import Sampling
        from unet_diffusion.inference.segmenter import Segmenter
        from unet_diffusion.runtime.processes import process_group

    model = subject_of(run, allow=allow or (), autoencoder=autoencoder)
    if isinstance(model, Running):
        model.to(device, precision=precision)
    judging = None if segmenter is None else load_segmenter(segmenter, allow=allow or ())
    if judging is not None:
        judging.to(device, precision=precision)
    task = "segment" if isinstance(model, Segmenter) else "denoise"
    images = data_of(config or config_of(run), _options(data or []), allow or [], task)
    sampling = Sampling(scheduler, num_inference_steps, guidance_scale, seed, batch_size, thresholding)
    folder = output or _output_of(run)
    with process_group() as group, claimed(folder, group):
        group.on_rank_zero(images.prepare_data)
        evaluation = evaluate(
            model, images, output=folder, subject=str(run), num_images=num_images, features=features,
            features_weights=features_weights, sampling=sampling, segmenter=judging, overwrite=overwrite, group=group,
            table=table,
        )  # fmt: skip
        if group.rank == 0:
            evaluation.save(folder)
            print(f"{evaluation}\n{folder / PAGE_NAME} explains it with pictures")


def _options(data: list[str]) -> list[str]:
    """Options of `fit` of NAME=VALUE; a word without a name is a second value, such as the width after the height."""
    words = list[str]()
    for item in data:
        name, is_named, value = item.partition("=")
        words += [f"--data.{name}", value] if is_named else [item]
    return words


def _output_of(run: Path) -> Path:
    if run.is_file() and run.parent.name == "checkpoints":
        run = run.parents[1]
    is_run = (run / "checkpoints").is_dir()
    name = run.name if run.is_dir() else run.stem  # a folder such as guided_1.5 has no ending
    return run / "evaluation" if is_run else run.with_name(f"{name}-evaluation")
