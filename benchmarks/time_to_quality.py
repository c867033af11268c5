"""How good are samples of Fashion-MNIST after some minutes on this machine, from the start of the process?

    python benchmarks/time_to_quality.py --root DIR --minutes 3 10

Contenders, each in a process of its own; the peers with batches of 64:

    diffusers_shipped     UNet2DModel(64, 128, 128) with 8-wide heads, the recipe of diffusers' train_unconditional.py
    diffusers_tuned       the same with 64-wide heads, bf16 (*), v-prediction, a rate that fits the budget
    ddpm_pytorch_shipped  denoising-diffusion-pytorch's Unet(64, (1, 2, 2)), the recipe of its Trainer
    ddpm_pytorch_tuned    the same with bf16 (*), a rate that fits the budget
    ours                  `unet-diffusion fit --config fashion_mnist`, with as many steps as fit
    ours_unconditional    the same without labels, which no peer is given
    (*) where it is in hardware

The clock starts before the process does. Peers find their images in memory, neither log, validate nor save on the way,
and stop before the step that would end too late. Ours counts steps: how many fit follows from three short runs, and all
that its command line does is timed, with compiling its fused kernels, and export. Peers do not compile: on a CPU that
takes minutes.

Then, outside of the budget and the same for all: samples of the averaged network, by 25 steps of DPM-Solver++ on the
noise schedule it was trained with, in bf16 (*), without guidance; ours at random labels, and also with the guidance of
its recipe. Their distance is to the 10,000 test images (see features.py); that of as many training images is the least
to hope for. Each result is kept as soon as it is there, and a run that was cut off continues. Options that are not of
this program go to our fit.

A run of ours that exists already, of whatever settings, is judged in the same way:

    python benchmarks/time_to_quality.py --root DIR --judge RUN --scheduler DDIMScheduler --num_inference_steps 50
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from features import classes, fashion_mnist, features, frechet_distance, label_entropy, small_cnn, trained_classifier
from measure import RESULTS, empty_caches, environment, fastest_autocast, process_seconds, table, write_json
from torch import Tensor, nn
from torch.optim import Optimizer

# diffusers, denoising_diffusion_pytorch and unet_diffusion are imported where they are used: a contender's process is
# to pay for its own imports only.

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "fashion_mnist.yaml"
IMAGE_SHAPE = (1, 28, 28)

BATCH_SIZE = 64  # of the peers; ours has its own in the configuration
MAX_GRADIENT_NORM = 1.0  # in the recipes of both peers
TUNED_RATE = 1.0e-3
TUNED_WARM_UP = 0.05  # share of the training time
TUNED_EMA_DECAY = 0.999  # less at first: in a few hundred steps the peers' own warm-up does not get there

OURS: dict[str, tuple[str, ...]] = {  # options beside the configuration
    "ours": (),
    "ours_unconditional": (
        "--model.unet.init_args.num_class_embeds=null",
        "--model.label_dropout=0",
        "--samples.guidance_scale=1",
    ),
}
MARGIN = 0.06  # of the budget: short runs foretell a long one no better

NUM_INFERENCE_STEPS = 25
SAMPLING: dict[str, Any] = {  # of ours, as of the peers
    "scheduler": "DPMSolverMultistepScheduler",
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": 1.0,
}
SAMPLE_BATCH_SIZE = 250
NUM_PICTURED = 64

Result = dict[str, Any]


def main() -> None:
    options = parse_options()
    if options.started is not None:
        train_peer(options)
        return
    if options.judge is not None:
        print_verdicts(options)
        return
    wanted = [
        (name, minutes, seed) for minutes in options.minutes for seed in options.seeds for name in options.contenders
    ]
    for name, minutes, seed in wanted:
        if options.again or find_result(options, name, minutes, seed) is None:
            keep_result(options, measured(options, name, minutes, seed))
    real = judge(options.root, options.work).real_images(options.num_images)
    write_json(options.json, read_results(options.json) | {"real_images": real})
    print(table([row(find_result(options, *key)) for key in wanted]))
    print(f"\n{len(wanted)} results in {options.json}; {options.num_images} images are judged of each.")
    print(f"Real training images: distance {real['distance']:.2f}, label entropy {real['label_entropy']:.2f}. "
          f"The classifier is right on {real['classifier_accuracy']:.1%} of the test images.")  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RECIPES, *OURS]
    parser.add_argument("--root", type=Path, required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", nargs="+", type=float, default=[3.0, 10.0], help="budgets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_images", type=int, default=1000, help="samples to judge")
    parser.add_argument("--calibration_steps", nargs=2, type=int, default=[20, 100], help="of our short runs")
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--work", type=Path, default=Path("runs/time_to_quality"), help="for weights and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "time_to_quality.json", help="pictures go beside it")
    judging = parser.add_argument_group("a run that exists")
    judging.add_argument("--judge", type=Path, metavar="RUN", help="draw from it with each seed and print the verdict")
    judging.add_argument("--scheduler", help=f"of diffusers, {SAMPLING['scheduler']} if left out")
    judging.add_argument("--num_inference_steps", type=int, help=f"{NUM_INFERENCE_STEPS} if left out")
    judging.add_argument("--guidance_scale", type=float, help="1, which is off, if left out")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # given to a peer's process, which only trains
    options, options.fit_options = parser.parse_known_args()  # what is not known here goes to fit
    options.root, options.work = options.root.resolve(), options.work.resolve()
    if options.judge is not None and options.fit_options:
        parser.error(f"--judge trains nothing, and takes no {' '.join(options.fit_options)}")
    of_contenders = ("contenders", "minutes", "again", "json")
    if options.judge is not None and (
        useless := [name for name in of_contenders if getattr(options, name) != parser.get_default(name)]
    ):
        parser.error(f"--{useless[0]} is for contenders, and --judge trains none")
    options.sampling = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    if options.judge is None and options.sampling:
        parser.error(f"--{next(iter(options.sampling))} is for --judge RUN; contenders are all sampled in one way")
    return options


def measured(options: argparse.Namespace, name: str, minutes: float, seed: int) -> Result:
    """A contender trained in a process of its own, sampled and judged; its picture is written."""
    from unet_diffusion.runtime.pictures import save_grid

    folder = run_folder(options, name, minutes, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}, {minutes:g} minutes, seed {seed}", flush=True)
    training = our_training if name in OURS else peer_training
    trained = training(options, name, minutes, seed)
    if name in OURS:
        images, network = our_images(folder, options.num_images, seed)
    else:
        images, network = peer_images(name, folder, options.num_images, seed)
    verdicts = judge(options.root, options.work).verdict(images)
    if name == "ours":
        guidance_scale = yaml.safe_load(CONFIG.read_text())["samples"]["guidance_scale"]
        images, _ = our_images(folder, options.num_images, seed, guidance_scale=guidance_scale)
        guided = judge(options.root, options.work).verdict(images)
        verdicts |= {"guided": {"guidance_scale": guidance_scale, **guided}}
    if seed == options.seeds[0]:
        picture = options.json.with_name(f"time_to_quality_{name}_{minutes:g}.png")
        save_grid(images[:NUM_PICTURED], picture, columns=8, min_tile=28)
    return {
        "contender": name,
        "minutes": minutes,
        "seed": seed,
        "num_images": options.num_images,
        **trained,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **verdicts,
        "environment": environment(),
    }


def print_verdicts(options: argparse.Namespace) -> None:
    """Samples of a run that exists are judged as those of a contender, with each seed."""
    sampling = SAMPLING | options.sampling
    for seed in options.seeds:
        begun = time.time()
        images, _ = our_images(options.judge, options.num_images, seed, **sampling)
        way = (f"{sampling['num_inference_steps']} steps of {sampling['scheduler']}, guidance "
               f"{sampling['guidance_scale']:g}, in {time.time() - begun:.0f} s")  # fmt: skip
        verdict = judge(options.root, options.work).verdict(images)
        print(f"{options.judge}: distance {verdict['distance']:.2f}, label entropy {verdict['label_entropy']:.2f}; "
              f"{options.num_images} images of seed {seed} by {way}", flush=True)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- results


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"real_images": None, "results": []}


def find_result(options: argparse.Namespace, name: str, minutes: float, seed: int) -> Result | None:
    key = (name, minutes, seed, options.num_images)
    return next((result for result in read_results(options.json)["results"] if result_key(result) == key), None)


def keep_result(options: argparse.Namespace, result: Result) -> None:
    """Adds the result to the file, in place of an older one."""
    record = read_results(options.json)
    others = [other for other in record["results"] if result_key(other) != result_key(result)]
    write_json(options.json, record | {"results": [*others, result]})


def result_key(result: Result) -> tuple[str, float, int, int]:
    return result["contender"], result["minutes"], result["seed"], result["num_images"]


def row(result: Result) -> dict[str, object]:
    return {
        "contender": result["contender"],
        "minutes": f"{result['minutes']:g}",
        "seed": result["seed"],
        "steps": result["steps"],
        "images seen": result["images_seen"],
        "parameters": f"{result['parameters'] / 1e6:.2f} M",
        "distance": f"{result['distance']:.2f}",
        "guided": f"{result['guided']['distance']:.2f}" if "guided" in result else "",
        "label entropy": f"{result['label_entropy']:.2f}",
        "seconds": f"{result['seconds']:.1f}",
    }


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def run_folder(options: argparse.Namespace, name: str, minutes: float, seed: int) -> Path:
    return options.work / f"{name}_{minutes:g}_{seed}"


# ------------------------------------------------------------------------------------------------------------ judgement


@dataclass(frozen=True)
class Judge:
    """The classifier and what it sees in the test images."""

    root: Path
    network: nn.Sequential
    test_features: Tensor

    def verdict(self, images: Tensor) -> dict[str, float]:
        seen = features(self.network, images)
        return {
            "distance": frechet_distance(seen, self.test_features),
            "label_entropy": label_entropy(classes(self.network, images)),
        }

    def real_images(self, num_images: int) -> dict[str, float]:
        """The verdict on training images, and how often the classifier is right on test images."""
        images, _ = fashion_mnist(self.root, train=True)
        test_images, test_targets = fashion_mnist(self.root, train=False)
        right = classes(self.network, test_images) == test_targets
        verdict = self.verdict(images[:num_images])
        return {"num_images": num_images, **verdict, "classifier_accuracy": right.float().mean().item()}


@cache
def judge(root: Path, work: Path) -> Judge:
    """The judge of these images, whose classifier is trained once a work folder."""
    path = work / "classifier.pt"
    if not path.exists():
        print("training the classifier", flush=True)
        partial_path = path.with_suffix(".partial")
        work.mkdir(parents=True, exist_ok=True)
        torch.save(trained_classifier(root, seed=0).state_dict(), partial_path)
        partial_path.replace(path)
    network = small_cnn().eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    return Judge(root, network, features(network, fashion_mnist(root, train=False)[0]))


# ------------------------------------------------------------------------------------------------------------- sampling


def our_images(folder: Path, num_images: int, seed: int, **sampling: Any) -> tuple[Tensor, nn.Module]:
    """Samples in [-1, 1], at random labels where there are classes, and the network that they are of."""
    import unet_diffusion as ud

    denoiser = ud.load(folder).to("cpu")
    if denoiser.image_shape != IMAGE_SHAPE:
        raise SystemExit(f"the judge knows images of {IMAGE_SHAPE}, and {folder} draws {denoiser.image_shape}")
    images = denoiser.sample(
        num_images,
        labels=random_labels(denoiser.num_classes, num_images, seed),
        seed=seed,
        batch_size=SAMPLE_BATCH_SIZE,
        **(SAMPLING | sampling),
    )
    return images.clamp(-1, 1), denoiser.unet


def peer_images(name: str, folder: Path, num_images: int, seed: int) -> tuple[Tensor, nn.Module]:
    """The same of a peer: image i starts from the same noise for every contender."""
    from unet_diffusion.diffusion.sampling import denoise, image_generators

    recipe = RECIPES[name]()
    recipe.network.load_state_dict(torch.load(folder / "trained.pt", weights_only=True)["weights"])
    recipe.network.eval()
    batches = []
    for numbers in torch.arange(num_images).split(SAMPLE_BATCH_SIZE):
        with fastest_autocast():
            images = denoise(
                recipe.predict,
                recipe.solver(),
                image_generators(seed, numbers.tolist()),
                (len(numbers), *IMAGE_SHAPE),
                num_inference_steps=NUM_INFERENCE_STEPS,
            )
        batches.append(images.clamp(-1, 1))
    return torch.cat(batches), recipe.network


def random_labels(num_classes: int, num_images: int, seed: int) -> list[int] | None:
    if num_classes == 0:
        return None
    return torch.randint(num_classes, (num_images,), generator=torch.Generator().manual_seed(seed)).tolist()


# ----------------------------------------------------------------------------------------------------------------- ours


@dataclass
class Pace:
    """How long our command line takes, in seconds."""

    start: float  # all that comes once: imports, data, last grid of samples, export
    step: float
    pause: float  # validation, a grid of samples and a checkpoint on the way

    def steps_within(self, seconds: float, pause_every: int) -> int:
        return max(1, math.floor((seconds - self.start) / (self.step + self.pause / pause_every)))


def our_training(options: argparse.Namespace, name: str, minutes: float, seed: int) -> Result:
    config = yaml.safe_load(CONFIG.read_text())
    given = tuple(options.fit_options)
    pace = our_pace(name, options.root, options.work, *options.calibration_steps, given)
    steps = pace.steps_within(60 * minutes * (1 - MARGIN), pause_every=config["samples"]["every_n_steps"])
    folder = run_folder(options, name, minutes, seed)
    seeds = [f"--{field}={seed}" for field in ("seed_everything", "model.seed", "data.init_args.seed")]
    seconds = fit_seconds(name, options.root, folder, steps, *given, *seeds)
    images_seen = steps * config["data"]["init_args"]["batch_size"]
    return {"steps": steps, "images_seen": images_seen, "seconds": seconds, "pace": vars(pace)}


@cache
def our_pace(name: str, root: Path, work: Path, short: int, long: int, given: tuple[str, ...]) -> Pace:
    """From a long run, a short one, and a short one that pauses once on the way."""
    pauses = ("samples.every_n_steps", "trainer.val_check_interval", "checkpoint.every_n_train_steps")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        runs = Path(folder)
        # the long one first: what only the first run of all pays for makes a step seem longer, never shorter
        long_seconds = fit_seconds(name, root, runs / "long", long, *given)
        short_seconds = fit_seconds(name, root, runs / "short", short, *given)
        options = [f"--{field}={short // 2 + 1}" for field in pauses]
        paused_seconds = fit_seconds(name, root, runs / "paused", short, *given, *options)
    step = (long_seconds - short_seconds) / (long - short)
    if step <= 0:
        raise RuntimeError(f"{long} steps must take longer than {short}, and took {long_seconds:.1f} s against "
                           f"{short_seconds:.1f} s; give --calibration_steps that lie further apart")  # fmt: skip
    pace = Pace(short_seconds - short * step, step, pause=max(0.0, paused_seconds - short_seconds))
    print(f"  start {pace.start:.1f} s, step {pace.step:.3f} s, pause {pace.pause:.1f} s", flush=True)
    return pace


def our_speed() -> str:
    """That of all runs, short and long."""
    from unet_diffusion.models.speed import speed_for_use

    return speed_for_use("fused", torch.device("cpu"))


def fit_seconds(name: str, root: Path, folder: Path, max_steps: int, *options: str) -> float:
    """Wall clock of a whole `unet-diffusion fit`."""
    command = [sys.executable, "-m", "unet_diffusion", "fit", f"--config={CONFIG}"]
    command += [f"--data.root={root}", f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.max_steps={max_steps}", f"--model.speed={our_speed()}", *OURS[name], *options]
    with empty_caches():
        return process_seconds(command, log_of(folder))


# ---------------------------------------------------------------------------------------------------------------- peers


@dataclass
class Recipe:
    """A peer's network and how it is trained."""

    network: nn.Module
    loss: Callable[[Tensor], Tensor]  # of images in [-1, 1]
    optimizer: Optimizer
    after_step: Callable[[float], None]  # moves average and rate, given the share of the training time that has passed
    averaged_weights: Callable[[], dict[str, Tensor]]
    bf16: bool
    predict: Callable[[Tensor, Tensor], Tensor]  # of x_t and t
    solver: Callable[[], Any]  # a new DPMSolverMultistepScheduler, on the schedule of the training


def peer_training(options: argparse.Namespace, name: str, minutes: float, seed: int) -> Result:
    """Trains in another process: this script again, told when it was started."""
    command = [sys.executable, __file__, f"--root={options.root}", f"--contenders={name}", f"--minutes={minutes}"]
    command += [f"--seeds={seed}", f"--work={options.work}", f"--started={time.time()}"]
    folder = run_folder(options, name, minutes, seed)
    seconds = process_seconds(command, log_of(folder))
    steps = torch.load(folder / "trained.pt", weights_only=True)["steps"]
    return {"steps": steps, "images_seen": steps * BATCH_SIZE, "seconds": seconds}


def train_peer(options: argparse.Namespace) -> None:
    """What a peer's process does: it leaves averaged weights and the number of steps in its run folder."""
    (name,), (minutes,), (seed,) = options.contenders, options.minutes, options.seeds
    torch.manual_seed(seed)
    recipe = RECIPES[name]()
    images, _ = fashion_mnist(options.root, train=True)
    steps = train_until(options.started + 60 * minutes, recipe, endless_batches(images))
    path = run_folder(options, name, minutes, seed) / "trained.pt"
    torch.save({"steps": steps, "weights": recipe.averaged_weights()}, path)


def train_until(end: float, recipe: Recipe, batches: Iterator[Tensor]) -> int:
    """Number of steps made until that time; none is begun that would end later if it took as long as the last."""
    begin, steps, step_seconds = time.time(), 0, 0.0
    recipe.network.train()
    while (step_begin := time.time()) + step_seconds < end:
        with fastest_autocast() if recipe.bf16 else nullcontext():
            loss = recipe.loss(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(recipe.network.parameters(), MAX_GRADIENT_NORM)
        recipe.optimizer.step()
        recipe.optimizer.zero_grad()
        recipe.after_step((time.time() - begin) / (end - begin))
        steps += 1
        step_seconds = time.time() - step_begin
    return steps


def endless_batches(images: Tensor) -> Iterator[Tensor]:
    while True:
        whole = len(images) // BATCH_SIZE * BATCH_SIZE
        for batch in torch.randperm(len(images))[:whole].split(BATCH_SIZE):
            yield images[batch]


def set_tuned_rate(optimizer: Optimizer, share: float) -> None:
    """A tenth of the rate at first, all of it after the warm-up, half a cosine to 0 at the end."""
    rate = TUNED_RATE * min(0.1 + share / TUNED_WARM_UP, 1) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def dpm_solver(**fields: Any) -> Any:
    """A new DPM-Solver++ for a noise schedule, starting at its noisiest timestep as ours does."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**fields, timestep_spacing="trailing")


# ------------------------------------------------------------------------------------------------------------ diffusers


def diffusers_shipped() -> Recipe:
    """The defaults of examples/unconditional_image_generation/train_unconditional.py, but for network and batch."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    network = diffusers_network(head_width=8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    num_steps = 100 * math.ceil(60_000 / BATCH_SIZE)  # its 100 epochs
    rates = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=500, num_training_steps=num_steps)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def after_step(share: float) -> None:
        rates.step()
        ema.step(network.parameters())

    return diffusers_recipe(network, DDPMScheduler(), optimizer, after_step, ema, bf16=False)


def diffusers_tuned() -> Recipe:
    """What a user who knows diffusers well would make of it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network = diffusers_network(head_width=64)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    set_tuned_rate(optimizer, share=0)
    ema = EMAModel(network.parameters(), decay=TUNED_EMA_DECAY, foreach=True)  # at first (1 + n) / (10 + n)
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def after_step(share: float) -> None:
        set_tuned_rate(optimizer, share)
        ema.step(network.parameters())

    return diffusers_recipe(network, noise, optimizer, after_step, ema, bf16=True)


def diffusers_network(head_width: int) -> nn.Module:
    """6.5 M parameters, with attention at 14x14 pixels, as DDPM at 16x16, and at the bottom."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=head_width,
    )


def diffusers_recipe(
    network: nn.Module, noise: Any, optimizer: Optimizer, after_step: Callable[[float], None], ema: Any, *, bf16: bool
) -> Recipe:
    """The recipe of these parts; noise is a DDPMScheduler."""

    def loss(x0: Tensor) -> Tensor:
        eps, t = torch.randn_like(x0), torch.randint(noise.config.num_train_timesteps, (len(x0),))
        target = eps if noise.config.prediction_type == "epsilon" else noise.get_velocity(x0, eps, t)
        return F.mse_loss(network(noise.add_noise(x0, eps, t), t).sample.float(), target)

    def averaged_weights() -> dict[str, Tensor]:
        ema.copy_to(network.parameters())
        return network.state_dict()

    return Recipe(
        network, loss, optimizer, after_step, averaged_weights, bf16,
        predict=lambda x, t: network(x, t).sample,
        solver=partial(
            dpm_solver, beta_schedule=noise.config.beta_schedule, prediction_type=noise.config.prediction_type
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ denoising-diffusion-pytorch


def ddpm_pytorch_shipped() -> Recipe:
    """The defaults of GaussianDiffusion and Trainer, but for network and batch."""
    from ema_pytorch import EMA

    diffusion = ddpm_pytorch_diffusion()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def loss(x0: Tensor) -> Tensor:
        mirrored = torch.rand(len(x0), 1, 1, 1) < 0.5  # augment_horizontal_flip
        return diffusion(torch.where(mirrored, x0.flip(3), x0) / 2 + 0.5)  # it takes images in [0, 1]

    return ddpm_pytorch_recipe(diffusion, loss, optimizer, lambda share: ema.update(), ema, bf16=False)


def ddpm_pytorch_tuned() -> Recipe:
    """What a user who knows the library well would make of it; v-prediction is its default already."""
    from ema_pytorch import EMA

    diffusion = ddpm_pytorch_diffusion()
    optimizer = torch.optim.Adam(diffusion.parameters(), betas=(0.9, 0.99), fused=True)
    set_tuned_rate(optimizer, share=0)
    ema = EMA(diffusion, beta=TUNED_EMA_DECAY, update_every=1, update_after_step=0, use_foreach=True)

    def after_step(share: float) -> None:
        set_tuned_rate(optimizer, share)
        ema.update()

    return ddpm_pytorch_recipe(diffusion, lambda x0: diffusion(x0 / 2 + 0.5), optimizer, after_step, ema, bf16=True)


def ddpm_pytorch_diffusion() -> nn.Module:
    """5.2 M parameters, with linear attention at 28x28 and 14x14 pixels and attention at 7x7."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    return GaussianDiffusion(Unet(64, dim_mults=(1, 2, 2), channels=1), image_size=28)


def ddpm_pytorch_recipe(
    diffusion: Any,
    loss: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    after_step: Callable[[float], None],
    ema: Any,
    *,
    bf16: bool,
) -> Recipe:
    """The recipe of these parts; its sigmoid noise schedule, which diffusers lacks, is handed over as betas."""
    solver = partial(dpm_solver, trained_betas=diffusion.betas.tolist(), prediction_type="v_prediction")
    averaged_weights = ema.ema_model.state_dict
    return Recipe(diffusion, loss, optimizer, after_step, averaged_weights, bf16, diffusion.model, solver)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "diffusers_shipped": diffusers_shipped,
    "diffusers_tuned": diffusers_tuned,
    "ddpm_pytorch_shipped": ddpm_pytorch_shipped,
    "ddpm_pytorch_tuned": ddpm_pytorch_tuned,
}


if __name__ == "__main__":
    main()
