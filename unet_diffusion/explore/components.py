"""What all tabs of the page share: buttons and their events, errors as messages, and command lines."""

import functools
import html
import re
import shlex
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Self

import gradio as gr

from unet_diffusion.runtime.messages import in_words

Values = dict[gr.components.Component, Any]
"""The value of each input of an event."""

Update = dict[gr.components.Component, Any]
"""The new value of some outputs of an event."""

_DOWNLOADS = tempfile.TemporaryDirectory(prefix="unet-diffusion-")
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # events are for the page, and no API to be listed


class StopFlag(Event):
    """Whether a visitor has asked for a stop; a copy, which Gradio makes for each visitor, is a flag of its own."""

    def __deepcopy__(self, memo: Any) -> "StopFlag":
        return StopFlag()


@dataclass(frozen=True)
class Controls:
    """The button that begins work on a model, the one that stops it, and a line that says how far it is."""

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
    trigger: Callable[..., Any],
    function: Callable[[Values], Update],
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
) -> None:
    """Call a function of the page, which computes nothing long, with the values of its inputs.

    Args:
        trigger: An event of a component, such as `button.click`.
        function: The function.
        inputs: The inputs.
        outputs: The components that the function may change.
    """

    @functools.wraps(function)
    def with_errors_shown(values: Values) -> Update:
        try:
            return function(values)
        except Exception as error:  # errors of all kinds end here, as one message
            raise gr.Error(message_of(error), title="", print_exception=False) from error

    trigger(with_errors_shown, inputs=set(inputs), outputs=list(outputs), show_progress="minimal", **PRIVATE)


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
                yield update
        except Exception as error:  # errors of all kinds end here, as one message
            yield {controls.status: f'<span class="error">{html.escape(message_of(error))}</span>'}

    # The flag falls when the button is pressed, so that a visitor can stop what still waits for its turn.
    pressed = controls.go.click(lambda flag: flag.clear(), inputs=[controls.flag], queue=False, **PRIVATE)
    pressed.then(
        until_stopped,
        inputs={*inputs, controls.flag},
        outputs=[controls.status, *outputs],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=[controls.status],
        **PRIVATE,
    )
    controls.stop.click(lambda flag: flag.set(), inputs=[controls.flag], queue=False, **PRIVATE)


def message_of(error: Exception) -> str:
    """The message of an error for a visitor, with uploads under the names that the visitor gave them."""
    uploads = re.escape(str(Path(tempfile.gettempdir()) / "gradio")) + r"/\w+/"
    return re.sub(uploads, "", in_words(error))


def progress_line(share: float, words: str) -> str:
    """HTML of a progress bar with words beside it.

    Args:
        share: The share that is done, 0 to 1.
        words: What is being done.
    """
    return f'<progress value="{share:.4f}" max="1"></progress> {words}'


def download_folder() -> Path:
    """A new folder for files that a visitor may download; it is removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_DOWNLOADS.name))


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
    bind(button.click, lambda values: {code: gr.Code(command(values), visible=True)}, inputs, [code])


def command_line(command: str, path: Path, options: dict[str, Any], *further: str) -> str:
    """A command line of this package.

    Args:
        command: The name of the command.
        path: Its model.
        options: Options by their names; True is a flag, and lists become several words.
        further: Arguments behind the model.
    """
    words = ["unet-diffusion", command, str(path), *further]
    for name, value in options.items():
        words.append(f"--{name}")
        if value is not True:
            words += [str(word) for word in (value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)
