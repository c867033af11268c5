"""The page: runs of one kind, their tabs, and how it is served to this machine alone."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from unet_diffusion.explore.autoencoder_tab import autoencoder_tab
from unet_diffusion.explore.components import Values
from unet_diffusion.explore.denoiser_tabs import denoiser_tabs
from unet_diffusion.explore.record_tabs import record_tabs
from unet_diffusion.explore.request_form import RequestForm
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.segmenter_tab import segmenter_tab
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.segmenter import Segmenter

STYLE = """
.pixels img { image-rendering: pixelated; }
.status .error { color: #b91c1c; font-weight: 600; }
.status progress { width: 40%; margin-right: 0.8em; }
"""
KEPT = 3600  # seconds that the files of a page are kept
LARGEST_UPLOAD = "500mb"


def page_of(runs: Sequence[Run[Any]]) -> gr.Blocks:
    """The page of runs.

    Args:
        runs: The runs, at least one.

    Raises:
        ValueError: If the runs are not of one kind, or take different conditions.
    """
    check_alike(runs)
    names = [run.name for run in runs]
    title = ", ".join(names)
    with gr.Blocks(title=f"{title} - unet-diffusion", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(f"## {title}\n{runs[0].model}")
        which = gr.Dropdown(names, value=names[0], label="Run, for the tabs that show one", visible=len(runs) > 1,
                            elem_id="which")  # fmt: skip

        def chosen(values: Values) -> Run[Any]:
            return runs[names.index(values[which])]

        if isinstance(runs[0].model, Denoiser):
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    form = RequestForm(runs[0].model)
                    form.inputs.append(which)
                with gr.Column(scale=3), gr.Tabs():
                    denoiser_tabs(runs, form, chosen)
                    record_tabs(runs, chosen, [which])
        else:
            with gr.Tabs():
                (segmenter_tab if isinstance(runs[0].model, Segmenter) else autoencoder_tab)(runs)
                record_tabs(runs, chosen, [which])
    return page


def check_alike(runs: Sequence[Run[Any]]) -> None:
    """Refuse runs that cannot be shown side by side.

    Raises:
        ValueError: If their models are of different kinds, or denoisers take different conditions.
    """
    first, *others = runs
    for other in others:
        for name, of_first, of_other in zip(("models", "conditions"), _kind(first), _kind(other), strict=True):
            if of_first != of_other:
                raise ValueError(
                    f"runs side by side must have the same {name}, got {of_first} in {first.name} and {of_other} in "
                    f"{other.name}; explore them one by one"
                )


def _kind(run: Run[Any]) -> tuple[str, str]:
    model = run.model
    if not isinstance(model, Denoiser):
        return type(model).__name__.lower(), ""
    conditions = [type(condition).__name__ for condition in model.all_conditions]
    classes = [", ".join(model.class_names or [str(model.num_classes)])] if model.num_classes else []
    return "denoiser", ", ".join([*conditions, *classes]) or "none"


def serve(page: gr.Blocks, *, host: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until the process is interrupted; nothing is sent anywhere else.

    Args:
        page: The page.
        host: Address to listen at; 127.0.0.1 is this machine alone.
        port: Port to listen at; None: the first one from 7860 that is free.
        open_browser: Open the page in the browser of this machine.

    Raises:
        OSError: If the port is taken.
    """
    page.queue()
    system = ("system-ui", "sans-serif")  # the themes of Gradio would fetch fonts
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_UPLOAD,
        theme=gr.themes.Default(font=system, font_mono=("ui-monospace", "monospace")),
        css=STYLE,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
