"""What adapters and gradient checkpointing save: trained weights, checkpoint, memory and seconds a step.

    python benchmarks/adapters.py

The network is of the build of Stable Diffusion 1, narrower, with captions. A step is forward, backward, AdamW and the
moving average, in float32; the fastest counts, as other programs may run beside. Memory is that of a process of its
own, beyond what it took before it built the network.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import MIB, alternate, describe, environment, peak_memory, peak_memory_apart, table, write_json
from torch import nn

import unet_diffusion as ud
from unet_diffusion.diffusion.conditions.condition import network_inputs
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.training.averaging import Averages
from unet_diffusion.training.checkpointing import num_bytes

WIDTHS = {"narrow": (64, 128, 256), "tiny": (8, 16, 16)}
CONTEXT_DIM = 128
RANK = 8
CAPTION = "a red cat on a sofa"

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=WIDTHS, default="narrow", help="tiny only tries the program")
    parser.add_argument("--side", type=int, default=24, help="of the latents")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/adapters.json")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory(lambda: step_of(CONTENDERS[options.memory_of](options.base), options)))
        return
    machine = environment()
    print(describe(machine), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.base = save_base(Path(folder) / "base.ckpt", options)
        results = measure(options)
    print(table(results))
    report = {"environment": machine, "network": options.network, "side": options.side}
    report |= {"batch_size": options.batch_size, "results": results}
    print(f"written: {write_json(options.output or 'adapters', report)}")


def save_base(path: Path, options: argparse.Namespace) -> Path:
    """A denoiser of latents by captions, with random weights."""
    torch.manual_seed(0)
    text = TextTokens(CONTEXT_DIM, vocab_size=600, max_length=16, num_heads=4, frozen=True)
    text.learn_words([CAPTION])
    levels = {"attention_levels": (0, 1, 2), "context_dim": CONTEXT_DIM, "num_heads": 8, "norm_num_groups": 8}
    unet = ud.DenoiserUNet(4, WIDTHS[options.network], **levels)
    with torch.no_grad():
        for parameter in unet.parameters():  # a fresh network predicts 0 whatever its input
            parameter.add_(0.01 * torch.randn_like(parameter))
    shape = (4, options.side, options.side)
    ud.Denoiser(unet, ud.NoiseSchedule(), shape, conditions=nn.ModuleList([text])).save(path)
    return path


def full(base: Path, **settings: bool) -> ud.DiffusionModule:
    """Fine-tuning of all weights of the network."""
    denoiser: Any = ud.load(base)
    unet = ud.DenoiserUNet(**{**denoiser.unet.config, **settings})
    unet.load_state_dict(denoiser.unet.state_dict())
    return ud.DiffusionModule(unet, denoiser.schedule, conditions=list(denoiser.conditions))


CONTENDERS: dict[str, Callable[[Path], ud.DiffusionModule]] = {
    "all weights": full,
    "all weights, gradient checkpointing": lambda base: full(base, gradient_checkpointing=True),
    "LoRA of rank 8": lambda base: ud.AdapterModule(str(base), ud.LoRA(RANK)),
    "LoRA of rank 8, gradient checkpointing": lambda base: ud.AdapterModule(
        str(base), ud.LoRA(RANK), gradient_checkpointing=True
    ),
    "textual inversion": lambda base: ud.AdapterModule(
        str(base), ud.TextualInversion("<new>", initializer_token="cat")
    ),
}


def step_of(module: ud.DiffusionModule, options: argparse.Namespace) -> Step:
    """A step of training on one batch of noise."""
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    averages = Averages(module.averaged_pairs())
    text: Any = module.conditions[0]
    captions = text.token_ids([CAPTION] * options.batch_size)
    x0, noise = torch.randn(2, options.batch_size, 4, options.side, options.side)
    t = torch.arange(options.batch_size) * 100

    def step() -> None:
        inputs = network_inputs(module.all_conditions, {"captions": captions})
        prediction = module.unet(module.schedule.add_noise(x0, noise, t), t, **inputs)
        (prediction - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.move(0.99)

    return step


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    memory = {name: peak_memory_apart(name, "--base", str(options.base)) for name in CONTENDERS}
    modules = {name: build(options.base) for name, build in CONTENDERS.items()}
    taken = alternate({name: step_of(module, options) for name, module in modules.items()}, options.blocks, 1)
    return [
        {
            "trained": name,
            "trained weights": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
            "checkpoint MiB": round(num_bytes(module) / MIB, 3),
            "memory MiB": round(memory[name]),
            "seconds a step": round(min(taken[name]), 3),
        }
        for name, module in modules.items()
    ]


if __name__ == "__main__":
    main()
