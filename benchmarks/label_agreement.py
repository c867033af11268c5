"""Are samples what was asked for? A classifier trained on real images names the samples of a class-conditional run.

    python benchmarks/label_agreement.py runs/digits --data digits --num_images 500
    python benchmarks/label_agreement.py runs/fashion_mnist --data fashion_mnist --root DIR --num_images 2000

Printed: the classifier's accuracy on held-out real images; the share of samples that it gives the label asked for, with
and without guidance; how many unconditional samples (null label) it finds in each class.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from features import classes, fashion_mnist, trained_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

import unet_diffusion as ud

NUM_UNGUIDED = 500  # samples without guidance, and without label

Classifier = Callable[[Tensor], Tensor]  # images (N, 1, H, W) in [-1, 1] -> classes (N,)


def main() -> None:
    options = parse_options()
    classify, accuracy = (
        digits_classifier() if options.data == "digits" else fashion_classifier(options.root, options.seed)
    )
    print(f"classifier: {accuracy:.1%} right on held-out real images")

    denoiser = ud.load(options.checkpoint).to("cpu")
    draw = partial(
        denoiser.sample,
        labels=range(10),
        scheduler=options.scheduler,
        num_inference_steps=options.num_inference_steps,
        seed=options.seed,
        batch_size=250,
    )
    few = min(NUM_UNGUIDED, options.num_images)
    for guidance_scale, num_images in ((1.0, few), (options.guidance_scale, options.num_images)):
        start = time.perf_counter()
        images = draw(num_images, guidance_scale=guidance_scale)
        seconds = time.perf_counter() - start
        agreement = (classify(images.clamp(-1, 1)) == torch.arange(num_images) % 10).float().mean()
        print(f"guidance {guidance_scale}: {agreement:.1%} of {num_images} are what was asked for ({seconds:.0f} s)")
    images = draw(few, guidance_scale=0)  # which ignores the labels
    counts = classify(images.clamp(-1, 1)).bincount(minlength=10)
    print(f"unconditional samples found in each class: {counts.tolist()}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="checkpoint, run folder or pipeline folder, class-conditional with a null label"
    )
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), required=True)
    parser.add_argument("--root", default="data", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def digits_classifier() -> tuple[Classifier, float]:
    """A support-vector classifier of the 8x8 digits, trained on four fifths of them."""
    data, target = load_digits(return_X_y=True)
    data_train, data_test, target_train, target_test = train_test_split(
        data, target, test_size=0.2, stratify=target, random_state=0
    )
    svc = SVC(gamma=0.001).fit(data_train, target_train)  # gamma of scikit-learn's own example, for values 0 to 16

    def classify(images: Tensor) -> Tensor:
        pixels = (images / 2 + 0.5).mul(16).flatten(1).numpy()
        return torch.from_numpy(svc.predict(pixels))

    return classify, svc.score(data_test, target_test)


def fashion_classifier(root: str, seed: int) -> tuple[Classifier, float]:
    """A small convolutional network, trained on the 60,000 training images and scored on the 10,000 test images."""
    classify = partial(classes, trained_classifier(root, seed))
    images, targets = fashion_mnist(root, train=False)
    return classify, (classify(images) == targets).float().mean().item()


if __name__ == "__main__":
    main()
