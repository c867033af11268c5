"""Distances between two sets of images by their features."""

from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """The squared Fréchet distance of normal distributions with the moments of two sets, (N, d) and (M, d)."""
    statistics = [fid_features_to_statistics(features) for features in (generated, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
