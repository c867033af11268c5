"""The page: runs of one kind, their tabs, and how it is served to this machine alone."""

import html
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from unet_diffusion.diffusion.sampling import supported_schedulers
from unet_diffusion.explore.attention import has_words
from unet_diffusion.explore.autoencoder_tab import autoencoder_tab
from unet_diffusion.explore.components import FILE_LIFETIME, Values
from unet_diffusion.explore.denoiser_tabs import denoiser_tabs
from unet_diffusion.explore.record_tabs import record_tabs
from unet_diffusion.explore.request_form import RequestForm
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.segmenter_tab import SegmenterTab
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.segmenter import Segmenter

STYLE = """
.pixels img { image-rendering: pixelated; }
.status .error { color: #b91c1c; font-weight: 600; }
.status progress { width: 40%; margin-right: 0.8em; }
"""
LARGEST_UPLOAD = "500mb"
UPLOADS = "GRADIO_TEMP_DIR"  # Gradio's variable; components read it when they are made


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
    lifetime = (FILE_LIFETIME, FILE_LIFETIME)
    with gr.Blocks(title=f"{title} - unet-diffusion", analytics_enabled=False, delete_cache=lifetime) as page:
        gr.HTML(f"<h2>{html.escape(title)}</h2><p>{html.escape(repr(runs[0].model))}</p>")
        which = gr.Dropdown(names, value=names[0], label="Run, for the tabs that show one", visible=len(runs) > 1,
                            elem_id="which")  # fmt: skip

        def chosen(values: Values) -> Run[Any]:
            return runs[names.index(values[which])]

        if isinstance(runs[0].model, Denoiser):
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    form = RequestForm(runs[0].model, which)
                with gr.Column(scale=3), gr.Tabs():
                    denoiser_tabs(runs, form, chosen)
                    record_tabs(runs, chosen, which)
        else:
            with gr.Tabs():
                (SegmenterTab if isinstance(runs[0].model, Segmenter) else autoencoder_tab)(runs)
                record_tabs(runs, chosen, which)
    return page


def check_alike(runs: Sequence[Run[Any]]) -> None:
    """Refuse runs that cannot be shown side by side, as one form is for all.

    Args:
        runs: The runs.

    Raises:
        ValueError: If their models are of different kinds, or denoisers differ in what may be asked of them.
    """
    first, *others = runs
    for other in others:
        for name, of_first in _traits(first).items():
            of_other = _traits(other).get(name)
            if of_first != of_other:
                raise ValueError(
                    f"runs side by side must have the same {name}, got {of_first} in {first.name} and {of_other} in "
                    f"{other.name}; explore them one by one"
                )


def _traits(run: Run[Any]) -> dict[str, str]:
    """What runs side by side must have in common, in words."""
    model = run.model
    if not isinstance(model, Denoiser):
        return {"kind of model": type(model).__name__.lower()}
    conditions = [
        type(condition).__name__ + ("" if condition.has_null else " without dropout")
        for condition in model.all_conditions
    ]
    classes = model.class_names or ([str(model.num_classes)] if model.num_classes else [])
    return {
        "kind of model": "denoiser",
        "conditions": ", ".join(conditions) or "none",
        "classes": ", ".join(classes) or "none",
        "image size": "x".join(map(str, model.image_shape)),
        "attention to words": str(has_words(model)),
        "number of timesteps": str(model.schedule.num_train_timesteps),
        "schedulers": ", ".join(supported_schedulers(model.schedule)),
    }


@contextmanager
def served(runs: Sequence[Run[Any]], *, host: str, port: int | None, open_browser: bool) -> Iterator[str]:
    """Serve the page of runs within the block, whose value is its address; uploads are removed behind it.

    Args:
        runs: The runs, at least one.
        host: Address to listen at; 127.0.0.1 is this machine alone.
        port: Port to listen at; None: the first one from 7860 that is free.
        open_browser: Open the page in the browser of this machine.

    Raises:
        OSError: If the port is taken.
        ValueError: If the runs cannot be shown side by side.
    """
    system = ("system-ui", "sans-serif")  # the themes of Gradio would fetch fonts
    with _folder_of_uploads():
        page = page_of(runs)
        page.queue()
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
        try:
            yield page.local_url
        finally:
            page.close(verbose=False)


@contextmanager
def _folder_of_uploads() -> Iterator[None]:
    """A folder for what visitors of pages made within the block drop and download; it is removed behind the block."""
    before = os.environ.get(UPLOADS)
    with tempfile.TemporaryDirectory(prefix="unet-diffusion-", ignore_cleanup_errors=True) as folder:
        os.environ[UPLOADS] = folder
        try:
            yield
        finally:
            del os.environ[UPLOADS]
            if before is not None:
                os.environ[UPLOADS] = before
