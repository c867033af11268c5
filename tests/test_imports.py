import gc
import subprocess
import sys
from importlib import import_module

import pytest

from unet_diffusion.runtime.imports import quick_imports

DRAWING = [
    *("diffusion.losses", "diffusion.sampling", "diffusers_io.exporting", "diffusers_io.importing"),
    *("diffusers_io.pipelines.conditional", "inference.denoiser", "inference.loading", "inference.reading"),
    *("inference.drawing", "inference.record", "inference.sample_options", "inference.segment_files"),
]
SEGMENTING = [
    "augmentation",
    "border_weights",
    "features",
    "labels",
    "losses",
    "prediction",
    "scores",
    "synthetic",
    "tiles",
    "transfer",
]
FORBIDDEN = [  # what a module must not pull in, however indirectly
    pytest.param(
        "lightning",
        [*DRAWING, *(f"segmentation.{name}" for name in SEGMENTING), "data.packing"],
        marks=pytest.mark.slow,
    ),
    (
        "diffusers",
        [
            *("models.denoiser_unet", "models.segmentation_unet", "models.speed", "inference.record"),
            *("diffusion.conditions.condition", "diffusion.image_to_image", "diffusion.losses", "diffusion.schedule"),
            "diffusion.tiling",
        ],
    ),
]
HEAVY = {  # each takes from half a second to several
    *("transformers", "diffusers", "accelerate", "sklearn", "torchvision", "wandb", "tensorboard", "s3fs"),
    *("torchmetrics.functional", "scipy.stats", "scipy.signal", "scipy.ndimage", "skimage.measure"),
    "torch._inductor.compile_fx",
}
RUN = """
from unet_diffusion.commands.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
"""
FIRST_STEP = (
    """
from unet_diffusion.runtime.imports import import_lightning
import_lightning()
from unet_diffusion.training.base import NetworkModule
step = NetworkModule.optimizer_step
def first_step(self, *arguments, **options):
    step(self, *arguments, **options)
    print("modules:", *sys.modules, flush=True)
    os._exit(0)
NetworkModule.optimizer_step = first_step
"""
    + RUN
)


def imported_by(code: str, *arguments: object) -> set[str]:
    """The modules that a new process has after the code."""
    code = f"import os, sys\n{code}\nprint('modules:', *sys.modules)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(out.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(("package", "modules"), FORBIDDEN)
def test_imports_point_one_way(package, modules):
    imports = "; ".join(f"import unet_diffusion.{module}" for module in modules)
    assert not {package, "lightning", "pytorch_lightning"} & imported_by(imports)


def test_the_package_by_itself_imports_nothing():
    ours = {name for name in imported_by("import unet_diffusion") if name.startswith("unet_diffusion")}
    assert ours == {"unet_diffusion"}


COMMANDS = (
    "fit validate check recipes pack encode two-stages sample segment synthesize evaluate export import completion"
)


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "recipes",
        "completion bash",
        *(f"{command} --help" for command in COMMANDS.split()[3:]),
        "sampel",
        "sample none.ckpt",
        "sample . --scheduler Euler",
        "segment none images --output masks",
        "synthesize none --labels none --num_labels 1 --output pairs",
        "evaluate none",
        "evaluate . --scheduler Euler",
        "encode none none --output latents",
        "pack none shards",
        "two-stages none --output run",
        "export none pipeline",
        "fit --config digitz",
        "fit --config folder --data.root none",
        "fit --config digits --modle.lr 3",
        "fit --config digits --ckpt_path none",
        "validate --config digits --ckpt_path none",
        "check --config folder --data.root none",
    ],
)
def test_help_and_what_is_wrong_at_sight_need_no_torch(arguments):
    assert not {"torch", "numpy", "lightning"} & imported_by(RUN, *arguments.split())


@pytest.mark.slow
def test_help_of_fit_and_a_misspelt_option_import_only_what_parses():
    for arguments in ("fit --help", "fit --config digits --model.ema_decai 0.5"):
        imported = imported_by(RUN, *arguments.split())
        assert "lightning" in imported
        assert not HEAVY & imported


@pytest.mark.slow
def test_first_step_of_the_digits_imports_nothing_that_it_does_not_use(tmp_path):
    options = "--model.speed=plain --trainer.precision=32-true --trainer.accelerator=cpu --trainer.max_steps=1"
    run = f"--trainer.default_root_dir={tmp_path}"
    imported = imported_by(FIRST_STEP, "fit", "--config", "digits", *options.split(), run)
    assert "unet_diffusion.training.module" in imported
    assert not (HEAVY - {"s3fs"}) & imported  # which Lightning looks for where it is installed


def test_garbage_is_collected_again_after_the_imports_even_if_they_fail():
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        with pytest.raises(ModuleNotFoundError), quick_imports():
            import_module("unet_diffusion.no_such_module")
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.slow
def test_torchmetrics_is_whole_when_it_is_asked_for():
    code = """
from unet_diffusion.runtime.imports import import_lightning
import_lightning()
assert "torchmetrics.classification" not in sys.modules
import torchmetrics
from lightning.pytorch.core import module
assert issubclass(torchmetrics.Accuracy, module.Metric)
from torchmetrics.functional.image import structural_similarity_index_measure
assert torchmetrics.utilities.data and torchmetrics.functional.accuracy
"""
    assert "torchmetrics.classification" in imported_by(code)
