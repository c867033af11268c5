"""How fast are slices of 512 x 512 segmented, beside segmentation_models_pytorch's Unet with as many parameters?

    python benchmarks/segmentation_speed.py

Ours is configs/isbi2012_modern.yaml's network (padded) and the paper's (valid convolutions, overlap-tile). The peer's
Unet has a ResNet encoder and decoder widths that bring it to the parameters of each. All in bfloat16 and eval mode,
without gradients, alternating in blocks; random weights.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from measure import RESULTS, environment, table, write_json
from torch import Tensor, nn

from unet_diffusion.segmentation.tiles import predict_tiled
from unet_diffusion.speed import keep_freed_memory, set_speed
from unet_diffusion.unet import SegmentationUNet

SIDE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--slices", type=int, default=4, help="a block")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels")
    parser.add_argument("--json", default=str(RESULTS / "segmentation_speed.json"))
    options = parser.parse_args()
    keep_freed_memory()
    image = torch.randn(1, options.side, options.side)
    predictors = {**ours(), **peers()}
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for predict, _ in predictors.values():
            predict(image)
        for _ in range(options.blocks):
            for name, (predict, _) in predictors.items():
                start = time.perf_counter()
                for _ in range(options.slices):
                    predict(image)
                seconds[name].append((time.perf_counter() - start) / options.slices)
    rows = [
        {
            "network": name,
            "parameters": f"{predictors[name][1] / 1e6:.2f} M",
            "megapixels/s": round(options.side**2 / 1e6 / float(np.median(taken)), 3),
            "lowest": round(options.side**2 / 1e6 / max(taken), 3),
            "highest": round(options.side**2 / 1e6 / min(taken), 3),
        }
        for name, taken in seconds.items()
    ]
    print(table(rows))
    print(f"written: {write_json(options.json, {'environment': environment(), 'results': rows})}")


Predictor = tuple[Callable[[Tensor], Tensor], int]


def ours() -> dict[str, Predictor]:
    paper = SegmentationUNet(1, 2).eval()
    modern = SegmentationUNet(1, 2, channels=(32, 64, 128, 256, 512), padding="same", norm="batch").eval()
    made: dict[str, Predictor] = {}
    for name, network in (("unet_diffusion, modern", modern), ("unet_diffusion, paper", paper)):
        set_speed(network, "channels_last")
        made[name] = (lambda image, net=network: predict_tiled(net, image, net, window_size=SIDE), size(network))
    return made


def peers() -> dict[str, Predictor]:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        print("segmentation_models_pytorch is not installed: the peer is left out")
        return {}
    made: dict[str, Predictor] = {}
    # A ResNet-18 with a narrow decoder has 7.8 M convolution weights' worth as ours has; a ResNet-34, 31 M.
    for name, encoder, widths in (
        ("smp.Unet, resnet18", "resnet18", (64, 32, 32, 16, 16)),
        ("smp.Unet, resnet34", "resnet34", (512, 256, 128, 64, 32)),
    ):
        network = smp.Unet(encoder, encoder_weights=None, decoder_channels=widths, in_channels=1, classes=2).eval()
        network.to(memory_format=torch.channels_last)
        made[name] = (lambda image, net=network: net(image[None]), size(network))
    return made


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    main()
