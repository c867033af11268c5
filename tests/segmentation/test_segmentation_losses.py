import pytest
import torch
import torch.nn.functional as F

from unet_diffusion.segmentation.losses import dice_loss, segmentation_loss, weighted_cross_entropy

SCORES = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
CLASSES = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(1))
ONES = torch.ones(2, 5, 7)


def test_cross_entropy_with_equal_weights_is_torchs():
    torch.testing.assert_close(weighted_cross_entropy(SCORES, CLASSES, ONES), F.cross_entropy(SCORES, CLASSES))


def test_cross_entropy_multiplies_each_pixel_by_its_weight():
    """Equation 1 of the paper, written out."""
    weights = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(2)) + 0.1
    log_p = torch.log(torch.exp(SCORES) / torch.exp(SCORES).sum(dim=1, keepdim=True))
    energy = -(weights * log_p.gather(1, CLASSES[:, None])[:, 0]).sum()
    torch.testing.assert_close(weighted_cross_entropy(SCORES, CLASSES, weights), energy / weights.numel())


@pytest.mark.parametrize("kind", ["cross_entropy", "dice", "both"])
def test_pixels_of_weight_0_change_nothing(kind):
    weights = ONES.clone()
    weights[0, :2] = 0
    changed_scores, changed_classes = SCORES.clone(), CLASSES.clone()
    changed_scores[0, :, :2] = 9.0
    changed_classes[0, :2] = -1
    expected = segmentation_loss(SCORES, CLASSES, weights, kind)
    torch.testing.assert_close(segmentation_loss(changed_scores, changed_classes, weights, kind), expected)


def test_cross_entropy_of_nothing_is_zero():
    assert weighted_cross_entropy(SCORES, CLASSES, 0 * ONES) == 0


def test_dice_of_a_sure_prediction_is_one_minus_the_dice_coefficient():
    predicted = CLASSES.roll(1, dims=2)
    sure = 50.0 * F.one_hot(predicted, 3).movedim(3, 1)
    coefficients = []
    for index in (1, 2):
        overlap = ((predicted == index) & (index == CLASSES)).sum()
        total = (predicted == index).sum() + (index == CLASSES).sum()
        coefficients.append((2 * overlap + 1) / (total + 1))  # smoothed by a pixel
    torch.testing.assert_close(dice_loss(sure, CLASSES, ONES), 1 - torch.stack(coefficients).mean())


def test_dice_of_a_class_that_is_neither_there_nor_predicted_is_no_loss():
    sure = 50.0 * F.one_hot(torch.zeros_like(CLASSES), 3).movedim(3, 1)
    torch.testing.assert_close(dice_loss(sure, torch.zeros_like(CLASSES), ONES), torch.tensor(0.0))


def test_both_is_the_sum():
    both = segmentation_loss(SCORES, CLASSES, ONES, "both")
    torch.testing.assert_close(both, weighted_cross_entropy(SCORES, CLASSES, ONES) + dice_loss(SCORES, CLASSES, ONES))
