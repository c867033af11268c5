"""Does a denoiser draw what its map says? Objects that a threshold finds on drawn images of nuclei, against the map.

    unet-diffusion fit --config folder --config conditions/semantic_map --data.root nuclei/image
        --data.semantic_map nuclei/label --model.conditions.label_format instances --model.conditions.num_classes null
        --model.conditions.channels 3 --model.unet.in_channels 6 --trainer.default_root_dir runs/nuclei_map
    python benchmarks/semantic_map.py runs/nuclei_map --images nuclei/image --labels nuclei/label --output FILE

The first command is one line. The maps are those of held-out images. The score is the mean intersection over union of
the map's foreground with Otsu's (on grey values; the smaller side is the foreground): of the real images, of images
drawn from the maps, and of the same images with the maps of others (shuffled), which a denoiser that ignores its map
reaches.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from measure import describe, environment, table, write_json
from skimage.filters import threshold_otsu
from torch import Tensor

import unet_diffusion as ud
from unet_diffusion.data import Folder, scale_to_unit_range, split_by_name


def main() -> None:
    options = parse_options()
    denoiser = ud.load(options.checkpoint).to("cpu")
    channels, *size = denoiser.image_shape
    source = Folder(options.images, image_size=tuple(size), channels=channels, semantic_map=options.labels)
    image_set = source.load()
    held_out = split_by_name(image_set.names, None)[1][: options.num_images]
    maps = image_set.entries["semantic_map"][held_out]
    real = scale_to_unit_range(image_set.images.index_select(0, held_out))
    start = time.perf_counter()
    drawn = denoiser.sample(
        len(maps),
        conditions={"semantic_map": list(maps[:, 0])},
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
        seed=options.seed,
    )
    seconds = time.perf_counter() - start
    rows = [
        {"images": "real", **scores(real, maps)},
        {"images": "drawn from the maps", **scores(drawn, maps)},
        {"images": "drawn, with the maps of others", **scores(drawn, maps.roll(1, 0))},
    ]
    record = {"environment": environment(), "num_images": len(maps), "seconds": seconds, "results": rows}
    record |= {"guidance_scale": options.guidance_scale, "num_inference_steps": options.num_inference_steps}
    print(describe(record["environment"]), table(rows), sep="\n\n")
    write_json(options.output, record)


def scores(images: Tensor, maps: Tensor) -> dict[str, float]:
    """The mean intersection over union of Otsu's foreground with that of the maps, over images with any."""
    ious = []
    for image, labels in zip(images, maps[:, 0] > 0, strict=True):
        grey = image.mean(dim=0).clamp(-1, 1).numpy()
        if labels.any() and grey.min() < grey.max():
            bright = grey > threshold_otsu(grey)
            found, wanted = (bright if bright.mean() < 0.5 else ~bright), labels.numpy()
            ious.append((found & wanted).sum() / (found | wanted).sum())
    return {"iou": round(float(np.mean(ious)), 4)}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint or run folder of a denoiser of semantic maps")
    parser.add_argument("--images", type=Path, required=True, help="folder of real images")
    parser.add_argument("--labels", type=Path, required=True, help="folder of their label images")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("semantic_map.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
