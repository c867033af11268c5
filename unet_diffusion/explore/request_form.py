"""The form of what a denoiser draws: conditions, seed, steps, scheduler and guidance, as its options allow."""

from dataclasses import fields
from pathlib import Path
from random import randrange
from typing import Any

import gradio as gr

from unet_diffusion.diffusion.sampling import supported_schedulers
from unet_diffusion.explore.components import Values, bind, command_line
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import SampleOptions

OF_THE_FORM = ("labels", "captions", "noise_level", "image", "mask")  # options of conditions with a field of their own
FEW, MANY, MOST = 4, 16, 64  # images drawn at once: of large images, of small ones, and at most
LARGE = 64 * 64  # pixels of an image of which few are drawn
MOST_PIXELS = 2**21  # of images that are drawn at once: 8 of 512 x 512
LARGEST_SEED = 2**31


class RequestForm:
    """The fields of a request. It is built where its column is.

    Args:
        denoiser: The denoiser whose options are asked for.
        which: The choice of a run, for tabs that show one.

    Attributes:
        inputs: The fields and the choice of a run, for the inputs of events.
    """

    def __init__(self, denoiser: Denoiser, which: gr.components.Component) -> None:
        self.denoiser, self.which = denoiser, which
        asked = {option for condition in denoiser.all_conditions for option in condition.options}
        self.inputs = [which]
        self.labels = self._labels() if denoiser.num_classes else None
        self.captions = None
        if "captions" in asked:
            self.captions = self._add(
                gr.Textbox(label="Captions", info="One in a line; they take turns.", lines=2, elem_id="captions")
            )
        files = {option for condition in denoiser.all_conditions for option in condition.files}
        self.own = {
            name: self._add(_field_of(name, is_file=name in files)) for name in sorted(asked.difference(OF_THE_FORM))
        }
        height, width = denoiser.image_shape[1:]
        count = FEW if height * width > LARGE else MANY
        count = 2 * denoiser.num_classes if count == MANY and 1 < denoiser.num_classes <= MANY else count
        self.num_images = self._add(gr.Slider(1, MOST, count, step=1, label="Images", elem_id="num_images"))
        with gr.Row():
            self.seed = self._add(gr.Number(0, precision=0, label="Seed", elem_id="seed"))
            other_seed = gr.Button("Another seed", size="sm", min_width=60)
        bind([other_seed.click], lambda values: {self.seed: randrange(LARGEST_SEED)}, [], [self.seed])
        schedulers = supported_schedulers(denoiser.schedule)
        default = SampleOptions().scheduler
        self.scheduler = self._add(
            gr.Dropdown(
                [(name.removesuffix("Scheduler"), name) for name in schedulers],
                value=default if default in schedulers else schedulers[0],
                label="Scheduler",
            )
        )
        last = denoiser.schedule.num_train_timesteps
        self.steps = self._add(gr.Slider(1, min(last, 250), 25, step=1, label="Steps", elem_id="steps"))
        self.noise_level = None
        if "noise_level" in asked:
            self.noise_level = self._add(gr.Slider(0, 350, 20, step=1, label="Noise added to the small image"))
        self.guidance_scale: gr.components.Component | None = None
        self.interval: tuple[gr.components.Component, gr.components.Component] | None = None
        if any(condition.has_null for condition in denoiser.all_conditions):
            self._add_guidance(last)

    def options(self, values: Values, **further: Any) -> SampleOptions:
        """The request of a visitor.

        Args:
            values: The values of the fields.
            further: Options beside the form's, which replace the form's.
        """
        options: dict[str, Any] = {
            "num_images": int(values[self.num_images]),
            "seed": int(values[self.seed] or 0),
            "scheduler": values[self.scheduler],
            "num_inference_steps": int(values[self.steps]),
        }
        if self.labels is not None and values[self.labels]:
            options["labels"] = list(values[self.labels])
        if self.captions is not None:
            options["captions"] = [line.strip() for line in (values[self.captions] or "").splitlines() if line.strip()]
            options["captions"] = options["captions"] or [""]  # a caption without words
        if self.noise_level is not None:
            options["noise_level"] = int(values[self.noise_level])
        own = {name: values[field] for name, field in self.own.items() if values[field]}
        if own:
            options["conditions"] = own
        if self.guidance_scale is not None and values[self.guidance_scale] != 1:
            options["guidance_scale"] = float(values[self.guidance_scale])
            options |= self._interval_of(values)
        options |= further
        _, height, width = self.denoiser.image_shape
        at_once = max(1, MOST_PIXELS // (height * width))
        return SampleOptions(**options, batch_size=min(options["num_images"], at_once))

    def _interval_of(self, values: Values) -> dict[str, Any]:
        assert self.interval is not None
        low, high = (int(values[end]) for end in self.interval)
        everywhere = (0, self.denoiser.schedule.num_train_timesteps - 1)
        return {} if (low, high) == everywhere else {"guidance_interval": (low, high)}

    def _labels(self) -> gr.components.Component:
        names = self.denoiser.class_names or [str(number) for number in range(self.denoiser.num_classes)]
        choices = [(name, number) for number, name in enumerate(names)]
        return self._add(
            gr.Dropdown(
                choices, multiselect=True, label="Classes", info="They take turns; none means all.", elem_id="labels"
            )
        )

    def _add_guidance(self, num_train_timesteps: int) -> None:
        self.guidance_scale = self._add(
            gr.Slider(
                0,
                15,
                1,
                step=0.1,
                label="Guidance",
                info="1 is off; more follows the condition more closely.",
                elem_id="guidance",
            )
        )
        last = num_train_timesteps - 1
        with gr.Accordion("Guide only some timesteps", open=False):
            self.interval = (
                self._add(gr.Slider(0, last, 0, step=1, label="From timestep")),
                self._add(gr.Slider(0, last, last, step=1, label="To timestep", info=f"{last} is almost pure noise.")),
            )

    def _add(self, component: gr.components.Component) -> gr.components.Component:
        self.inputs.append(component)
        return component


def _field_of(name: str, *, is_file: bool) -> gr.components.Component:
    """The field of an option that the form does not know."""
    label = name.replace("_", " ")
    if is_file:
        return gr.File(label=f"{label}: drop a file here", type="filepath", height=110, elem_id=f"option_{name}")
    return gr.Textbox(label=label)


def _without_folder(value: str) -> str:
    """The name of a visitor's file, which lies elsewhere on the visitor's machine; other values as they are."""
    return Path(value).name if Path(value).is_file() else value


def needed_images(denoiser: Denoiser) -> set[str]:
    """Those of image and mask that the denoiser needs; other files are fields of the form.

    Args:
        denoiser: The denoiser.
    """
    return {"image", "mask"} & {need for condition in denoiser.all_conditions for need in condition.needs}


def sample_command(run: Run[Denoiser], options: SampleOptions, output: str = "generated", **files: str) -> str:
    """The command line that draws the images of a request.

    Args:
        run: The run of the denoiser.
        options: The request.
        output: The folder to write.
        files: The files of images, by the option.
    """
    words: dict[str, Any] = {}
    for option in fields(SampleOptions):
        value = getattr(options, option.name)
        if option.name in ("image", "mask", "conditions", "batch_size") or value in (option.default, None):
            continue
        words[option.name] = value
    words.setdefault("num_images", options.num_images)
    if options.conditions:
        words["condition"] = [f"{name}={_without_folder(value)}" for name, value in options.conditions.items()]
    return command_line("sample", run.path, words | files | {"output": output} | dict(run.options))
