"""The measures against closed forms and slow, plain numpy, and against torch-fidelity on the same
features where that is installed."""

import numpy as np
import pytest
import torch

from files import UserError
from metrics import coverage, frechet, moments


def with_moments(mean, covariance, count=400, seed=0):
    """Points whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def some_features(count, d, seed=0, shift=0.0):
    """float32 features that are correlated, positive and of uneven size, as a network's are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((d, d)) / d**0.5
    mixed = rng.standard_normal((count, d)) @ mixing
    return torch.from_numpy(np.abs(mixed + shift) * np.linspace(0.1, 2, d)).float()


def test_moments_are_those_of_numpy():
    x = some_features(90, 7)
    mean, covariance = moments(x)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)


def test_frechet_of_independent_axes():
    """With diagonal covariances it is ‖Δμ‖² + Σ (σ_a − σ_b)²."""
    a = moments(with_moments([0, 0, 0], np.diag([1.0, 4.0, 9.0])))
    b = moments(with_moments([1, 2, 0], np.diag([4.0, 4.0, 0.25]), seed=1))
    expected = 1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_any_covariances():
    """Against a root of C_a^½ C_b C_a^½, which is symmetric and has the eigenvalues of C_a C_b."""
    rng = np.random.default_rng(0)
    ca, cb = (m @ m.T + 0.1 * np.eye(6) for m in rng.standard_normal((2, 6, 6)))
    a = moments(with_moments(np.zeros(6), ca))
    b = moments(with_moments(np.ones(6), cb, seed=1))
    values, vectors = np.linalg.eigh(ca)
    root = vectors * np.sqrt(values) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ cb @ root)).sum()
    expected = 6 + np.trace(ca) + np.trace(cb) - 2 * trace_of_root
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_two_samples_of_one_gaussian_differ_by_the_known_bias():
    """Two samples of n points from one standard Gaussian in d dimensions are apart, on average, by
    2d/n of the means and, to first order, by d(d + 1)/4 · 2/n of the covariances: (C_a^½ − C_b^½)
    has elements of variance ≈ 2/(4n) each, twice that on the diagonal."""
    d, n = 16, 4000
    found = []
    for i in range(20):
        halves = torch.from_numpy(np.random.default_rng(i).standard_normal((2, n, d)))
        found.append(frechet(moments(halves[0]), moments(halves[1])))
    assert np.mean(found) == pytest.approx(2 * d / n + d * (d + 1) / 2 / n, rel=0.1)


def test_coverage_against_loops():
    rng = np.random.default_rng(0)
    points, by = rng.standard_normal((40, 3)), 0.7 * rng.standard_normal((50, 3)) + 0.3
    inside = 0
    for point in points:
        for centre in by:
            radius = sorted(np.linalg.norm(by - centre, axis=1))[3]  # [0] is the centre itself
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    assert 0 < inside < 40
    points, by = torch.from_numpy(points), torch.from_numpy(by)
    assert coverage(points, by, k=3, at_once=7) == pytest.approx(inside / 40)
    assert coverage(by, by) == 1
    assert coverage(points + 100, by) == 0


def test_features_must_be_finite():
    with pytest.raises(UserError, match="not finite"):
        moments(torch.cat([torch.randn(20, 3), torch.full((1, 3), float("nan"))]))


def test_torch_fidelity_agrees():
    pytest.importorskip("torch_fidelity", reason="optional package", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = some_features(700, 200), some_features(500, 200, seed=1, shift=0.1)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(moments(a), moments(b)) == pytest.approx(theirs, rel=1e-3)
    precision, recall = calculate_precision_recall_full(a[:, :8], b[:, :8])
    assert 0.05 < precision < 0.95
    assert coverage(a[:, :8], by=b[:, :8]) == pytest.approx(precision, rel=1e-3)
    assert coverage(b[:, :8], by=a[:, :8]) == pytest.approx(recall, rel=1e-3)
