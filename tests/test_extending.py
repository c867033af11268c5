"""The examples of docs/extending.md, as written; and what is refused of classes of a user's own before training."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import unet_diffusion
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.latents.codec import Codec, LatentCodec
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.training import AutoencoderModule
from unet_diffusion.training.callbacks import ReconstructionGrid, SampleGrid

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
TINY_RUN = shlex.split(
    "--data.image_size 16 --data.batch_size 4 --data.num_val 2 --model.speed plain --trainer.accelerator cpu "
    "--trainer.max_steps 2 --samples.num_images 2 --samples.num_inference_steps 2"
)
TINY_U = shlex.split("--model.unet.channels [8,8,8,8] --model.unet.norm_num_groups 4 --model.unet.head_channels 4")
EXAMPLES = {  # heading: file, its options in a tiny run, why diffusers has no counterpart
    "A condition": ("ages", TINY_U, "no pipeline of diffusers takes the condition Age"),
    "A network": ("stack", [], "only a DenoiserUNet has a counterpart in diffusers, got a Stack"),
    "A codec": ("blocks", TINY_U, "no pipeline of diffusers decodes with the codec Blocks"),
}


def blocks_of(heading: str, language: str) -> str:
    """The first block of code in a language below a heading of the page."""
    return PAGE.partition(f"## {heading}\n")[2].partition(f"```{language}\n")[2].partition("```")[0]


@pytest.mark.parametrize("heading", EXAMPLES)
def test_example_of_the_page_is_trained_continued_drawn_with_and_refused_by_name(
    run_cli, tmp_path, monkeypatch, caplog, heading
):
    module, options, reason = EXAMPLES[heading]
    (tmp_path / f"{module}.py").write_text(blocks_of(heading, "python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    (tmp_path / "faces").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(256, size=(10, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "faces" / f"face{index}_{20 + index}.png")
    fit, draw = (shlex.split(line)[1:] for line in blocks_of(heading, "bash").splitlines())

    status, _, err = run_cli(*fit, *TINY_RUN, *options)
    assert status == 0, err
    said = f"this run exports no pipeline: {reason}; draw images with unet-diffusion sample"
    assert caplog.text.index(said) < caplog.text.index("max_steps=2` reached")
    run = f"runs/{module}"
    assert f"to draw images: unet-diffusion sample {run} --allow {module} --output DIR" in caplog.text
    status, _, err = run_cli(*fit, *TINY_RUN, *options, "--trainer.max_steps", "3")
    assert status == 0, err
    assert f"{run} holds this run; it continues from step 2" in caplog.text

    tiny = ["--num_images", "2", "--num_inference_steps", "2", "--device", "cpu"]
    status, _, err = run_cli(*draw, *tiny)
    assert status == 0, err
    status, _, err = run_cli("sample", run, *tiny)
    assert (status != 0, f"allow it with --allow {module}" in err) == (True, True)
    status, _, err = run_cli("export", run, "pipeline", "--allow", module)
    assert (status != 0, reason in err) == (True, True)

    (call,) = re.findall(rf'draw with\s`(unet_diffusion\.load\("{run}", .*)`', PAGE)
    assert eval(call, {"unet_diffusion": unet_diffusion}).shape == (4, 3, 16, 16)


# ------------------------------------------------------------------------------------------------ refused at the start


class NoConfig(Condition):
    batch_key, network_argument = "age", "vector"

    def __init__(self, width: int = 3):
        super().__init__(0.0)


class NoWidth(NoConfig):
    network_argument = "context"

    def __init__(self, width: int = 3):
        super().__init__(width)
        self.config = {"width": width}


class NoChannels(NoWidth):
    network_argument = "concat"


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (NoConfig, "NoConfig must set self.config to a dict of its constructor's arguments, got nothing"),
        (NoWidth, "NoWidth gives the network 'context' and must have its width as an argument context_dim"),
        (NoChannels, "NoChannels gives the network 'concat' and must have its width as an argument channels"),
    ],
)
def test_condition_that_a_checkpoint_cannot_hold_is_refused_before_training(tiny_module, condition, said):
    with pytest.raises(ValueError, match=said):
        tiny_module(conditions=[condition()])


class Halves(Codec):
    """Images of half the contrast."""

    def __init__(self, scale: float = 0.5, config: bool = True):
        if config:
            self.config = {"scale": scale, "config": config}
        self.scale = scale

    def sample_shape(self, image_shape):
        return image_shape

    def image_shape(self, sample_shape):
        return sample_shape

    def encode(self, images, generator=None):
        return images * self.scale

    def decode(self, x0):
        return x0.float().cpu() / self.scale


class OtherLatents(LatentCodec):
    pass


def test_codec_that_a_checkpoint_cannot_hold_is_refused_before_training(tiny_module):
    with pytest.raises(ValueError, match=r"Halves must set self\.config to a dict of its constructor's arguments"):
        tiny_module(codec=Halves(config=False))
    with pytest.raises(ValueError, match=r"OtherLatents must set self\.config"):
        tiny_module(codec=OtherLatents("autoencoder"))


def test_run_is_not_continued_with_another_codec(tiny_module, tiny_images, quiet_trainer, tmp_path):
    data = tiny_images(class_names=None)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(codec=Halves()), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for other in (Halves(0.25), None):
        with pytest.raises(ValueError, match="codec"):
            quiet_trainer(max_steps=2).fit(tiny_module(codec=other), data, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="allow it with --allow"):
        unet_diffusion.load(tmp_path / "last.ckpt")
    loaded = unet_diffusion.load(tmp_path / "last.ckpt", allow=[__name__])
    assert loaded.codec.config == {"scale": 0.5, "config": True}
    images = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), images)


class Wavy(DenoiserUNet):
    """Inherits from a network that diffusers has, and computes something else."""

    def forward(self, x, t, labels=None, context=None):
        return super().forward(x, t, labels, context=context).sin()


def test_network_that_inherits_from_one_of_diffusers_is_refused_by_name(tiny_module, tiny_images, tmp_path):
    torch.manual_seed(0)
    module = tiny_module(unet=Wavy(1, (8, 16), norm_num_groups=4, layers_per_block=1))
    module.sample_shape = (1, 8, 8)
    with pytest.raises(ValueError, match="only a DenoiserUNet has a counterpart in diffusers, got a Wavy"):
        module.trained.export(tmp_path / "pipeline")


# ---------------------------------------------------------------------------------------------------- data of one's own


def test_images_of_two_channels_are_drawn_in_red_and_green(
    tiny_module, tiny_unet, tiny_images, quiet_trainer, run_cli, tmp_path
):
    module, data = tiny_module(unet=tiny_unet(in_channels=2)), tiny_images(class_names=None, shape=(2, 8, 8))
    trainer = quiet_trainer(max_steps=1, callbacks=[SampleGrid(num_images=4)])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = unet_diffusion.load(tmp_path / "last.ckpt")
    images = loaded.sample(3, num_inference_steps=2).clamp(-1, 1)
    sample = ("--num_images", 3, "--num_inference_steps", 2, "--precision", "float32", "--device", "cpu")
    status, _, err = run_cli("sample", tmp_path / "last.ckpt", "--output", tmp_path / "drawn", *sample)
    assert status == 0, err
    drawn = np.stack([tifffile.imread(path) for path in sorted((tmp_path / "drawn").glob("0*.tif"))])
    np.testing.assert_array_equal(drawn, np.rint((images.double().numpy() + 1) * 127.5).astype(np.uint8))
    assert not np.asarray(Image.open(tmp_path / "samples.png"))[2:66, 2:66, 2].any()


def test_autoencoder_of_two_channels_draws_its_reconstructions(tiny_images, quiet_trainer, tmp_path):
    small = {"latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
    module = AutoencoderModule(kl_autoencoder(2, (8, 8), **small))
    trainer = quiet_trainer(max_steps=1, callbacks=[ReconstructionGrid()])
    trainer.fit(module, tiny_images(shape=(2, 16, 16)))
    assert Image.open(tmp_path / "samples.png").mode == "RGB"


BATCHES = {
    "a list": TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4)),
    "entries pixel_values, index": [{"pixel_values": torch.zeros(1, 8, 8), "index": index} for index in range(4)],
    "a Tensor": torch.zeros(4, 1, 8, 8),
}


@pytest.mark.parametrize("got", BATCHES)
def test_batch_of_another_form_is_refused_by_what_it_must_be(tiny_module, quiet_trainer, got):
    with pytest.raises(ValueError, match=rf'a batch must be a dict with "images" \(B, C, H, W\).*got {got}; make'):
        quiet_trainer(max_steps=1).fit(tiny_module(), DataLoader(BATCHES[got], batch_size=2))


def test_batch_without_numbers_is_refused_where_it_is_validated(tiny_module, quiet_trainer):
    numbered = [{"images": torch.zeros(1, 8, 8), "index": index} for index in range(4)]
    others = [{"images": torch.zeros(1, 8, 8)} for _ in range(4)]
    with pytest.raises(ValueError, match=r'and "index".*got entries images; make such a dict'):
        quiet_trainer(max_steps=1).fit(tiny_module(), *(DataLoader(one, batch_size=2) for one in (numbered, others)))
