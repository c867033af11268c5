"""The parser of fit and validate: Lightning's, with errors of a line and a help that begins with what people set."""

import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from unet_diffusion.commands.parser_errors import in_short
from unet_diffusion.runtime.messages import UsageError

COMMON = (  # of the trainer's options those that people set
    "",
    *("max_steps", "default_root_dir", "precision", "accelerator", "devices", "num_nodes", "strategy", "max_time"),
    *("val_check_interval", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "logger"),
    *("enable_progress_bar", "fast_dev_run"),
)
HELP_ORDER = (
    "help",
    "model",
    "data",
    "trainer",
    "samples",
    "evaluate",
    "checkpoint",
    "ckpt_path",
)  # of the help, in this order


class RunParser(LightningArgumentParser):
    """Lightning's parser, with errors of a line and a help that begins with what people set."""

    command: str | None = None  # that the help names; None: the subcommand of Lightning's

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error of a line, in place of jsonargparse's own.

        Raises:
            UsageError: Always.
        """
        raise UsageError(in_short(message, self._option_string_actions)) from ex

    def format_help(self, *args: Any) -> str:
        if self.usage is None and any("trainer.max_steps" in _names(group) for group in self._action_groups):
            self._put_in_order()
            command = self.command or self.prog.split()[-1]
            options = "--config RECIPE [--config FILE] [--OPTION VALUE] ... [--allow MODULE]"
            self.usage = f"unet-diffusion {command} {options}"
            self.epilog = "--allow MODULE lets the configuration name classes and functions of a module of your own."
        return super().format_help(*args)

    def _put_in_order(self) -> None:
        """Sort the sections of the help; options of the trainer that few people set come last and in brief."""
        groups: Any = self._action_groups
        (trainer,) = (group for group in groups if "trainer.max_steps" in _names(group))
        common = [action for action in trainer._group_actions if (*action.dest.split("."), "")[1] in COMMON]
        rare = self.add_argument_group("The trainer's other options")
        rare._group_actions = [action for action in trainer._group_actions if action not in common]
        trainer._group_actions = sorted(common, key=lambda action: COMMON.index((*action.dest.split("."), "")[1]))
        for action in rare._group_actions:
            action.help = re.split(r"\.\s|\n\s*\n", (action.help or "").strip())[0]
        groups.sort(
            key=lambda group: max((HELP_ORDER.index(name) for name in _names(group) if name in HELP_ORDER), default=0)
        )
        groups.append(groups.pop(groups.index(rare)))


def _names(group: Any) -> list[str]:
    return [action.dest for action in group._group_actions]
