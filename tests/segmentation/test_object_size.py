"""Images are scaled to objects of one size: those that are trained on by labels, others by what is found in them."""

import numpy as np
import pytest
import scipy.ndimage
import skimage
import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.data import PairedFiles, SegmentationDataModule
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.segmentation.object_size import median_diameter, scale_to, scaled_image, scaled_labels
from unet_diffusion.training import SegmentationModule
from unet_diffusion.training.joint import JointDenoising


def discs(radius: int, side: int = 96, num: int = 3) -> np.ndarray:
    """A label image of numbered discs."""
    labels = np.zeros((side, side), dtype=np.int32)
    for number in range(num):
        centre = (side // 4 + number % 2 * side // 2, side // 4 + number // 2 * side // 2)
        labels[skimage.draw.disk(centre, radius)] = number + 1
    return labels


class Bright(PixelNetwork):
    """Finds what is bright, of any size, and notes the sizes that it sees."""

    in_channels = 1

    def __init__(self) -> None:
        super().__init__()
        self.config = {"out_channels": 2}
        self.weight = torch.nn.Parameter(torch.tensor(50.0))
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        self.seen.append((x.shape[2], x.shape[3]))
        return torch.cat([-self.weight * x, self.weight * x], dim=1)


def finder(object_diameter: float | None) -> Segmenter:
    names = ["background", "cell"]
    return Segmenter(Bright(), "binary", names, None, False, window_size=512, object_diameter=object_diameter)


def as_image(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(labels > 0, 1.0, -1.0).astype(np.float32))[None]


def test_diameter_is_that_of_discs_of_the_same_area():
    labels = discs(10)
    labels[:2, :2] = 9  # a speck, which the median leaves aside
    diameters = [one.equivalent_diameter_area for one in skimage.measure.regionprops(labels)]
    assert median_diameter(labels) == pytest.approx(np.median(diameters))
    assert median_diameter(np.zeros((4, 4), dtype=np.int32)) is None
    labels[labels == 1] = 2**31 - 1  # a number, not a count: it takes no memory
    assert median_diameter(labels) == pytest.approx(np.median(diameters))


def test_scale_brings_objects_to_the_wanted_size_within_limits():
    assert (scale_to(20, 10), scale_to(20, 40), scale_to(20, None)) == (2, 0.5, 1)
    assert (scale_to(20, 1), scale_to(20, 1000)) == (4, 0.25)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.uint8, 1), (torch.float32, 1e-2)])  # Pillow rounds twice
def test_scaled_image_is_that_of_pillow(dtype, apart):
    pixels = np.random.default_rng(0).integers(256, size=(1, 30, 42), dtype=np.uint8)
    stored = pixels[0] if dtype == torch.uint8 else pixels[0].astype(np.float32)
    for size in ((15, 21), (45, 63)):
        expected = np.asarray(Image.fromarray(stored).resize(size[::-1], Image.Resampling.BILINEAR)).astype(float)
        image = scaled_image(torch.from_numpy(pixels).to(dtype), size)
        assert image.dtype == dtype
        assert np.abs(image[0].numpy().astype(float) - expected).max() <= apart


def test_scaled_labels_keep_their_numbers_and_shapes():
    labels = discs(10)
    labels[labels == 2] = 2**24 + 1  # which float32 does not hold
    larger = scaled_labels(labels, (192, 192))
    assert np.array_equal(larger, labels.repeat(2, axis=0).repeat(2, axis=1))
    assert np.array_equal(scaled_labels(larger, (96, 96)), larger[1::2, 1::2])


def test_segmenter_looks_twice_and_then_at_objects_of_its_size():
    segmenter, labels = finder(10), discs(10)  # 20 pixels across
    found = segmenter.segment(as_image(labels))
    first, *others = segmenter.unet.seen
    assert first == (96, 96)
    assert len(others) == 2
    assert all(abs(side - 48) <= 1 for size in others for side in size)
    assert found.instances.shape == (96, 96)
    both = ((found.instances > 0) & (labels > 0)).sum()
    assert 2 * both / ((found.instances > 0).sum() + (labels > 0).sum()) > 0.93
    assert scipy.ndimage.label(found.instances > 0)[1] == 3


def test_known_diameter_takes_one_look():
    segmenter = finder(10)
    segmenter.segment(as_image(discs(10)), diameter=40)
    assert segmenter.unet.seen == [(24, 24)]


def test_image_without_objects_keeps_its_size():
    segmenter = finder(10)
    assert not segmenter.segment(-torch.ones(1, 64, 64)).instances.any()
    assert segmenter.unet.seen == [(64, 64)]  # another look would see the same


def test_progress_rises_to_1_over_all_looks():
    shares: list[float] = []
    finder(10).segment(as_image(discs(10)), progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    shares.clear()
    finder(20).segment(as_image(discs(10)), progress=shares.append)  # of the right size at once
    assert shares == pytest.approx([1 / 3, 1])


def test_diameter_without_meaning_is_refused():
    with pytest.raises(ValueError, match="diameter is for a segmenter that scales images, got 12; leave it out"):
        finder(None).segment(as_image(discs(10)), diameter=12)
    for diameter in (0, 2, 41):
        with pytest.raises(ValueError, match=f"diameter must be from 2.5 to 40 pixels.* got {diameter}; scale the im"):
            finder(10).segment(as_image(discs(10)), diameter=diameter)
    with pytest.raises(ValueError, match="object_diameter must be at least 4 pixels, got 3"):
        Targets(label_format="instances", object_diameter=3)
    for options in ({"label_format": "classes", "num_classes": 2}, {"label_format": "0/1", "affinities": True}):
        with pytest.raises(ValueError, match="object_diameter needs objects, and no affinities"):
            Targets(**options, object_diameter=20)


def test_looks_are_at_the_threshold_that_is_asked_for():
    segmenter = finder(10)
    segmenter.unet.weight.data.fill_(0.2)  # probabilities of 0.6 within objects, and of 0.4 beside them
    segmenter.segment(as_image(discs(10)), threshold=0.7)
    assert set(segmenter.unet.seen) == {(96, 96)}  # no object is seen
    segmenter.segment(as_image(discs(10)), threshold=0.55)
    assert max(segmenter.unet.seen[-1]) < 60  # of 96, which is nearly half


def test_objects_of_nearly_the_wanted_size_are_left_as_they_are():
    assert scale_to(20, 20.9) == scale_to(20, 19.1) == 1
    assert scale_to(20, 22) == pytest.approx(20 / 22)


def write_discs(root) -> PairedFiles:
    """Discs of other sizes in each image: 20, 40, 60 and 20 pixels across."""
    for index, radius in enumerate((10, 20, 30, 10)):
        labels = discs(radius, side=128, num=1)
        for side, pixels in (("image", np.where(labels > 0, 200, 20)), ("label", labels)):
            (root / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / side / f"{index}.png")
    return PairedFiles(root / "image", root / "label")


def scaled_data(root, object_diameter: float | None = 20) -> SegmentationDataModule:
    targets = Targets(label_format="instances", object_diameter=object_diameter)
    return SegmentationDataModule(write_discs(root), targets, window_size=32, batch_size=2, num_val=1)


def test_images_that_are_trained_on_have_objects_of_one_size_and_others_keep_theirs(tmp_path):
    data = scaled_data(tmp_path)
    data.setup()
    for index in data.train_images.tolist():
        labels = data._learnt[index].classes.numpy().astype(np.int32)
        assert median_diameter(labels) == pytest.approx(20, rel=0.05)
        bright = data._scaled(index, data._sized[index])[0].numpy() > -0.14
        assert (bright == (labels > 0)).mean() > 0.99  # image and labels are scaled alike
    for index in range(4):
        assert data.whole(index)["images"].shape == (1, 128, 128)
    assert data.whole(0)["classes"].shape == (128, 128)
    line = "scaled: labelled images to train on, by 0.34 to 1, until the median diameter of their objects is 20 pixels"
    assert line in data.summary()


def test_images_beyond_the_limits_are_named(tmp_path):
    data = scaled_data(tmp_path, 200)
    data.setup()
    line = next(one for one in data.summary() if one.startswith("scaled:"))
    assert "by 3.3 to 4" in line
    assert line.endswith("2 would need more (0, 1)")


def test_threshold_is_fitted_on_images_that_are_trained_on(quiet_trainer, tmp_path):
    torch.manual_seed(0)
    made = SegmentationModule(SegmentationUNet(1, 2, channels=(4, 8), padding="same"))
    quiet_trainer(max_steps=1, val_check_interval=1).fit(made, scaled_data(tmp_path))
    assert 0 < made.threshold < 1


def test_joint_training_has_no_objects_of_one_size(quiet_trainer, tmp_path):
    unet = SegmentationUNet(1, 3, channels=(4, 8), padding="same", norm="group", timestep_embedding=True)
    made = SegmentationModule(unet, timestep=0, joint=JointDenoising(NoiseSchedule(100, "linear")))
    with pytest.raises(ValueError, match="joint denoises images without labels, whose objects have no known size"):
        quiet_trainer(max_steps=1).fit(made, scaled_data(tmp_path))


def test_checkpoint_keeps_the_size_and_a_run_must(quiet_trainer, tmp_path):
    def made() -> SegmentationModule:
        torch.manual_seed(0)
        return SegmentationModule(SegmentationUNet(1, 2, channels=(4, 8), padding="same"))

    trainer = quiet_trainer(max_steps=1, limit_val_batches=1)
    trainer.fit(made(), scaled_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert read_segmenter(tmp_path / "x.ckpt").object_diameter == 20
    with pytest.raises(ValueError, match="object_diameter was 20, is 30"):
        quiet_trainer(max_steps=2).fit(made(), scaled_data(tmp_path, 30), ckpt_path=tmp_path / "x.ckpt")


def test_command_takes_the_diameter(run_cli, tmp_path):
    write_discs(tmp_path)
    unet = SegmentationUNet(1, 2, channels=(4, 8), padding="same")
    names = ["background", "cell"]
    for name, diameter in (("plain", None), ("scaled", 20)):
        made = Segmenter(unet, "binary", names, None, False, window_size=64, object_diameter=diameter)
        made.save(tmp_path / f"{name}.ckpt")
    masks = ("--output", tmp_path / "masks", "--diameter", "40")
    status, _, err = run_cli("segment", tmp_path / "plain.ckpt", tmp_path / "image", *masks)
    assert status != 0
    assert "diameter is for a segmenter that scales images" in err
    assert not (tmp_path / "masks").exists()
    status, out, err = run_cli("segment", tmp_path / "scaled.ckpt", tmp_path / "image", *masks)
    assert status == 0, err
    assert "4 masks in" in out
