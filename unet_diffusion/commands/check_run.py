"""`fit` that tries a few steps, says what it found, and writes nothing."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from unet_diffusion.checks.advice import advice
from unet_diffusion.checks.findings import Section, report
from unet_diffusion.checks.plan import plan_facts, plan_findings
from unet_diffusion.commands.run_parser import RunParser
from unet_diffusion.commands.run_rules import check_monitors
from unet_diffusion.commands.training_cli import TrainingCLI
from unet_diffusion.training.callbacks import PictureGrid
from unet_diffusion.training.checkpointing import RunCheckpoint
from unet_diffusion.training.lightning_internals import callbacks_of, replace_callbacks
from unet_diffusion.training.planning import NUM_VALIDATED, TrySteps, disk_of, plan_of, sections_of
from unet_diffusion.training.timing import batches_of_an_epoch, num_batches


class CheckParser(RunParser):
    """The parser of `fit` with the name of `check` in its help."""

    command = "check"


class CheckCLI(TrainingCLI):
    """`fit` that tries a few steps, says what it found, and writes nothing."""

    writes = False
    parser_class = CheckParser

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config[self.subcommand].trainer
        trainer.logger = False
        trainer.num_sanity_val_steps, trainer.limit_val_batches = 0, NUM_VALIDATED
        # One process tries the steps: what the others do beside it takes as long.
        trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"

    def carry_out(self, subcommand: str) -> None:
        """Try the steps and print what was found."""
        check_monitors(self.trainer, self.model.logged)
        tried = TrySteps()
        checkpoint = next(one for one in callbacks_of(self.trainer) if isinstance(one, RunCheckpoint))
        pictures = [one for one in callbacks_of(self.trainer) if isinstance(one, PictureGrid)]
        replace_callbacks(self.trainer, [_Setup(pictures), tried])  # the others write
        self.trainer.fit(self.model, self.datamodule)
        plan = plan_of(self.trainer, self.model, self.datamodule, num_processes=self._num_processes())
        measured = tried.measured(self.trainer, self._num_validations())
        disk = disk_of(self.trainer, self.model, checkpoint, plan.num_steps)
        sections = sections_of(self.trainer, self.model, quick=False)
        sections.append(Section("Plan", plan_facts(plan, measured, disk), plan_findings(plan, measured, disk)))
        sections.append(Section("Advice", [], advice(plan)))
        print(report(sections))

    def _num_processes(self) -> int:
        trainer = self.written[self.subcommand].trainer
        devices: Any = trainer.devices
        if devices in ("auto", -1, "-1"):
            on_gpu = self.trainer.strategy.root_device.type == "cuda"
            devices = torch.cuda.device_count() if on_gpu else 1
        elif isinstance(devices, str):
            devices = len([part for part in devices.split(",") if part]) if "," in devices else int(devices)
        elif isinstance(devices, list):
            devices = len(devices)
        return int(devices) * trainer.num_nodes

    def _num_validations(self) -> float:
        trainer = self.written[self.subcommand].trainer
        num_processes, interval = self._num_processes(), trainer.val_check_interval or 1.0
        batches = num_batches(self.trainer, self.datamodule, num_processes=num_processes)
        if trainer.check_val_every_n_epoch is None:
            return batches // interval
        if not isinstance(interval, int):
            interval *= batches_of_an_epoch(self.trainer, self.datamodule, num_processes=num_processes)
        return batches / interval / trainer.check_val_every_n_epoch


class _Setup(Callback):
    """What pictures refuse before training, without the pictures."""

    def __init__(self, pictures: list[PictureGrid]) -> None:
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for one in self.pictures:
            one.setup(trainer, pl_module, stage)
