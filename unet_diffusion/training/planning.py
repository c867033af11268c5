"""What a run is going to do, as `checks` judges it; a first look at data and settings, and a few steps to time."""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from unet_diffusion.checks.advice import advice
from unet_diffusion.checks.data import data_sections
from unet_diffusion.checks.findings import Section
from unet_diffusion.checks.plan import Disk, Measured, Plan, refuse_little_memory
from unet_diffusion.data.items import Items
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.latents.codec import PixelCodec
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.checkpointing import RunCheckpoint, num_bytes
from unet_diffusion.training.lightning_internals import data_of
from unet_diffusion.training.timing import num_batches

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NUM_TRIED = 3  # steps; the first one warms up
MOST_SECONDS = 20.0  # of steps
NUM_VALIDATED = 2  # batches


class FirstLook(Callback):
    """Says before training, on the first process, what of the data and settings is likely to waste the run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, NetworkModule):
            return
        plan = plan_of(trainer, pl_module, data_of(trainer), num_processes=trainer.world_size)
        sections = sections_of(trainer, pl_module, quick=True)
        for finding in [*(one for section in sections for one in section.findings), *advice(plan)]:
            if finding.severity != "note":
                rank_zero_info(str(finding))


def sections_of(trainer: Trainer, module: NetworkModule, *, quick: bool) -> list[Section]:
    """What is found in the data of a run.

    Args:
        trainer: The trainer, whose data module is set up.
        module: What is trained, after it has met its data.
        quick: Whether to look for about a second only.
    """
    texts = [one for one in getattr(module, "conditions", []) if isinstance(one, TextTokens)]
    return data_sections(data_of(trainer), texts=texts, loss=getattr(module, "loss", ""), quick=quick)


def plan_of(trainer: Trainer, module: NetworkModule, data: Any, *, num_processes: int) -> Plan:
    """The settings of a run that decide what it takes and what comes of it.

    Args:
        trainer: The trainer, which has the optimisers.
        module: What is trained, after it has met its data.
        data: The data module, set up.
        num_processes: The number of processes of the run.
    """
    optimizer = trainer.optimizers[0]
    averaged = {id(p) for _, network in module.averaged_pairs() for p in network.parameters()}
    averages = {id(p) for average, _ in module.averaged_pairs() for p in average.parameters()} - averaged
    trained = [p for p in module.parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if id(p) not in averages]  # an average shares frozen weights
    momentum = optimizer.defaults.get("momentum", 0.0)
    assert module.input_shape is not None
    return Plan(
        task={"denoiser": "denoise", "segmenter": "segment"}.get(module.record_key, "autoencode"),
        image_shape=module.input_shape,
        num_train=len(getattr(data, "train_images", data.train_indices)),
        num_val=len(data.val_indices),
        batch_size=data.batch_size,
        images_a_step=data.batch_size * num_processes * trainer.accumulate_grad_batches,
        num_steps=num_batches(trainer, data, num_processes=num_processes) / trainer.accumulate_grad_batches,
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in trained),
        num_moments=2 if "betas" in optimizer.defaults else int(momentum > 0),
        optimizer=type(optimizer).__name__,
        learning_rate=optimizer.defaults["lr"],
        momentum=momentum,
        lr_warmup_steps=module.lr_warmup_steps,
        ema_decay=module.ema_decay,
        has_batch_norm=any(isinstance(part, BATCH_NORMS) for part in module.network.modules()),
        horizontal_flip=getattr(data, "horizontal_flip", False),
        **_of_denoising(module, data),
    )


def _of_denoising(module: Any, data: Any) -> dict[str, Any]:
    """What of a plan only denoisers have."""
    if module.record_key != "denoiser":
        return {}
    provided = {entry for one in module.all_conditions for entry in one.provides}
    asked = [one for one in module.all_conditions if one.batch_key in {"labels", "captions"} - provided]
    keys = {one.batch_key for one in asked}
    are_named = data.source.class_names is not None or not isinstance(data.source, Items)
    last = float(module.schedule.alphas_cumprod[-1])
    return {
        "class_names": (data.class_names or ()) if "labels" in keys and are_named else (),
        "captions": data.entries["captions"] if "captions" in keys else (),
        "can_be_guided": any(one.has_null for one in asked) if asked else None,
        "last_snr": last / (1 - last),
        "encodes": not isinstance(module.codec, PixelCodec),
    }


class TrySteps(Callback):
    """Times a few steps and a part of the validation, and then ends the run."""

    def __init__(self) -> None:
        self.steps: list[float] = []  # seconds of each batch
        self.validated: list[float] = []
        self._begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, NetworkModule)
        refuse_little_memory(plan_of(trainer, pl_module, data_of(trainer), num_processes=1), _memory(trainer)[1])
        self._begun = _now(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note(trainer, self.steps)
        trainer.should_stop = len(self.steps) >= NUM_TRIED or sum(self.steps) > MOST_SECONDS

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = _now(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note(trainer, self.validated)

    def _note(self, trainer: Trainer, times: list[float]) -> None:
        now = _now(trainer)
        times.append(now - self._begun)
        self._begun = now

    def measured(self, trainer: Trainer, num_validations: float) -> Measured:
        """What was measured.

        Args:
            trainer: The trainer, after it has ended.
            num_validations: The number of validations of the whole run.
        """
        used, free, where = _memory(trainer)
        num_val_batches = len(data_of(trainer).val_dataloader())
        return Measured(
            step_seconds=min(self.steps[1:] or self.steps) * trainer.accumulate_grad_batches,
            val_seconds=sum(self.validated) / len(self.validated) * num_val_batches if self.validated else 0.0,
            num_validations=num_validations,
            used_bytes=used,
            free_bytes=free,
            where=where,
        )


def disk_of(trainer: Trainer, module: NetworkModule, checkpoint: RunCheckpoint, num_steps: float) -> Disk:
    """What the checkpoints of a run take.

    Args:
        trainer: The trainer; its run folder need not be there.
        module: What is trained.
        checkpoint: What saves it.
        num_steps: The number of steps of the run.
    """
    folder = Path(trainer.default_root_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    kept: float = max(checkpoint.save_top_k if checkpoint.monitor else 0, 0)
    if checkpoint.save_top_k == -1 and checkpoint.interval and num_steps < math.inf:
        kept = num_steps // checkpoint.interval
    return Disk(num_bytes(module), 2 + kept, shutil.disk_usage(there).free)


def _now(trainer: Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def _memory(trainer: Trainer) -> tuple[int, int | None, str]:
    """The memory that was used at most, what is free beside it, and whose memory it is."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[0], "of the GPU"
    if sys.platform == "win32":
        return 0, None, "of the machine, which is not known here"
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return used, free, "of the machine"
