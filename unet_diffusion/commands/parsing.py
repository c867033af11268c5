"""The command line of a function: jsonargparse reads its options from the signature and its help from the docstring.

A parameter without a default is a positional argument, or a required option where it is keyword-only; all others are
options. Three types have a form of their own on the command line: a bool is a flag, a list takes one or more words, and
a tuple takes as many as it has entries. `Annotated[Path, "DIR"]` names the value in the help.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser

from unet_diffusion.commands.parser_errors import in_short
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.messages import UsageError, did_you_mean

PROGRAM = "unet-diffusion"
COMMANDS = {  # the module of each command, and its function there
    "fit": "fit.fit",
    "check": "check.check",
    "validate": "fit.validate",
    "recipes": "recipes.list_recipes",
    "pack": "pack.pack",
    "encode": "encode.encode",
    "two-stages": "two_stages.two_stages",
    "sample": "sample.sample_images",
    "segment": "segment.segment",
    "synthesize": "synthesize.synthesize_pairs",
    "evaluate": "evaluate.evaluate_run",
    "explore": "explore.explore",
    "export": "export.export",
    "import": "import_pipeline.import_pipeline",
    "completion": "completion.completion",
}
ACTIONS = {"recipes": {"show": "recipes.show_recipe", "copy": "recipes.copy_recipe"}}  # of commands that have several
TRAINING = ("fit", "check", "validate")  # Lightning's command line parses their arguments
ACTION = "action"  # key of the parsed action
TRACEBACK = "traceback"  # an option of every command


class CommandHelp(argparse.HelpFormatter):
    """Help that keeps indented lines of a description, such as examples, and ends each option with its default."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else super(CommandHelp, self)._fill_text(part, width, indent)
            for part in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        is_off = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help or "" if is_off else f"{action.help or ''} (default: %(default)s)"


class CommandParser(ArgumentParser):
    """The parser of a command; it raises its errors as one sentence."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": CommandHelp, "allow_abbrev": False, **options})

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument of the command line.

        Args:
            names: The names of the option, or the name of a positional argument.
            options: The options of argparse. jsonargparse adds parameters of a function through this method.
        """
        annotation = getattr(options.get("action"), "_typehint", options.get("type"))
        if annotation is not None:
            options = {key: value for key, value in options.items() if key not in ("action", "type")}
            options |= _on_the_command_line(annotation)
            names = tuple(name for name in names if not name.endswith("+"))  # jsonargparse's way to lengthen a list
            if not names[0].startswith("-"):
                options.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error of the command line; argparse and jsonargparse call this.

        Args:
            message: The message of the parser.
            ex: The error behind it.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{self._sentence(message)}; {self.prog} --help says more") from ex

    def _sentence(self, message: str) -> str:
        if unknown := re.search(r"nrecognized arguments: (\S+)", message):
            command = self.prog.removeprefix(f"{PROGRAM} ")
            return f"{command} takes no {unknown[1]}{did_you_mean(unknown[1], self._option_string_actions)}"
        if required := re.search(r"arguments are required: (.*)", message):
            words = [word.rpartition(".")[2] for word in required[1].split(", ")]
            names = [f"--{word}" if f"--{word}" in self._option_string_actions else word.upper() for word in words]
            return f"{', '.join(names)} must be given"
        if refused := re.fullmatch(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            similar = did_you_mean(refused[2], re.findall(r"[\w-]+", refused[3]))
            return f"{refused[1]} must be one of {refused[3].replace(chr(39), '')}, got {refused[2]}{similar}"
        if number := re.fullmatch(r"argument (\S+): expected (?:at least )?(\w+) arguments?", message):
            return f"{number[1]} must be followed by {number[2]} value{'' if number[2] == 'one' else 's'}"
        if message.startswith("Parser key "):
            message = re.sub(r" element \d+:", ":", message, count=1)
            return f"--{in_short(re.sub(r'Got value: *$', 'Got value: (nothing)', message), [])}"
        return re.sub(r"^argument (\S+): ", r"\1 ", message)


def _on_the_command_line(annotation: Any) -> dict[str, Any]:
    """The options of argparse for a parameter of this type."""
    options: dict[str, Any] = {}
    arguments = [one for one in get_args(annotation) if one is not NoneType]
    if NoneType in get_args(annotation) and get_origin(annotation) is not Annotated:
        (annotation,) = arguments
    if get_origin(annotation) is Annotated:
        annotation, name = get_args(annotation)
        words = name.split()
        options["metavar"] = words[0] if len(words) == 1 else tuple(words)
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is list:
        return {**options, "action": "extend", "nargs": "+", **_on_the_command_line(get_args(annotation)[0])}
    if get_origin(annotation) is tuple:
        return {**options, "nargs": len(get_args(annotation)), "type": get_args(annotation)[0]}
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return {**options, "choices": choices, "type": type(choices[0])}
    return {**options, "type": {Path: _path, Path | str: _path_or_hub_name}.get(annotation, annotation)}


def _path(text: str | Path) -> Path:
    if not str(text).strip():
        raise argparse.ArgumentTypeError("must be a path, and is empty; . is the current folder")
    return Path(text)


def _path_or_hub_name(text: str | Path) -> Path | str:
    return str(text) if is_hub_name(text) else _path(text)


_path.__name__ = _path_or_hub_name.__name__ = "path"  # argparse names it in messages


def function_of(name: str) -> Callable[..., None]:
    """The function of a command.

    Args:
        name: Its module in this package and its name there, such as "pack.pack".
    """
    module, _, function = name.partition(".")
    found: Callable[..., None] = getattr(import_module(f"unet_diffusion.commands.{module}"), function)
    return found


def command_parser(command: str) -> CommandParser:
    """The parser of a command.

    Args:
        command: Its name on the command line.
    """
    parser = CommandParser(prog=f"{PROGRAM} {command}")
    add_command(parser, command)
    return parser


def add_command(parser: CommandParser, command: str) -> None:
    """Add the arguments and the description of a command to its parser.

    Args:
        parser: The parser.
        command: The name of the command on the command line.
    """
    _add_function(parser, function_of(COMMANDS[command]))
    if command in ACTIONS:
        options = {"title": "actions", "description": None, "metavar": "ACTION"}
        actions = parser.add_subcommands(required=False, dest=ACTION, **options)
        for action, name in ACTIONS[command].items():
            added, function = CommandParser(prog=f"{parser.prog} {action}"), function_of(name)
            _add_function(added, function)
            actions.add_subcommand(action, added, help=summary(function))


def _add_function(parser: CommandParser, function: Callable[..., None]) -> None:
    parser.description = re.split(r"\n\n(?:Args|Raises):", inspect.getdoc(function) or "")[0]
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    if TRACEBACK not in inspect.signature(function).parameters:
        parser.add_argument(f"--{TRACEBACK}", action="store_true", help="Show where an error came from.")


def summary(function: Callable[..., None]) -> str:
    """The first sentence of a function's docstring, without its full stop."""
    return (inspect.getdoc(function) or "").splitlines()[0].removesuffix(".")


def parsed(command: str, words: Sequence[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function to call and its arguments.

    Args:
        command: Name of the command.
        words: What follows it on the command line.

    Raises:
        UsageError: If there is no such option, or a value does not fit.
    """
    name = COMMANDS[command]
    takes_data = "data" in inspect.signature(function_of(name)).parameters
    parser = command_parser(command)
    values = parser.instantiate(parser.parse_args(_with_data_options(words) if takes_data else list(words)))
    if action := values.get(ACTION):
        name, values = ACTIONS[command][action], values[action]
    function = function_of(name)
    return function, {parameter: values[parameter] for parameter in inspect.signature(function).parameters}


def _with_data_options(words: Sequence[str]) -> list[str]:
    """The words with --data root=DIR in place of --data.root DIR, as `fit` has it."""
    result, name = list[str](), ""
    for word in words:
        if word.startswith("--data."):
            name, _, value = word.removeprefix("--data.").partition("=")
            result += ["--data", f"{name}={value}"] if value else ["--data"]
            name = "" if value else name
        else:
            result.append(f"{name}={word}" if name else word)
            name = ""
    return result


def whole_parser(add: Callable[[CommandParser, str], None] = lambda parser, command: None) -> CommandParser:
    """The parser of all commands, for the list of commands and for completion.

    Args:
        add: A function that adds the arguments of a command to its parser; the list of commands needs none.
    """
    parser = CommandParser(
        prog=PROGRAM,
        description="Train a U-Net to denoise or to segment images, draw images or masks, exchange with diffusers.",
        epilog="Every command has --help, and takes --traceback to show where an error came from.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subcommands(dest="command", title="commands", description=None, metavar="COMMAND")
    for command, name in COMMANDS.items():
        added = CommandParser(prog=f"{PROGRAM} {command}")
        commands.add_subcommand(command, added, help=summary(function_of(name)))
        add(added, command)
    return parser
