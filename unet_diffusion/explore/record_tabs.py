"""Tabs of what a run wrote: curves of its metrics, the page of its evaluation, and its configuration."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from unet_diffusion.explore.components import Update, Values, bind
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import curves
from unet_diffusion.runtime.shareable import without_secrets

FRAME = "width: 100%; height: 80vh; border: 0; background: white"
NOTHING_ELSE = (  # the page holds its pictures itself
    '<meta http-equiv="Content-Security-Policy" content="default-src data:; style-src \'unsafe-inline\'">'
)


def record_tabs(runs: Sequence[Run[Any]], chosen: Callable[[Values], Run[Any]], which: gr.Dropdown) -> None:
    """The tabs of what runs wrote.

    Args:
        runs: All runs, whose curves are shown together.
        chosen: Function that gives the run that a visitor has chosen.
        which: The choice of a run, the input of `chosen`.
    """
    with gr.Tab("Curves", id="curves") as tab:
        refresh = gr.Button("Read again", size="sm")
        plots = gr.Image(
            type="pil",
            format="png",
            interactive=False,
            show_label=False,
            buttons=["download", "fullscreen"],
            elem_id="plots",
        )
        words = gr.Markdown()

        def drawn(values: Values) -> Update:
            plot = curves({run.name: run.history for run in runs})
            missing = "These runs wrote no metrics: they were trained without logger.csv, or are no run folders."
            return {plots: gr.Image(plot, visible=plot is not None), words: missing if plot is None else ""}

        bind([tab.select], drawn, [which], [plots, words])
        bind([refresh.click], drawn, [which], [plots, words])

    with gr.Tab("Evaluation", id="evaluation") as tab:
        page = gr.HTML(elem_id="evaluation_page")
        bind([tab.select, which.change], lambda values: {page: _evaluation(chosen(values))}, [which], [page])

    with gr.Tab("Configuration", id="configuration") as tab:
        summary = gr.HTML()
        settings = gr.Code(language="yaml", label="config.yaml", interactive=False, elem_id="configuration_text")

        def configured(values: Values) -> Update:
            run = chosen(values)
            about = html.escape(f"{run.name}: {run.model!r}")
            return {summary: about, settings: without_secrets(run.configuration or "# There is no config.yaml.")}

        bind([tab.select, which.change], configured, [which], [summary, settings])


def _evaluation(run: Run[Any]) -> str:
    """The page that `evaluate` wrote, in a frame that runs no script and fetches nothing; or how to get one."""
    path, name = run.evaluation_page, html.escape(run.name)
    if path is None:
        return f"<p>There is no evaluation yet: <code>unet-diffusion evaluate {name}</code></p>"
    text = html.escape(NOTHING_ELSE + path.read_text(encoding="utf-8"), quote=True)
    return f'<p>{name}</p><iframe sandbox="" srcdoc="{text}" style="{FRAME}"></iframe>'
