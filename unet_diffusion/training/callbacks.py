"""Shows how training does: a picture of what the averaged network makes, and one bar for the whole run.

diffusers and torchvision take seconds to import: they are when the first picture is drawn, not before the first step.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.batches import ImageBatches
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.diffusion.schedulers import SchedulerName
from unet_diffusion.inference.record import PACKAGE, network_record
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.messages import printable
from unet_diffusion.runtime.pictures import image_grid, in_unit_range, write_png
from unet_diffusion.segmentation.labels import probabilities_in
from unet_diffusion.segmentation.pictures import comparison
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.lightning_internals import data_of, is_trial, is_within_step, log_interval
from unet_diffusion.training.symptoms import colour_drift, warn_of

if TYPE_CHECKING:
    from unet_diffusion.training.autoencoder import AutoencoderModule
    from unet_diffusion.training.module import DiffusionModule
    from unet_diffusion.training.segmentation import SegmentationModule

PAIRS_IN_A_ROW = 8  # of images, or what a network is shown of them, and what comes of each
ALWAYS_DRAWS = [  # scheduler, its steps, those of training: known to be possible, without importing diffusers to ask
    ("DPMSolverMultistepScheduler", 15, 1000),
    ("DPMSolverMultistepScheduler", 25, 1000),
]
NUM_COMPARED = 256  # validation images whose colours samples are compared with
MAX_COLUMNS = 16  # with more classes than this, a column a class would make the grid too wide to look at


class DataSummary(Callback):
    """Says, before training or measuring, what the data are: what was found, left out and cut, and how it is split.

    The data module says it, in `summary`, and the module what it cuts itself.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer, pl_module)
        reason = _why_no_pipeline(pl_module) if trainer.is_global_zero else None
        if reason:
            rank_zero_info(f"this run exports no pipeline: {reason}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # by itself, not within fit
            self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        notes = module.data_notes() if isinstance(module, NetworkModule) else []
        for line in [*data_of(trainer).summary(), *notes]:
            rank_zero_info(printable(line))


class PictureGrid(Callback):
    """Draws a picture again and again: run folder/samples/step_0001000.png, and samples.png at the end.

    The run folder is the trainer's default_root_dir. W&B and TensorBoard loggers get each picture too. A subclass says
    what is drawn, in `picture`.

    Args:
        every_n_steps: The number of optimiser steps between pictures; 0: only at the end.
    """

    def __init__(self, every_n_steps: int = 1000):
        self.every_n_steps = every_n_steps
        self._drawn_at = 0

    def picture(self, trainer: Trainer, module: Any) -> Image:
        """What is to be looked at, of the module as it is now."""
        raise NotImplementedError(f"{type(self).__name__} must define picture()")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not is_trial(trainer):
            (run_folder(trainer) / "samples.png").unlink(missing_ok=True)  # of fewer steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and not is_within_step(trainer):
            self._drawn_at = step
            self._draw(trainer, pl_module, run_folder(trainer) / "samples" / f"step_{step:07d}.png")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._drawn_at or self._drawn_at == 0:
            self._draw(trainer, pl_module, run_folder(trainer) / "samples.png")
        elif trainer.is_global_zero and not is_trial(trainer):
            last = run_folder(trainer) / "samples" / f"step_{trainer.global_step:07d}.png"
            with atomic_write(run_folder(trainer) / "samples.png") as partial:
                shutil.copyfile(last, partial)

    def _draw(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        """By the first process; a network that is shared out runs on all of them at once."""
        if is_trial(trainer):
            return
        if trainer.is_global_zero or getattr(module, "is_sharded", False):
            picture = self.picture(trainer, module)
            if trainer.is_global_zero:
                write_png(picture, path)
                _log_picture(trainer, picture)


class SampleGrid(PictureGrid):
    """Samples of the averaged denoiser, of the same seeds every time. With classes, each column is a class.

    Texts, and what else a user would give, are those of the first validation images, and run folder/OPTION.txt has them
    row by row. A model that is shown something of an image, such as the part that a mask leaves, or a small image, is
    shown the first validation images; what it sees is above what it makes of it.

    Args:
        every_n_steps: The number of optimiser steps between grids; 0: only at the end.
        num_images: The number of images in a grid.
        scheduler: The name of a diffusers scheduler.
        num_inference_steps: The number of steps from noise to the images.
        guidance_scale: The strength of guidance. 1 is off; more needs a model trained with label_dropout.
        seed: Seed of the grid's images.
        thresholding: Whether pixels are kept in their range at every step also by solvers that do so only when they
            are asked: DPM-Solver++, DEIS and UniPC.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        *,
        num_images: int = 64,
        scheduler: SchedulerName = "DPMSolverMultistepScheduler",
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        seed: int = 0,
        thresholding: bool = False,
    ):
        super().__init__(every_n_steps)
        self.num_images = num_images
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.thresholding = thresholding
        self._real_colours: Tensor | None = None  # of the run's data

    def setup(self, trainer: Trainer, pl_module: "DiffusionModule", stage: str) -> None:  # type: ignore[override]
        """Refuses what would only fail at the first grid.

        Raises:
            ValueError: If the model cannot be sampled with these settings, or its latents are of another autoencoder
                than the one in the folder.
            FileNotFoundError: If the autoencoder of its latents is not there.
        """
        if stage != "fit":
            return
        codec = getattr(data_of(trainer), "codec", None)
        if codec is not None:
            codec.check()
            codec.release()
        if self.guidance_scale != 1 and not any(one.has_null for one in pl_module.all_conditions):
            raise ValueError(
                f"samples.guidance_scale {self.guidance_scale} needs a condition with a null; "
                "set model.label_dropout above 0 (0.1 is usual), or samples.guidance_scale to 1"
            )
        asked = (self.scheduler, self.num_inference_steps, pl_module.schedule.num_train_timesteps)
        if asked in ALWAYS_DRAWS and not self.thresholding:
            return
        from unet_diffusion.diffusion.sampling import check_sampling

        check_sampling(
            pl_module.schedule,
            (self.num_images, 1, 1, 1),
            scheduler=self.scheduler,
            num_inference_steps=self.num_inference_steps,
            clip_sample=(codec or pl_module.codec).clip_sample,
            thresholding=self.thresholding,
        )

    def picture(self, trainer: Trainer, module: "DiffusionModule") -> Image:
        images, seen = self.sample(trainer, module)
        num_classes = module.trained.num_classes
        if self._real_colours is None:
            self._real_colours = self.real_colours(trainer, num_classes)
        warn_of(module, colour_drift(images.mean(dim=(2, 3)), self._real_colours))
        module.codec.release()  # an autoencoder takes memory only while it is needed
        for name, values in self.values(trainer, module).items() if trainer.is_global_zero else ():
            with atomic_write(run_folder(trainer) / f"{name}.txt") as partial:  # row by row
                partial.write_text("\n".join(map(str, values)) + "\n", encoding="utf-8")
        shown = module.values.seen(images)
        if seen is not None:
            return in_pairs(module.values.seen(seen) if seen.shape[1] == images.shape[1] else seen, shown)
        return image_grid(shown, columns=num_classes if 0 < num_classes <= MAX_COLUMNS else None)

    def real_colours(self, trainer: Trainer, num_classes: int) -> Tensor:
        """The mean of each channel of validation images, (N, C), the same number of each class.

        There are none where the data hold latents or not all classes.
        """
        data = data_of(trainer)
        if data is None or data.codec is not None:
            return torch.empty(0, 0)
        batch = ImageBatches(data.image_set)[data.val_indices[:NUM_COMPARED].tolist()]
        means = in_unit_range(batch["images"]).mean(dim=(2, 3))
        if not num_classes:
            return means
        if "labels" not in batch:
            return means[:0]
        of_class = [means[batch["labels"] == label] for label in range(num_classes)]
        return torch.cat([part[: min(map(len, of_class))] for part in of_class])

    def sample(self, trainer: Trainer, module: "DiffusionModule") -> tuple[Tensor, Tensor | None]:
        """The grid's images, (num_images, C, H, W) in [-1, 1], and what the network was shown of images, if it was."""
        from unet_diffusion.inference.drawing import Drawing

        options = SampleOptions(
            num_images=self.num_images,
            conditions=self.values(trainer, module),
            scheduler=self.scheduler,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            thresholding=self.thresholding,
        )
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            if not any(one.is_asked_of_images for one in module.all_conditions):
                return module.trained.drawing(options).draw(range(self.num_images)), None
            entries, seen = self.examples(trainer, module)
            drawing = Drawing(module.trained, options, device=module.device, entries=entries)
            return drawing.draw(range(self.num_images)), seen

    def examples(self, trainer: Trainer, module: "DiffusionModule") -> tuple[dict[str, Tensor], Tensor | None]:
        """What the conditions read of the first validation images, by turns, and what the network is shown of them."""
        data = data_of(trainer)
        numbers, batches = self._shown(trainer), data.source.batches(data.image_set)
        parts, seen = [], []
        for first in range(0, len(numbers), data.batch_size):
            batch = batches[numbers[first : first + data.batch_size]]
            batch = data.source.on_device({name: one.to(module.device) for name, one in batch.items()}, None)
            _, entries = module.fixed_entries(batch)
            parts.append({one.batch_key: entries[one.batch_key] for one in module.all_conditions})
            if "images" not in batch:  # but latents: conditions are shown at the size of the images
                shape = module.codec.image_shape(batch["x0"].shape[1:])
                batch["images"] = torch.zeros(len(batch["x0"]), *shape)
            shown = [one.seen(batch, entries) for one in module.all_conditions]
            seen += [one.cpu() for one in shown if one is not None][:1]  # of two, the first
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(seen) if seen else None

    def values(self, trainer: Trainer, module: "DiffusionModule") -> dict[str, Any]:
        """What a user would give to draw images like the first validation images, by turns."""
        shown = self._shown(trainer)
        return {name: one for each in module.all_conditions for name, one in each.values_of(shown).items()}

    def _shown(self, trainer: Trainer) -> list[int]:
        """Numbers of the first validation images, by turns."""
        kept_apart = data_of(trainer).val_indices.tolist()
        return [kept_apart[i % len(kept_apart)] for i in range(self.num_images)]


class SegmentationGrid(PictureGrid):
    """Image, label and prediction of the averaged segmenter, of the first validation images.

    Args:
        every_n_steps: The number of optimiser steps between pictures; 0: only at the end.
        num_images: The number of images in a picture.
    """

    def __init__(self, every_n_steps: int = 1000, *, num_images: int = 4):
        super().__init__(every_n_steps)
        self.num_images = num_images

    def picture(self, trainer: Trainer, module: "SegmentationModule") -> Image:
        data = cast(SegmentationDataModule, data_of(trainer))
        shown = [data.whole(index) for index in data.val_indices[: self.num_images].tolist()]
        maps = [module.maps(one["images"]).numpy() for one in shown]
        predictions = [probabilities_in(each, module.kind).argmax(axis=0) for each in maps]
        images = [module.values.seen(one["images"][None])[0] for one in shown]
        return comparison(images, [one["classes"].numpy() for one in shown], predictions)


class ReconstructionGrid(PictureGrid):
    """Validation images, and what the averaged autoencoder makes of each, below it.

    Args:
        every_n_steps: The number of optimiser steps between pictures; 0: only at the end.
        num_images: The number of images, at least 1; of more than eight, whole rows of eight are shown.

    Raises:
        ValueError: If num_images is less than 1.
    """

    def __init__(self, every_n_steps: int = 1000, *, num_images: int = 16):
        super().__init__(every_n_steps)
        if num_images < 1:
            raise ValueError(f"samples.num_images must be at least 1, got {num_images}")
        self.num_images = num_images

    def picture(self, trainer: Trainer, module: "AutoencoderModule") -> Image:
        data = cast(ImageDataModule, data_of(trainer))
        columns = min(self.num_images, PAIRS_IN_A_ROW, len(data.val_indices))
        num_shown = min(self.num_images, len(data.val_indices)) // columns * columns  # whole rows
        shown = ImageBatches(data.image_set)[data.val_indices[:num_shown].tolist()]
        images = in_unit_range(shown["images"])
        return in_pairs(*(module.values.seen(one) for one in (images, module.reconstruct(images).cpu())))


def in_pairs(above: Tensor, below: Tensor) -> Image:
    """A grid in which each image of the one is above its counterpart in the other, eight pairs in a row.

    Args:
        above: The images above, (N, C, H, W) in [-1, 1].
        below: The images below, of the same shape.
    """
    columns = min(len(above), PAIRS_IN_A_ROW)
    pairs = zip(above.split(columns), below.split(columns), strict=True)
    rows = [torch.cat([row, row.new_zeros(columns - len(row), *row.shape[1:])]) for pair in pairs for row in pair]
    return image_grid(torch.cat(rows), columns=columns)


class RunProgressBar(ProgressBar):
    """One bar over the optimiser steps of the whole run, with the time that is left and the last logged losses.

    Lightning's own bars start again every epoch, which for a small data set is every few seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Lightning turns the bar off on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            num_steps = trainer.estimated_stepping_batches
            total = num_steps if isinstance(num_steps, int) else None
            self._bar = tqdm(total=total, initial=trainer.global_step, unit="step", desc="fit", mininterval=1.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._bar is None:
            return
        # Reading a loss waits for the device: not each step.
        every = log_interval(trainer)
        if every and trainer.global_step % every == 0:
            losses = {
                key: f"{value:.4f}" for key, value in self.get_metrics(trainer, pl_module).items() if key != "v_num"
            }
            self._bar.set_postfix(losses, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _why_no_pipeline(module: LightningModule) -> str | None:
    """Why the pipeline of a denoiser with classes of a user's own cannot be exported; None if it can be.

    Without such classes nothing is asked, as diffusers takes seconds to import.
    """
    if not isinstance(module, NetworkModule) or module.record_key != "denoiser":
        return None
    trained = cast("DiffusionModule", module).trained
    paths = [network_record(part)["class_path"] for part in (trained.unet, trained.codec, *trained.conditions)]
    if all(path.startswith(f"{PACKAGE}.") for path in paths):
        return None
    from unet_diffusion.diffusers_io.exporting import why_not_exported

    return why_not_exported(trained)


def run_folder(trainer: Trainer) -> Path:
    """Where a run puts its files: the trainer's default_root_dir."""
    return Path(trainer.default_root_dir)


def _log_picture(trainer: Trainer, picture: Image) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("samples", [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            from torchvision.transforms.functional import pil_to_tensor

            logger.experiment.add_image("samples", pil_to_tensor(picture), trainer.global_step)
