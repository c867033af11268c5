"""Windows against the single pass, an oracle and a written-out mean."""

import itertools

import pytest
import torch

from unet_diffusion.diffusion import tiling as windows
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import sample
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.diffusion.tiling import blend_weights, window_starts, windowed

SCHEDULE = NoiseSchedule(100, beta_end=0.2)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixelwise(x, t):
    """A denoiser that sees one pixel at a time, so that windows do not matter."""
    return torch.tanh(1.3 * x + 0.01 * t.view(-1, 1, 1, 1))


def bordered(x, t):
    """A denoiser whose prediction depends on where a pixel lies in what it is given, as padding makes it."""
    return torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1) + t.view(-1, 1, 1, 1)


def sampled(denoiser, shape, **options):
    return sample(denoiser, SCHEDULE, shape, num_inference_steps=10, **options)


@pytest.mark.parametrize("window", [(8, 12), (9, 100)])
def test_window_that_covers_the_image_gives_the_single_pass(window):
    assert torch.equal(sampled(windowed(bordered, window), (2, 1, 8, 12)), sampled(bordered, (2, 1, 8, 12)))


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (5, 30), (31, 17)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_windows_of_a_denoiser_of_single_pixels_leave_no_seam(size, overlap):
    x, t = noise(2, 1, *size), torch.tensor([3, 70])
    # the weights of a pixel sum to 1 up to float32's 6e-8 times the number of windows there
    torch.testing.assert_close(windowed(pixelwise, (8, 8), overlap=overlap)(x, t), pixelwise(x, t), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_denoiser_that_knows_x0_gives_x0_through_windows(scheduler):
    x0 = noise(1, 1, 20, 28).clamp(-1, 1)
    places = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(28.0), indexing="ij"))[None]

    def oracle(x, t, concat):
        """Knows x0 at the places that it is told."""
        part = x0[:, :, concat[0, 0].long(), concat[0, 1].long()].view(1, 1, *x.shape[2:])
        a = SCHEDULE.alphas_cumprod.double()[t.long()].view(-1, 1, 1, 1)
        return ((x - a.sqrt() * part) / (1 - a).sqrt()).float()

    images = sampled(windowed(oracle, (8, 8), batch_size=1), x0.shape, scheduler=scheduler, inputs={"concat": places})
    torch.testing.assert_close(images, x0, atol=1e-5, rtol=0)  # as without windows


def test_prediction_is_the_mean_of_the_windows_weighted_towards_their_middles():
    x, t = noise(1, 1, 4, 6), torch.tensor([0])
    left, right = bordered(x[..., :4], t), bordered(x[..., 2:], t)
    ramp = torch.tensor([0.5, 1, 1, 0.5])  # distances 1 2 2 1 from the border, over an overlap of 2
    share = ramp[2:] / (ramp[2:] + ramp[:2])
    middle = left[..., 2:] * share + right[..., :2] * (1 - share)
    expected = torch.cat([left[..., :2], middle, right[..., 2:]], dim=3)
    torch.testing.assert_close(windowed(bordered, (4, 4))(x, t), expected)


@pytest.mark.parametrize(("batch_size", "calls"), [(1, [2] * 9), (7, [6] * 3), (18, [18]), (64, [18])])
def test_windows_together_make_no_difference_and_stay_below_the_limit(batch_size, calls):
    seen = []

    def denoiser(x, t, labels):
        seen.append(len(x))
        return bordered(x, t) + labels.view(-1, 1, 1, 1)

    x, t, labels = noise(2, 1, 16, 16), torch.tensor([3, 70]), torch.tensor([0, 5])
    blended = windowed(denoiser, (8, 8), batch_size=batch_size)(x, t, labels=labels)
    assert seen == calls  # of two images: at least one window of each
    singles = [windowed(denoiser, (8, 8))(x[i : i + 1], t[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(blended, torch.cat(singles))


def test_guidance_is_wrapped_around_windows():
    def denoiser(x, t, labels):
        return bordered(x, t) * (1 + labels.view(-1, 1, 1, 1))

    conditions = {"inputs": {"labels": torch.tensor([0, 1])}, "unconditional": {"labels": torch.tensor([2, 2])}}
    images = sampled(windowed(denoiser, (8, 8)), (2, 1, 8, 8), guidance=Guidance(2.0), **conditions)
    assert torch.equal(images, sampled(denoiser, (2, 1, 8, 8), guidance=Guidance(2.0), **conditions))

    def guided(x, t):
        worse, better = (denoiser(x, t, torch.tensor(labels * (len(x) // 2))) for labels in ([2, 2], [0, 1]))
        return worse + 2 * (better - worse)

    wide = sampled(windowed(denoiser, (8, 8)), (2, 1, 8, 20), guidance=Guidance(2.0), **conditions)
    # guidance is linear, so that it does not matter which comes first, up to rounding over ten steps
    torch.testing.assert_close(wide, sampled(windowed(guided, (8, 8)), (2, 1, 8, 20)), atol=1e-5, rtol=1e-5)


def column_borders(width, window, overlap):
    """The last column before each place within an image where a window begins or ends."""
    starts = window_starts(width, window, overlap)
    return sorted({end - 1 for start in starts for end in (start, start + window) if 0 < end < width})


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_wide_prediction_is_that_of_the_single_pass_where_windows_see_as_much(overlap):
    x, t, reach = noise(2, 1, 16, 100), torch.tensor([3, 70]), 1  # pixels that `bordered` sees to each side
    wide, single = windowed(bordered, (32, 32), overlap=overlap)(x, t), bordered(x, t)
    touched = {c + d for c in column_borders(100, 32, overlap) for d in range(1 - reach, 1 + reach)}
    untouched = [column for column in range(100) if column not in touched]
    assert len(untouched) > 50
    torch.testing.assert_close(wide[..., untouched], single[..., untouched])


def blurring(x, t):
    """A denoiser of what is smooth, the same everywhere but for the zeros beyond the border of what it is given."""
    return 0.3 * x + 2 * torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)


def step_at_borders(overlap):
    """How large steps between neighbouring columns of wide images are where windows end, for 1 elsewhere."""
    images = sampled(windowed(blurring, (32, 32), overlap=overlap), (8, 1, 32, 96))
    steps = images.diff(dim=3).abs().mean(dim=(0, 1, 2))[4:-4]  # without the border of the image, which has zeros too
    at_border = torch.zeros(96, dtype=torch.bool)
    at_border[column_borders(96, 32, overlap)] = True
    at_border = at_border[4:-5]
    return (steps[at_border].mean() / steps[~at_border].mean()).item()


@pytest.fixture
def forget_layouts():
    """Layouts are kept, with the weights that they were made with."""
    windows._layout.cache_clear()
    yield
    windows._layout.cache_clear()


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_wide_images_have_no_seam_where_windows_end(overlap, forget_layouts, monkeypatch):
    assert step_at_borders(overlap) < 1.25  # 1.18 and 1.14
    windows._layout.cache_clear()
    monkeypatch.setattr(windows, "blend_weights", lambda size, overlap: torch.ones(*size))
    assert step_at_borders(overlap) > 1.5  # the plain mean of windows shows them: 1.75 and 2.34
    assert step_at_borders(0.0) > 3  # as windows side by side do


@pytest.mark.parametrize(("side", "window", "overlap"), [(64, 8, 0.5), (9, 8, 0.5), (100, 7, 0.9), (3, 8, 0.5)])
def test_windows_cover_the_side_and_overlap_enough(side, window, overlap):
    starts = window_starts(side, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(side - window, 0)
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < step <= window * (1 - overlap) + 1 for step in steps)  # 1: they start at whole pixels


def test_blend_weights_are_positive_and_the_same_from_all_sides():
    weights = blend_weights((6, 6), 0.5)
    assert weights.min() > 0
    assert torch.equal(weights, weights.flip(0))
    assert torch.equal(weights, weights.T)


@pytest.mark.parametrize("wrong", [{"window": (0, 8)}, {"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}])
def test_windows_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least 1 and overlap in \[0, 1\)"):
        windowed(pixelwise, **{"window": (8, 8), **wrong})
