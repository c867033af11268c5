"""Two real processes of torchrun evaluate a segmenter and an autoencoder as one does."""

import json
import sys
from pathlib import Path

import pytest
from forked import run_python

pytestmark = pytest.mark.slow

PROGRAM = """
import json
import os
import sys

import torch

from unet_diffusion.data import Digits, ImageDataModule, SegmentationDataModule, SyntheticCells
from unet_diffusion.evaluation.autoencoders import evaluate_autoencoder
from unet_diffusion.evaluation.segmenters import evaluate_segmenter
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.autoencoders import vq_autoencoder
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.processes import process_group
from unet_diffusion.segmentation.labels import Targets

torch.manual_seed(0)
unet = SegmentationUNet(1, 4, channels=(4, 8), padding="same").eval()
segmenter = Segmenter(unet, "instances", ["background", "cell", "border"], None, False, 64)
network = vq_autoencoder(1, [4, 8], latent_channels=2, num_codes=8, layers_per_block=1, mid_attention=False,
                         norm_num_groups=2).eval()
cells = SegmentationDataModule(SyntheticCells(num_images=6), Targets("instances", separate_borders=True),
                               window_size=64, num_val=3)
digits = ImageDataModule(Digits(), num_val=50, num_workers=0)
with process_group() as group:
    evaluations = [
        evaluate_segmenter(segmenter, cells, group=group),
        evaluate_autoencoder(Autoencoder(network, (1, 8, 8)), digits, features=lambda images: images[:, 0, ::2, 4],
                             group=group),
    ]
    if group.rank == 0:
        json.dump([evaluation.plain() for evaluation in evaluations], open(sys.argv[1], "w"))
"""


def evaluated(folder: Path, num_processes: int) -> list[dict]:
    (folder / "evaluate_both.py").write_text(PROGRAM)
    output = folder / f"{num_processes}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = run_python([sys.executable, *torchrun, "evaluate_both.py", str(output)], cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_two_processes_evaluate_as_one(tmp_path):
    for one, two in zip(evaluated(tmp_path, 1), evaluated(tmp_path, 2), strict=True):
        assert one["figures"].keys() == two["figures"].keys()
        for key, figure in one["figures"].items():
            expected = figure["value"] and pytest.approx(figure["value"], rel=1e-4)  # None where it is not measured
            assert two["figures"][key]["value"] == expected, key
        assert one["protocol"] == two["protocol"]
        assert one["warnings"] == two["warnings"]
