"""How far two sets of images are apart: the measures of papers, on the features of any network.

    Fréchet distance     between Gaussians that are fitted to the features of both sets. With the
                         features of Inception it is called FID (arXiv 1706.08500)
    precision, recall    the fraction of generated images that lie among the real ones, and of real
                         images that lie among the generated ones (arXiv 1904.06991)
    Inception Score      high where each image is clearly of one class, and all classes occur
                         (arXiv 1606.03498)

All of them take the images in pieces: 50,000 images with 2,048 features need less than 4 GB.
"""

import torch

from files import UserError


def moments(features, at_once: int = 1000):
    """The mean (d,) and the covariance (d, d), in float64, of features (N, d). Raises UserError
    where N images are too few for d features, and where a feature is not finite."""
    count, d = features.shape
    if count <= d:
        raise UserError(f"a Gaussian in {d:,} features needs more than {d:,} images, not {count:,}")
    mean = torch.zeros(d, dtype=torch.float64, device=features.device)
    for rows in features.split(at_once):
        mean += rows.double().sum(dim=0) / count
    if not mean.isfinite().all():
        raise UserError("some features are not finite: do some images hold values that are not?")
    covariance = torch.zeros(d, d, dtype=torch.float64, device=features.device)
    for rows in features.split(at_once):
        centred = rows - mean
        covariance += centred.T @ centred / (count - 1)
    return mean, covariance


def frechet(a, b) -> float:
    """The Fréchet distance between two Gaussians (mean, covariance), squared as in all papers,

        ‖μ_a − μ_b‖² + tr(C_a + C_b − 2·(C_a C_b)^½)                     (FID, arXiv 1706.08500)

    where C_a C_b has the eigenvalues of C_a^½ C_b C_a^½, which is symmetric."""
    mean_a, cov_a = a
    mean_b, cov_b = b
    values, vectors = torch.linalg.eigh(cov_a)
    values = values.clamp(min=0)
    root = vectors * values.sqrt() @ vectors.T                              # C_a^½
    product = root @ cov_b @ root
    values = torch.linalg.eigvalsh(product).clamp(min=0)                    # of C_a C_b
    distance = (mean_a - mean_b).square().sum()
    distance += cov_a.trace() + cov_b.trace()
    distance -= 2 * values.sqrt().sum()
    return distance.item()


def coverage(points, by, k: int = 3, at_once: int = 1000) -> float:
    """The fraction of `points` (N, d) in the manifold of `by` (M, d): the union of balls around its
    points, each of which reaches to the k-th neighbour. Precision is coverage(generated, by=real),
    recall is coverage(real, by=generated) (arXiv 1904.06991). Raises UserError unless M > k."""
    if len(by) <= k:
        raise UserError(f"a point's {k} neighbours need more than {k} images, not {len(by)}")
    radii = []
    for rows in by.split(at_once):
        distances = torch.cdist(rows, by)
        nearest = distances.kthvalue(k + 1, dim=1)                          # the first: itself
        radii.append(nearest.values)
    radius = torch.cat(radii)                                               # (M,)
    covered = 0
    for rows in points.split(at_once):
        inside = torch.cdist(rows, by) <= radius
        covered += inside.any(dim=1).sum().item()
    return covered / len(points)


def inception_score(logits, split: int = 5000) -> float:
    """exp of the mean of KL(p(y|x) ‖ p(y)) over the images of a split; the average over splits of
    5,000 images. logits: (N, classes)."""
    scores = []
    for rows in logits.split(split):
        log_p = rows.double().log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0)
        divergence = (p * (log_p - marginal.log())).sum(dim=1)
        score = divergence.mean().exp()
        scores.append(score.item())
    return sum(scores) / len(scores)
