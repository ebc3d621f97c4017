"""The distances against closed forms and against slow, plain numpy."""

import shutil

import numpy as np
import pytest
import torch

from evaluate import Classifier, costs_of, coverage, exposure_bias, features, frechet, load_runs
from sample import few_step
from teacher import ASSETS, solve
from test_distill import ABOUT, random_dit, student_of
from training import Fault, fingerprint


def with_moments(mean, covariance, count=400, seed=0):
    """Points whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_of_independent_axes():
    """With diagonal covariances it is ‖Δμ‖² + Σ (σ_a − σ_b)²."""
    a = with_moments([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = with_moments([1, 2, 0], np.diag([4.0, 4.0, 0.25]), seed=1)
    assert frechet(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_any_covariances():
    """Against the textbook form, with the eigenvalues of the product C_a C_b, which is not symmetric."""
    rng = np.random.default_rng(0)
    ca, cb = (m @ m.T + 0.1 * np.eye(6) for m in rng.standard_normal((2, 6, 6)))
    a, b = with_moments(np.zeros(6), ca), with_moments(np.ones(6), cb, seed=1)
    root_trace = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    assert frechet(a, b) == pytest.approx(6 + np.trace(ca) + np.trace(cb) - 2 * root_trace, rel=1e-9)


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
    assert coverage(torch.from_numpy(points), torch.from_numpy(by), k=3, block=7) == pytest.approx(inside / 40)
    assert coverage(torch.from_numpy(by), torch.from_numpy(by)) == 1
    assert coverage(torch.from_numpy(points + 100), torch.from_numpy(by)) == 0


def test_exposure_bias_starts_at_nothing():
    teacher, (student, about) = random_dit(), student_of(random_dit(seed=1))
    about |= dict(marks=[2, 4, 6, 8])
    x_T, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    _, every, clean = solve(teacher, ABOUT, x_T, y, 8)
    errors = exposure_bias(student, about, every, few_step(student, about, x_T, y), y)
    assert len(errors["forced"]) == len(errors["own"]) == 4
    assert errors["forced"][0] == pytest.approx(errors["own"][0], rel=1e-4)  # the first step reads x_T either way
    assert abs(errors["forced"][3] - errors["own"][3]) > 1e-3

    truth, own = every[:, ::2], few_step(student, about, x_T, y)
    assert errors["own"][3] == pytest.approx(((own[:, 4] - truth[:, 4]) ** 2).mean().item(), rel=1e-5)
    with torch.no_grad():
        last = student(truth[:, :4], torch.tensor(about["told"]), y)[:, 3]
    wrong = (truth[:, 3] - 0.25 * last - truth[:, 4]).square().mean().item()
    assert errors["forced"][3] == pytest.approx(wrong, rel=1e-5)

    about |= dict(trajectory="clean", output="state")  # the student learns x̂_0 instead
    errors = exposure_bias(student, about, every, few_step(student, about, x_T, y), y)
    with torch.no_grad():
        last = student(torch.cat([x_T[:, None], clean[:, 1:6:2]], 1), torch.tensor(about["told"]), y)[:, 3]
    assert errors["forced"][3] == pytest.approx((last - clean[:, 7]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("image_size, channels", [(16, 3), (32, 1), (1, 2), (20, 3)])
def test_features(image_size, channels):
    torch.manual_seed(0)
    images = torch.rand(7, channels, image_size, image_size) * 2 - 1
    classifier = Classifier(channels, image_size, classes=4)
    found, predicted = features(classifier, images, batch=3)
    assert found.shape == (7, 64) and found.dtype == torch.float64 and predicted.shape == (7,)
    one, _ = features(classifier, images[4:5])
    torch.testing.assert_close(found[4:5], one, rtol=1e-4, atol=1e-5)


def test_the_papers_cost_of_history():
    rows = costs_of("DiT-XL/2", image_size=32, channels=4, S=4, history_layers=6)
    assert rows["none history"]["gmacs"] == pytest.approx(474.6, abs=0.2)
    assert rows["causal history"]["gmacs"] == pytest.approx(479.9, abs=0.2)
    assert rows["causal history"]["percent"] == pytest.approx(1.1, abs=0.05)
    assert rows["window history"]["percent"] == rows["anchor history"]["percent"] == pytest.approx(1.1 / 2, abs=0.03)


def test_several_runs_share_one_teacher(tmp_path):
    for name in ("a", "b", "c/a"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(ASSETS / "shapes-student.pt", tmp_path / name / "student.pt")
    students, teacher, _ = load_runs([tmp_path / "a", tmp_path / "b"], None, torch.device("cpu"))
    assert list(students) == ["a", "b"]
    assert {about["teacher"] for _, about in students.values()} == {fingerprint(teacher.state_dict())}
    with pytest.raises(Fault, match="two runs are called a"):
        load_runs([tmp_path / "a", tmp_path / "c/a"], None, torch.device("cpu"))
    checkpoint = torch.load(ASSETS / "shapes-student.pt", weights_only=True)
    torch.save(checkpoint | dict(about=checkpoint["about"] | dict(guidance=3.0)), tmp_path / "other.pt")
    with pytest.raises(Fault, match="different teachers, or trajectories of different guidance"):
        load_runs([tmp_path / "a", tmp_path / "other.pt"], None, torch.device("cpu"))
