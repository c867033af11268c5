"""What a training step takes on several GPUs, predicted from its time on one: seconds, efficiency, memory and traffic.

    python benchmarks/scaling.py --parameters 860e6 --gpus 64 --nodes 8 --step_seconds 0.35
    torchrun --nproc_per_node 8 benchmarks/scaling.py --measure

A ring of n processes sends each byte of an all-gather or a reduce-scatter (n - 1) / n times per process, and of an
all-reduce, which is one after the other, twice that (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002).
It is as fast as its slowest link: the network between nodes, if there are several. DDP sends gradients while the
backward pass, two thirds of a step, makes more of them: what is left over is seen, and at least the last bucket. FSDP2
gathers the weights for the forward pass, and again for the backward pass, and scatters the gradients: at least the
first block and the last are seen. Left out are start-up times of messages, and waiting for the slowest process.

--measure times an all-reduce of the processes that torchrun started, on GPUs or else CPUs, and says what to give as
--intra_gbps (on one node) or --inter_gbps (on several). Both are Gbit/s in one direction: intra of a GPU, inter of a
whole node.
"""

import argparse
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from measure import table

BYTES_HELD = {"weights": 4, "average": 4, "gradients": 4, "Adam's moments": 8}  # a parameter, all float32
BACKWARD_SHARE = 2 / 3  # of a step
BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb
NUM_BLOCKS = 32  # that FSDP2 gathers one by one; about that of Stable Diffusion's U-Net

MEASURED_BYTES = 256 * 2**20
MEASURED_REPEATS = 5  # the fastest counts


@dataclass(frozen=True)
class Cluster:
    """GPUs on nodes, as many on each, and the Gbit/s of each GPU within its node, and of each node."""

    gpus: int
    nodes: int
    intra_gbps: float
    inter_gbps: float

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < self.nodes or self.gpus % self.nodes:
            raise ValueError(
                f"gpus must be a multiple of nodes, got {self.gpus} on {self.nodes}; give those of all nodes"
            )

    def ring_seconds(self, num_bytes: float) -> float:
        """Of one all-gather or reduce-scatter of so many bytes in all; an all-reduce takes two."""
        gbps = self.intra_gbps if self.nodes == 1 else min(self.intra_gbps, self.inter_gbps)
        return ring_bytes(num_bytes, self.gpus) / (gbps * 1e9 / 8)


@dataclass(frozen=True)
class Prediction:
    """Of one GPU, and one optimiser step of one batch."""

    memory_bytes: float  # of what is held between steps, without activations
    sent_bytes: float
    communication_seconds: float
    seconds: float  # of the step


def ring_bytes(num_bytes: float, num_processes: int) -> float:
    """What each process sends in an all-gather or a reduce-scatter of so many bytes in all."""
    return num_bytes * (num_processes - 1) / num_processes


def predict_ddp(parameters: float, step_seconds: float, cluster: Cluster, *, gradient_bytes: int = 4) -> Prediction:
    """With gradients sent as float32, or as bfloat16 if they have 2 bytes."""
    sent = gradient_bytes * parameters
    taken = 2 * cluster.ring_seconds(sent)
    last = 2 * cluster.ring_seconds(min(sent, BUCKET_BYTES))
    seen = max(taken - BACKWARD_SHARE * step_seconds, last)
    memory = sum(BYTES_HELD.values()) * parameters
    return Prediction(memory, 2 * ring_bytes(sent, cluster.gpus), taken, step_seconds + seen)


def predict_fsdp2(parameters: float, step_seconds: float, cluster: Cluster) -> Prediction:
    """With everything shared out over all GPUs, weights gathered and gradients scattered as float32."""
    sent = 4 * parameters
    once = cluster.ring_seconds(sent)
    block = once / NUM_BLOCKS
    forward = max(once - (1 - BACKWARD_SHARE) * step_seconds, block)
    backward = max(2 * once - BACKWARD_SHARE * step_seconds, block)
    memory = sum(BYTES_HELD.values()) * parameters / cluster.gpus
    return Prediction(memory, 3 * ring_bytes(sent, cluster.gpus), 3 * once, step_seconds + forward + backward)


def measured_gbps(num_bytes: int = MEASURED_BYTES) -> float:
    """Gbit/s that each process of the group sends in an all-reduce of so many bytes."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    values = torch.ones(num_bytes // 4, device=device)
    taken = [_all_reduce_seconds(values) for _ in range(1 + MEASURED_REPEATS)][1:]  # the first one connects
    return 2 * ring_bytes(num_bytes, dist.get_world_size()) / min(taken) * 8 / 1e9


def _all_reduce_seconds(values: torch.Tensor) -> float:
    dist.all_reduce(values.zero_())  # all begin together
    _wait_for(values)
    start = time.perf_counter()
    dist.all_reduce(values)
    _wait_for(values)
    return time.perf_counter() - start


def _wait_for(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)


def main() -> None:
    options = parse_options()
    if options.measure:
        measure()
        return
    cluster = Cluster(options.gpus, options.nodes, options.intra_gbps, options.inter_gbps)
    given = (options.parameters, options.step_seconds, cluster)
    predictions = {
        "DDP": predict_ddp(*given),
        "DDP, gradients in bfloat16": predict_ddp(*given, gradient_bytes=2),
        "FSDP2": predict_fsdp2(*given),
    }
    print(table([row(name, one, options.step_seconds) for name, one in predictions.items()]))


def measure() -> None:
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(
            "--measure needs several processes: torchrun --nproc_per_node 8 benchmarks/scaling.py --measure"
        )
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    gbps = measured_gbps()
    if dist.get_rank() == 0:
        nodes = dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
        # All of a node's traffic to the next goes over the ring's one link between them.
        option = "--inter_gbps" if nodes > 1 else "--intra_gbps"
        print(
            table([{"processes": dist.get_world_size(), "nodes": nodes, "Gbit/s": f"{gbps:.1f}", "give it as": option}])
        )
    dist.destroy_process_group()


def row(name: str, one: Prediction, step_seconds: float) -> dict[str, object]:
    return {
        "strategy": name,
        "memory a GPU, GB": f"{one.memory_bytes / 1e9:.2f}",
        "sent a GPU and step, GB": f"{one.sent_bytes / 1e9:.2f}",
        "communication, s": f"{one.communication_seconds:.3f}",
        "step, s": f"{one.seconds:.3f}",
        "efficiency": f"{step_seconds / one.seconds:.0%}",
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parameters", type=float, default=860e6, help="of the network, all trained; default: 860e6")
    add("--gpus", type=int, default=8, help="on all nodes together; default: 8")
    add("--nodes", type=int, default=1)
    add("--step_seconds", type=float, default=0.35, help="of one GPU by itself, at the batch of one; default: 0.35")
    add("--intra_gbps", type=float, default=3600, help="default: 3600, what an H100's NVLink is sold as")
    add("--inter_gbps", type=float, default=3200, help="default: 3200, eight InfiniBand adapters of 400 a node")
    add("--measure", action="store_true", help="time an all-reduce of the processes of torchrun instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
