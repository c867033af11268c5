"""The command line `unet-diffusion COMMAND`: it parses the arguments, calls the command and gives the exit status.

Each command is a function in a file of its own. Every error is one message; `--traceback` shows where it came from.
PyTorch takes seconds to import, so a command imports it only after its arguments are known to be right.
"""

import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from unet_diffusion.commands.parsing import COMMANDS, TRACEBACK, TRAINING, function_of, parsed, whole_parser
from unet_diffusion.runtime.messages import UsageError, did_you_mean, in_words, printable
from unet_diffusion.runtime.shareable import without_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 wrong usage.

    A command that is interrupted ends with 130 (SIGINT) or 143 (SIGTERM). `fit` saves first, and the same command
    continues from there.

    Args:
        arguments: The arguments without the program's name; None: those of this process.
    """
    if arguments is None:
        os.environ["PYTHONSAFEPATH"] = "1"  # processes that this one starts import nothing from the current folder
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot spell does not end a run
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = f"--{TRACEBACK}" in words
    return exit_status(lambda: _run(words, show_traceback=show_traceback), show_traceback=show_traceback)


def exit_status(run: Callable[[], None], *, show_traceback: bool) -> int:
    """Carry out a command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        run: The command.
        show_traceback: Raise errors instead of printing their messages.
    """
    try:
        run()
    except UsageError as error:
        if show_traceback:
            raise
        print(printable(f"unet-diffusion: error: {without_secrets(str(error))}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unet-diffusion: stopped", file=sys.stderr)
        return 130  # as shells report it
    except Exception as error:  # errors of all kinds end here, as one message
        if show_traceback:
            raise
        print(printable(f"unet-diffusion: error: {without_secrets(in_words(error))}"), file=sys.stderr)
        print("(--traceback shows where it came from)", file=sys.stderr)
        return 1
    return 0


def _run(arguments: list[str], *, show_traceback: bool) -> None:
    words = [word for word in arguments if word != f"--{TRACEBACK}"]
    if not words:
        raise UsageError("a command must follow, such as unet-diffusion fit --config digits; --help lists them")
    command, *rest = words
    if command in ("-h", "--help"):
        whole_parser().print_help()
    elif command == "--version":
        from unet_diffusion import __version__

        print(f"unet-diffusion {__version__}")
    elif command in TRAINING:
        function_of(COMMANDS[command])(rest)
    elif command in COMMANDS:
        function, values = parsed(command, [*rest, f"--{TRACEBACK}"] if show_traceback else rest)
        function(**values)
    elif command.startswith("-"):
        raise UsageError(f"options follow the command, got {command} before it; unet-diffusion --help lists both")
    else:
        similar = did_you_mean(command, COMMANDS) or "; unet-diffusion --help lists them"
        raise UsageError(f"there is no command {command!r}{similar}")


if __name__ == "__main__":
    sys.exit(main())
