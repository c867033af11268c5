"""Networks out of Python: files of ONNX, and programs of torch.export, for any batch and size.

Each file describes itself: its metadata say what the network takes and gives, such as the pixels that an unpadded
network takes off each side, the `margin`. Outputs are compared with the network's, at another size than that which was
traced, before a folder gets its name.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from unet_diffusion.diffusion.conditions.condition import network_inputs
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.models.speed import set_speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import check_replaceable, put_folder
from unet_diffusion.runtime.imports import onnx_runtime

StrPath = str | os.PathLike[str]
PortableFormat = Literal["onnx", "torch"]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # for outputs of order 1
FREE = {  # dimensions of each input that may have any size: batch, tokens, height, width
    "x": (0, 2, 3),
    "latents": (0, 2, 3),
    "concat": (0, 2, 3),
    "t": (0,),
    "labels": (0,),
    "vector": (0,),
    "context": (0, 1),
}
OUTPUT = "output"  # the name of what each file gives
MIN_SIDE = 24  # pixels at least of what is traced; at a bottom of one pixel a size would count as fixed


def export_segmenter(
    network: PixelNetwork, metadata: Mapping[str, Any], folder: StrPath, *, format: PortableFormat, overwrite: bool
) -> None:
    """Write segmenter.onnx or segmenter.pt2, which maps images to scores before the softmax.

    Args:
        network: The network.
        metadata: The settings of the segmenter as plain values.
        folder: The folder to make; it appears whole or not at all.
        format: "onnx", or "torch" for torch.export.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        ImportError: If a package is missing.
        RuntimeError: If the file gives other results than the network.
    """
    examples = [_of_network(network, batch, side) for batch, side in ((2, MIN_SIDE), (1, 2 * MIN_SIDE))]
    described = {**facts_of(network), **metadata}
    _write_folder(folder, {"segmenter": (network, examples, described)}, format=format, overwrite=overwrite)


def export_denoiser(parts: DenoiserParts, folder: StrPath, *, format: PortableFormat, overwrite: bool) -> None:
    """Write denoiser.onnx or .pt2, and for a denoiser of latents the decoder of normalised latents beside it.

    Conditions are inputs of the denoiser as the network takes them, such as `context`; a text encoder is not part of
    it.

    Args:
        parts: The denoiser.
        folder: The folder to make; it appears whole or not at all.
        format: "onnx", or "torch" for torch.export.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        ImportError: If a package is missing.
        RuntimeError: If a file gives other results than its network.
    """
    parts = parts.merged()
    channels = parts.sample_shape[0]
    examples = []
    for batch, side in ((2, MIN_SIDE), (1, 2 * MIN_SIDE)):
        inputs = _of_network(parts.unet, batch, side)
        shape = (channels, inputs["x"].shape[2], inputs["x"].shape[3])
        entries = {one.batch_key: one.cpu().example(batch, shape) for one in parts.all_conditions}
        with torch.no_grad():
            beside = network_inputs(parts.all_conditions, entries)
        examples.append({"x": inputs["x"][:, :channels], "t": torch.arange(batch) * 3 + 1, **beside})
    described = {**facts_of(parts.unet), "schedule": parts.schedule.config, "sample_shape": list(parts.sample_shape)}
    described |= {"class_names": parts.class_names, "null_label": parts.null_label, "values": parts.values.plain()}
    networks: dict[str, Exported] = {"denoiser": (parts.unet, examples, described)}
    if isinstance(parts.codec, LatentCodec):
        decoder = Decoder(parts.codec.autoencoder, parts.codec.space)
        networks["decoder"] = _as_decoder(decoder, channels, parts.codec.downsampling, is_normalised=True)
    _write_folder(folder, networks, format=format, overwrite=overwrite)


def export_decoder(
    autoencoder: nn.Module,
    channels: int,
    downsampling: int,
    folder: StrPath,
    *,
    format: PortableFormat,
    overwrite: bool,
) -> None:
    """Write decoder.onnx or .pt2, which maps latents, not normalised, to images.

    Args:
        autoencoder: The autoencoder.
        channels: Channels of its latents.
        downsampling: The height of an image divided by the height of its latents.
        folder: The folder to make; it appears whole or not at all.
        format: "onnx", or "torch" for torch.export.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        ImportError: If a package is missing.
        RuntimeError: If the file gives other results than the autoencoder.
    """
    decoder = _as_decoder(Decoder(autoencoder, None), channels, downsampling, is_normalised=False)
    _write_folder(folder, {"decoder": decoder}, format=format, overwrite=overwrite)


class Decoder(nn.Module):
    """The decoder of an autoencoder, from latents to images in about [-1, 1].

    Args:
        autoencoder: The autoencoder.
        space: The normalisation of the latents; None: they are not normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: nn.Module, space: Any):
        super().__init__()
        self.autoencoder: Any = autoencoder
        moments = ([0.0], [1.0]) if space is None else (space.mean, space.std)
        for name, values in zip(("mean", "std"), moments, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents * self.std + self.mean).sample


def facts_of(network: PixelNetwork) -> dict[str, int]:
    """What a caller has to know of a network: its channels, the sizes that it takes, and its margin in pixels."""
    names = ("in_channels", "out_channels", "margin", "size_step", "smallest_size")
    return {name: getattr(network, name) for name in names}


Exported = tuple[nn.Module, list[dict[str, Tensor]], dict[str, Any]]  # network, inputs to trace and to try, metadata


def _of_network(network: PixelNetwork, batch: int, side: int) -> dict[str, Tensor]:
    """Inputs of a network: images of a size that it takes, whose sides differ, and timesteps if it takes them."""
    height = network.next_size(network.smallest_size + side)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, network.in_channels, height, height + network.size_step, generator=generator)
    return {"x": x} if network.time_embedding is None else {"x": x, "t": torch.arange(batch) * 3 + 1}


def _as_decoder(decoder: nn.Module, channels: int, downsampling: int, *, is_normalised: bool) -> Exported:
    generator = torch.Generator().manual_seed(0)
    examples = [{"latents": torch.randn(batch, channels, side, side + 2, generator=generator)}
                for batch, side in ((2, 6), (1, 10))]  # fmt: skip
    return decoder, examples, {"channels": channels, "downsampling": downsampling, "is_normalised": is_normalised}


def _write_folder(
    folder: StrPath, networks: Mapping[str, Exported], *, format: PortableFormat, overwrite: bool
) -> None:
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    write = {"onnx": _write_onnx, "torch": _write_program}[format]
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name, (network, examples, metadata) in networks.items():
            write(network, examples, metadata, partial / f"{name}{SUFFIXES[format]}")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def _traced(network: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, ExportedProgram]:
    """A copy of the network as it computes plainly in float32, and its program, with free dimensions."""
    plain = copy.deepcopy(network).cpu().float().eval()
    set_speed(plain, "plain")
    free = {name: dict.fromkeys(FREE[name], Dim.DYNAMIC) for name in inputs}
    return plain, torch.export.export(plain, (), inputs, dynamic_shapes=free, strict=False)


def _write_program(
    network: nn.Module, examples: list[dict[str, Tensor]], metadata: Mapping[str, Any], file: Path
) -> None:
    plain, program = _traced(network, examples[0])
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        _check_equal(file, plain(**examples[1]), loaded(**examples[1]))


def _write_onnx(network: nn.Module, examples: list[dict[str, Tensor]], metadata: Mapping[str, Any], file: Path) -> None:
    runtime = onnx_runtime()
    plain, program = _traced(network, examples[0])
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, output_names=[OUTPUT])
    assert onnx_program is not None
    onnx_program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    onnx_program.save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in examples[1].items()})
    with torch.no_grad():
        _check_equal(file, plain(**examples[1]), torch.from_numpy(output))


def _check_equal(file: Path, expected: Tensor, got: Tensor) -> None:
    difference = float((expected - got).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= TOLERANCE:  # this form refuses nan, too
        raise RuntimeError(f"{file.name} must give the network's results, but they differ by {difference:.1e}; nothing "
                           "was exported")  # fmt: skip
