"""A segmenter whose network is a file of ONNX, run by ONNX Runtime on the CPU."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from unet_diffusion.inference.record_checks import RULES, check_fields
from unet_diffusion.inference.segmenter import Segmenter, fields_of
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.imports import onnx_runtime

StrPath = str | os.PathLike[str]
FILE = "segmenter.onnx"
COUNTS = ("in_channels", "out_channels", "size_step", "smallest_size")  # in the metadata, beside margin


def onnx_file(path: StrPath) -> Path | None:
    """The file of ONNX of a segmenter at a path, which is the file or its folder; None if there is none."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    return file if file.suffix == ".onnx" and file.is_file() else None


def read_onnx_segmenter(file: Path) -> "OnnxSegmenter":
    """The segmenter in a file that `Segmenter.export` wrote with format "onnx".

    Raises:
        ImportError: If ONNX Runtime is missing.
        ValueError: If the file is no such segmenter.
    """
    network = OnnxNetwork(file)
    rules = {name: rule for name, rule in RULES["segmenter"].items() if name != "unet"}
    try:
        check_fields(network.metadata, rules)
    except ValueError as error:
        raise ValueError(f"{file} is no segmenter that was exported here: {error}") from error
    return OnnxSegmenter(network, **fields_of(network.metadata))


class OnnxNetwork(PixelNetwork):
    """A network in a file of ONNX, which is called as any other, on the CPU and in float32.

    Args:
        file: The file; its metadata give channels, sizes and margin.

    Raises:
        ImportError: If ONNX Runtime is missing.
        ValueError: If the file is not ONNX, or lacks metadata.
    """

    def __init__(self, file: Path):
        super().__init__()
        runtime = onnx_runtime()
        try:
            self.session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
            texts = self.session.get_modelmeta().custom_metadata_map
            self.metadata = {name: json.loads(text) for name, text in texts.items()}
        except Exception as error:  # each of ONNX Runtime's errors is a class of its own, directly below Exception
            raise ValueError(f"{file} cannot be read as ONNX: {str(error).splitlines()[0]}") from error
        counts = [self.metadata.get(name) for name in (*COUNTS, "margin")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{file} must have {', '.join(COUNTS)} and margin in its metadata; export it again")
        self.config = {name: self.metadata[name] for name in ("in_channels", "out_channels")}
        self.config["sha256"] = _sha256(file)
        self.size_step, self.margin = self.metadata["size_step"], self.metadata["margin"]
        self.inputs = [one.name for one in self.session.get_inputs()]
        if "t" in self.inputs:
            self.time_embedding = nn.Identity()  # it is in the file

    @property
    def smallest_size(self) -> int:
        """The least height and width of an input, in pixels."""
        return self.metadata["smallest_size"]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the scores before the softmax, (B, out_channels, H - 2 margin, W - 2 margin).

        Args:
            x: Images, (B, in_channels, H, W), of a size that `check_size` accepts.
            t: Timesteps, (B,); None for a network without them.
        """
        self.check_size(*x.shape[-2:])
        given = {"x": x.numpy()} if t is None else {"x": x.numpy(), "t": t.numpy()}
        return torch.from_numpy(self.session.run(None, given)[0])


def _sha256(file: Path) -> str:
    """A hash of the file, and of the weights beside it where they are too large for it."""
    digest = hashlib.sha256()
    for part in (file, file.with_name(f"{file.name}.data")):
        if part.is_file():
            with part.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class OnnxSegmenter(Segmenter):
    """A segmenter from a file of ONNX. It segments as any other; its weights cannot be saved or trained."""

    def to(self, device: Any = "auto", *, precision: Any = "auto", speed: Any = None) -> Self:
        """The segmenter itself, which stays on the CPU in float32.

        Raises:
            ValueError: If another device, precision or speed is asked for.
        """
        asked = {"device": str(device), "precision": precision, "speed": speed}
        for name, value in asked.items():
            if value not in (None, "auto", {"device": "cpu", "precision": "float32", "speed": "plain"}[name]):
                raise ValueError(f"a file of ONNX runs on the CPU in float32, got {name} {value}; leave it out")
        return self

    def save(self, path: StrPath) -> None:
        """Not possible: the weights are in the file of ONNX.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a file of ONNX cannot become a checkpoint; copy the file")

    def export(self, folder: StrPath, **options: Any) -> None:
        """Not possible: it is exported already.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a file of ONNX is exported already; copy the file")

    save_pretrained = export
