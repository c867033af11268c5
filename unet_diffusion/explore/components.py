"""What all tabs of the page share: buttons and their events, errors as messages, command lines, files to download."""

import functools
import html
import logging
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Self

import gradio as gr
from gradio.utils import get_upload_folder

from unet_diffusion.explore.live import Update
from unet_diffusion.runtime.messages import UNEXPECTED, in_words

LOG = logging.getLogger(__name__)
Values = dict[gr.components.Component, Any]
"""The value of each input of an event."""

FILE_LIFETIME = 3600  # seconds that uploads and downloads are kept
DOWNLOADS = "downloads"  # folder in that of uploads, which is removed with it
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # events are for the page, and no API to be listed


class StopFlag(Event):
    """Whether a visitor has asked for a stop; a copy, which Gradio makes for each visitor, is a flag of its own."""

    def __deepcopy__(self, memo: Any) -> "StopFlag":
        return StopFlag()


@dataclass(frozen=True)
class Controls:
    """What work on a model is controlled by.

    Args:
        go: The button that begins the work.
        stop: The button that stops it.
        status: The line that says how far it is.
        flag: The StopFlag of the visitor's last press of `go`.
    """

    go: gr.Button
    stop: gr.Button
    status: gr.HTML
    flag: gr.State

    @classmethod
    def named(cls, label: str) -> Self:
        """Controls in a row.

        Args:
            label: The words on the button that begins.
        """
        with gr.Row():
            go, stop = gr.Button(label, variant="primary"), gr.Button("Stop")
        return cls(go, stop, gr.HTML(elem_classes="status"), gr.State(StopFlag()))


def bind(
    triggers: Sequence[Callable[..., Any]],
    function: Callable[[Values], Update],
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
) -> None:
    """Call a function of the page, which computes nothing long, with the values of its inputs.

    Args:
        triggers: Events of components, such as `button.click`.
        function: The function.
        inputs: The inputs.
        outputs: The components that the function may change.
    """

    @functools.wraps(function)
    def with_errors_shown(values: Values) -> Update:
        try:
            return function(values) or gr.skip()
        except Exception as error:  # errors of all kinds end here, as one message
            raise gr.Error(message_of(error), title="", print_exception=False) from error

    gr.on(
        list(triggers),
        with_errors_shown,
        inputs=set(inputs),
        outputs=list(outputs),
        show_progress="minimal",
        trigger_mode="always_last",
        **PRIVATE,
    )


def bind_work(
    controls: Controls,
    work: Callable[[Values], Generator[Update, None, None]],
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
) -> None:
    """Do work on a model when its button is pressed; visitors take turns, and whoever began it may stop it.

    Args:
        controls: The buttons and the status line, which the work may change, too.
        work: Generator of updates.
        inputs: The inputs.
        outputs: The components that the work may change.
    """

    @functools.wraps(work)
    def until_stopped(values: Values) -> Iterator[Update]:
        flag, updates = values[controls.flag], work(values)
        try:
            for update in updates:
                if flag.is_set():
                    updates.close()
                    yield {controls.status: "Stopped."}
                    return
                yield update or gr.skip()
        except Exception as error:  # errors of all kinds end here, as one message
            yield {controls.status: f'<span class="error">{html.escape(message_of(error))}</span>'}

    def begin(flag: StopFlag) -> StopFlag:
        flag.set()  # who presses again wants the new request, and not both
        return StopFlag()

    # The flag is there before the work has its turn, so that a visitor can stop what still waits.
    pressed = controls.go.click(begin, inputs=[controls.flag], outputs=[controls.flag], queue=False, **PRIVATE)
    pressed.then(
        until_stopped,
        inputs={*inputs, controls.flag},
        outputs=[controls.status, *outputs],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=[controls.status],
        trigger_mode="multiple",
        **PRIVATE,
    )
    controls.stop.click(lambda flag: flag.set(), inputs=[controls.flag], queue=False, **PRIVATE)


def message_of(error: Exception) -> str:
    """The message of an error for a visitor, with uploads under the names that the visitor gave them.

    Args:
        error: The error; one that was not foreseen is logged with its traceback.
    """
    if isinstance(error, UNEXPECTED):
        LOG.error("not foreseen", exc_info=error)
    folder = Path(get_upload_folder())
    uploads = "|".join({re.escape(str(folder)), re.escape(str(folder.resolve()))})
    return re.sub(rf"(?:{uploads})/\w+/", "", in_words(error))


def progress_line(share: float, words: str) -> str:
    """HTML of a progress bar with words beside it.

    Args:
        share: The share that is done, 0 to 1.
        words: What is being done.
    """
    return f'<progress value="{share:.4f}" max="1"></progress> {html.escape(words)}'


def download_folder() -> Path:
    """A new folder for files that a visitor may download; folders of an hour ago are removed."""
    downloads = Path(get_upload_folder()) / DOWNLOADS
    downloads.mkdir(parents=True, exist_ok=True)
    for folder in downloads.iterdir():
        if time.time() - folder.stat().st_mtime > FILE_LIFETIME:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=downloads))


def command_code() -> gr.Code:
    """A place for a command line, which appears with it."""
    return gr.Code(language="shell", label="The same from the command line", visible=False, interactive=False, lines=1)


def command_box(inputs: Sequence[gr.components.Component], command: Callable[[Values], str]) -> None:
    """A button that shows the command that does the same.

    Args:
        inputs: The inputs of the command.
        command: Function that gives the command line.
    """
    button, code = gr.Button("Command line", size="sm"), command_code()
    bind([button.click], lambda values: {code: gr.Code(command(values), visible=True)}, inputs, [code])


def command_line(command: str, path: Path, options: Mapping[str, Any], *further: str) -> str:
    """A command line of this package.

    Args:
        command: The name of the command.
        path: Its model.
        options: Options by their names; True is a flag, and lists become several words.
        further: Arguments behind the model.
    """
    words = ["unet-diffusion", command, str(path), *further]
    for name, value in options.items():
        values = [] if value is True else [str(one) for one in (value if isinstance(value, list | tuple) else [value])]
        if any(re.match(r"-\D", word) for word in values):  # it would be read as an option
            words += [f"--{name}={word}" for word in values]
        else:
            words += [f"--{name}", *values]
    return shlex.join(words)
