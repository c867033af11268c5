"""Are samples what was asked for? A classifier trained on real images names the samples of a class-conditional run.

    python benchmarks/label_agreement.py runs/digits --data digits --num_images 500
    python benchmarks/label_agreement.py runs/fashion_mnist --data fashion_mnist --root DIR --num_images 2000
    python benchmarks/label_agreement.py runs/cifar10 --data cifar10 --root cifar10.zip/cifar10 --num_images 2000

For cifar10 the root holds train and test, each with a folder of images for each class. --classifier FILE keeps its
classifier, and continues a training that was cut off.

Printed: the classifier's accuracy on held-out real images; the share of samples that it gives the label asked for, with
and without guidance; how many unconditional samples (null label) it finds in each class.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cifar10
import torch
from features import classes, fashion_mnist, trained_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

import unet_diffusion as ud

CLASSIFIER_SEED = 0  # samples of every seed have the same judge
NUM_UNGUIDED = 500  # samples without guidance, and without label
NUM_CLASSES = 10
SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Classifier:
    """Something that names the class of an image.

    Args:
        classify: A function of images (N, C, H, W) in [-1, 1], which gives classes (N,).
        accuracy: The share of held-out real images on which it is right.
    """

    classify: Callable[[Tensor], Tensor]
    accuracy: float


def main() -> None:
    options = parse_options()
    denoiser = ud.load(options.checkpoint).to("cpu")
    num_classes, shape = denoiser.num_classes, SHAPES[options.data]
    if not num_classes or denoiser.image_shape != shape:
        raise SystemExit(f"the classifier knows classes of images of {shape}, and {options.checkpoint} draws "
                         f"{num_classes or 'no'} classes of {denoiser.image_shape}")  # fmt: skip
    if options.data != "cifar10" and num_classes != NUM_CLASSES:  # which compares names of classes
        raise SystemExit(f"the classifier knows {NUM_CLASSES} classes, and {options.checkpoint} draws {num_classes}")
    classifier = CLASSIFIERS[options.data](options, denoiser)
    print(f"classifier: {classifier.accuracy:.1%} right on held-out real images", flush=True)
    classify = classifier.classify
    draw = partial(
        denoiser.sample,
        labels=range(num_classes),
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
        agreement = (classify(images.clamp(-1, 1)) == torch.arange(num_images) % num_classes).float().mean()
        print(f"guidance {guidance_scale}: {agreement:.1%} of {num_images} are what was asked for ({seconds:.0f} s)")
    images = draw(few, guidance_scale=0)  # which ignores the labels
    counts = classify(images.clamp(-1, 1)).bincount(minlength=num_classes)
    print(f"unconditional samples found in each class: {counts.tolist()}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="checkpoint, run folder or pipeline folder, class-conditional with a null label"
    )
    parser.add_argument("--data", choices=tuple(CLASSIFIERS), required=True)
    parser.add_argument("--root", default="data", help="folder that holds FashionMNIST/raw, or train and test")
    parser.add_argument(
        "--classifier", type=Path, default=Path("runs/label_agreement/cifar10.pt"), help="the file that keeps it"
    )
    parser.add_argument("--classifier_epochs", type=int, default=cifar10.NUM_EPOCHS, help="of the one for cifar10")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def digits_classifier(options: argparse.Namespace, denoiser: ud.Denoiser) -> Classifier:
    """A support-vector classifier of the 8x8 digits, trained on four fifths of them."""
    data, target = load_digits(return_X_y=True)
    data_train, data_test, target_train, target_test = train_test_split(
        data, target, test_size=0.2, stratify=target, random_state=0
    )
    svc = SVC(gamma=0.001).fit(data_train, target_train)  # gamma of scikit-learn's own example, for values 0 to 16

    def classify(images: Tensor) -> Tensor:
        pixels = (images / 2 + 0.5).mul(16).flatten(1).numpy()
        return torch.from_numpy(svc.predict(pixels))

    return Classifier(classify, svc.score(data_test, target_test))


def fashion_classifier(options: argparse.Namespace, denoiser: ud.Denoiser) -> Classifier:
    """A small convolutional network, trained on the 60,000 training images and scored on the 10,000 test images."""
    classify = partial(classes, trained_classifier(options.root, CLASSIFIER_SEED))
    images, targets = fashion_mnist(options.root, train=False)
    return Classifier(classify, (classify(images) == targets).float().mean().item())


def cifar10_classifier(options: argparse.Namespace, denoiser: ud.Denoiser) -> Classifier:
    """A small residual network, trained on the 50,000 training images and scored on the 10,000 test images.

    Raises:
        SystemExit: If the run draws other classes.
    """
    train = cifar10.read(options.root, "train")
    if denoiser.class_names != train.class_names:
        raise SystemExit(f"the classifier knows the classes {', '.join(train.class_names)}, and the run draws "
                         f"{', '.join(denoiser.class_names or ['numbers'])}")  # fmt: skip
    network = cifar10.trained_network(
        train, options.classifier, seed=CLASSIFIER_SEED, num_epochs=options.classifier_epochs
    )
    classify = partial(cifar10.classes, network)
    test = cifar10.read(options.root, "test")
    return Classifier(classify, (classify(test.images) == test.targets).float().mean().item())


CLASSIFIERS: dict[str, Callable[[argparse.Namespace, ud.Denoiser], Classifier]] = {
    "digits": digits_classifier,
    "fashion_mnist": fashion_classifier,
    "cifar10": cifar10_classifier,
}


if __name__ == "__main__":
    main()
