"""Shares the weights of networks out over all processes (FSDP2), each of which then holds a part of each weight."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from unet_diffusion.models.attention import SelfAttention, SpatialTransformer
from unet_diffusion.models.double_conv import DoubleConv
from unet_diffusion.models.layers import Downsample, Upsample
from unet_diffusion.models.residual_blocks import ResidualBlock

# The modules whose weights are gathered at once. Not whole levels: those of the expanding path take their skips off a
# list, of which FSDP2 hands on a copy.
SHARDED = (DoubleConv, Downsample, ResidualBlock, SelfAttention, SpatialTransformer, Upsample)


def shard(networks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Share networks out over the processes of a mesh, block by block.

    Args:
        networks: The networks and their averages.
        mesh: The processes.
    """
    for network in networks:
        if not list(network.parameters()):
            continue
        for block in network.modules():
            if isinstance(block, SHARDED):
                fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # the average is called without a backward
