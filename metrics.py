"""How far two sets of images are apart: the measures that papers report, on the features of any
network.

    Fréchet distance     between Gaussians that are fitted to the features of both sets. With the
                         features of Inception it is called FID (arXiv 1706.08500)
    precision, recall    the fraction of generated images that lie among the real ones, and of real
                         images that lie among the generated ones (arXiv 1904.06991)

50,000 images with 2,048 features need less than 4 GB.
"""

import torch

from files import UserError


def moments(features):
    """The mean (d,) and the covariance (d, d), in float64, of features (N, d). Raises UserError
    where a feature is not finite. (A Gaussian in d features needs more than d images.)"""
    features = features.double()
    mean = features.mean(dim=0)
    if not mean.isfinite().all():
        raise UserError("some features are not finite: do some images hold NaN, or infinity?")
    return mean, features.T.cov()


def frechet(a, b) -> float:
    """The Fréchet distance between two Gaussians (mean, covariance), squared as in all papers,

        ‖μ_a − μ_b‖² + tr(C_a + C_b − 2·(C_a C_b)^½)                     (FID, arXiv 1706.08500)

    where the trace of the root is the sum of the square roots of the eigenvalues of C_a C_b."""
    mean_a, cov_a = a
    mean_b, cov_b = b
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b)  # ≥ 0, but for rounding
    distance = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace()
    distance -= 2 * eigenvalues.sqrt().real.sum()
    return distance.item()


def coverage(points, by, k: int = 3, at_once: int = 1000) -> float:
    """The fraction of `points` (N, d) that lie in some ball of `by` (M, d). A ball is centred at a
    point of `by`, and reaches to that point's k-th neighbour. Precision is coverage(generated,
    by=real), recall is coverage(real, by=generated) (arXiv 1904.06991). Distances of `at_once`
    points are computed at a time, to save memory."""
    radii, inside = [], []
    for rows in by.split(at_once):
        nearest = torch.cdist(rows, by).kthvalue(k + 1)                     # the first: itself
        radii.append(nearest.values)
    radius = torch.cat(radii)                                               # (M,)
    for rows in points.split(at_once):
        within = torch.cdist(rows, by) <= radius
        inside.append(within.any(dim=1))
    return torch.cat(inside).double().mean().item()
