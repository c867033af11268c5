"""How fast are slices of 512 x 512 segmented, beside segmentation_models_pytorch's Unet with as many parameters?

    python benchmarks/segmentation_speed.py

Ours are the paper's network (valid convolutions) and a padded one with batch norm; the peer's are the Unets with a
ResNet encoder that are nearest in parameters, within 5 %. All whole slices, in bfloat16 and eval mode, without
gradients, alternating in blocks; random weights. Ours run at speed fused where it is to be had, else channels last, as
the peer's do. Multiply-adds are those of plain convolutions.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import RESULTS, environment, fastest_autocast, table, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.models.speed import keep_freed_memory, prepare_weights, set_speed, speed_for_use
from unet_diffusion.runtime.precision import precisions_for
from unet_diffusion.segmentation.tiles import predict_tiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--slices", type=int, default=4, help="a block")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--json", default=str(RESULTS / "segmentation_speed.json"))
    options = parser.parse_args()
    keep_freed_memory()
    image = torch.randn(1, options.side, options.side)
    predictors = {**ours(image), **peers(image)}
    seconds = measured(predictors, image, options.blocks, options.slices)
    rows = [row(name, *predictors[name][1:], taken, image) for name, taken in seconds.items()]
    print(table(rows))
    print(f"written: {write_json(options.json, {'environment': environment(), 'results': rows})}")


Predictor = tuple[Callable[[Tensor], Tensor], int, int]  # a function of an image, its parameters and operations


def measured(predictors: dict[str, Predictor], image: Tensor, blocks: int, slices: int) -> dict[str, list[float]]:
    """Seconds a slice of each, block by block."""
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    with torch.inference_mode(), fastest_autocast():
        for predict, *_ in predictors.values():
            predict(image)
        for _ in range(blocks):
            for name, (predict, *_) in predictors.items():
                start = time.perf_counter()
                for _ in range(slices):
                    predict(image)
                seconds[name].append((time.perf_counter() - start) / slices)
    return seconds


def row(name: str, parameters: int, operations: int, taken: list[float], image: Tensor) -> dict:
    megapixels = image.shape[-1] ** 2 / 1e6
    return {
        "network": name,
        "parameters": f"{parameters / 1e6:.2f} M",
        "multiply-adds a slice": f"{operations / 2e9:.0f} G",
        "megapixels/s": round(megapixels / float(np.median(taken)), 3),
        "lowest": round(megapixels / max(taken), 3),
        "highest": round(megapixels / min(taken), 3),
    }


def ours(image: Tensor) -> dict[str, Predictor]:
    widths = tuple(44 * 2**level for level in range(5))
    networks = {
        "unet_diffusion, paper": SegmentationUNet(1, 2).eval(),
        "unet_diffusion, padded, 44 to 704": SegmentationUNet(
            1, 2, channels=widths, padding="same", norm="batch"
        ).eval(),
    }
    made: dict[str, Predictor] = {}
    for name, network in networks.items():
        predict = partial(in_one_window, network)
        operations = flops(predict, image)
        set_speed(network, speed_for_use("fused", torch.device("cpu")))
        prepare_weights(network, precisions_for(torch.device("cpu"))[-1])
        made[name] = (predict, size(network), operations)
    return made


def in_one_window(network: SegmentationUNet, image: Tensor) -> Tensor:
    return predict_tiled(network, image, network, window_size=image.shape[-1] + 2 * network.margin + network.size_step)


def peers(image: Tensor) -> dict[str, Predictor]:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        print("segmentation_models_pytorch is not installed: the peer is left out")
        return {}
    made: dict[str, Predictor] = {}
    for encoder, widths in (("resnet34", (512, 256, 128, 64, 32)), ("resnet18", (256, 128, 64, 32, 16))):
        network = smp.Unet(encoder, encoder_weights=None, decoder_channels=widths, in_channels=1, classes=2).eval()
        network.to(memory_format=torch.channels_last)
        name = f"smp.Unet, {encoder}, decoder {widths[0]} to {widths[-1]}"
        predict = partial(whole, network)
        made[name] = (predict, size(network), flops(predict, image))
    return made


def whole(network: nn.Module, image: Tensor) -> Tensor:
    return network(image[None])


def flops(predict: Callable[[Tensor], Tensor], image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        predict(image)
    return counter.get_total_flops()


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    main()
