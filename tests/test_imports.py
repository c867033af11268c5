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
    "scores",
    "synthetic",
    "tiles",
]
FORBIDDEN = [  # what a module must not pull in, however indirectly
    ("lightning", [*DRAWING, *(f"segmentation.{name}" for name in SEGMENTING)]),
    ("diffusers", ["blocks", "unet", "schedule", "conditioning", "losses", "checkpoint", "speed", "start", "windows"]),
]


@pytest.mark.parametrize(("package", "modules"), FORBIDDEN)
def test_imports_point_one_way(package, modules):
    imports = "; ".join(f"import unet_diffusion.{module}" for module in modules)
    code = f"import sys; {imports}; assert not {{'{package}', 'lightning', 'pytorch_lightning'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
