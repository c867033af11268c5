import subprocess
import sys

import pytest

DRAWING = ["losses", "sampling", "sample_options", "drawing", "interop", "checkpoint", "pipelines.conditional"]
SEGMENTING = [
    "augmentation",
    "border_weights",
    "bridge",
    "features",
    "labels",
    "losses",
    "predict",
    "scores",
    "synthetic",
    "tiles",
]
FORBIDDEN = [  # what a module must not pull in, however indirectly
    ("lightning", [*DRAWING, *(f"segmentation.{name}" for name in SEGMENTING), "data.packing"]),
    ("diffusers", ["blocks", "unet", "schedule", "conditioning", "losses", "checkpoint", "speed", "start", "windows"]),
]
NOT_BEFORE_THE_FIRST_STEP = (  # each takes from half a second to three
    *("transformers", "diffusers", "accelerate", "torchmetrics", "torchvision", "matplotlib", "wandb", "tensorboard"),
    *("scipy.stats", "scipy.ndimage", "skimage.measure", "torch._inductor.compile_fx"),
)


def imported_by(code: str) -> set[str]:
    """The modules that a new process has after the code."""
    code = f"import sys\n{code}\nprint('modules:', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(out.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(("package", "modules"), FORBIDDEN)
def test_imports_point_one_way(package, modules):
    imports = "; ".join(f"import unet_diffusion.{module}" for module in modules)
    assert not {package, "lightning", "pytorch_lightning"} & imported_by(imports)
