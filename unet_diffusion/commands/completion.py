"""completion: what a shell needs to complete commands, options and recipes with the tab key."""

from typing import Literal

from unet_diffusion.commands.parsing import TRAINING, CommandParser, add_command, whole_parser
from unet_diffusion.commands.recipes import all_recipes

FIT_OPTIONS = (  # Lightning's own parser knows all options of fit, but takes seconds to make
    *("--trainer.max_steps", "--trainer.default_root_dir", "--trainer.devices", "--trainer.precision", "--data.root"),
    *("--data.batch_size", "--model.speed", "--ckpt_path", "--print_config"),
)


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Let the tab key complete commands and options.

        eval "$(unet-diffusion completion bash)"

    This line goes into ~/.bashrc. For zsh, write the output to a folder of $fpath:

        unet-diffusion completion zsh > ~/.zfunc/_unet-diffusion

    Args:
        shell: The shell to print the completions for.
    """
    import shtab

    print(shtab.complete(whole_parser(_add_options), shell))


def _add_options(parser: CommandParser, command: str) -> None:
    if command not in TRAINING:
        add_command(parser, command)
        return
    for option in FIT_OPTIONS:
        parser.add_argument(option)
    parser.add_argument("--config", choices=[recipe.name for recipe in all_recipes()])
