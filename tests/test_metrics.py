"""The measures against closed forms and slow, plain numpy, and against torch-fidelity on the same features where that
is installed; the protocol with a reference file, an Inception network of random weights and images made here."""

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from metrics import ImageSet, coverage, frechet, inception_score, moments, protocol, reference_moments, write_npz
from training import Fault


def with_moments(mean, covariance, count=400, seed=0):
    """Points whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def some_features(count, d, seed=0, shift=0.0):
    """Float32 features that are correlated, positive and of uneven size, as a network's are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, d)) @ np.random.default_rng(9).standard_normal((d, d)) / d**0.5
    return torch.from_numpy(np.abs(mixed + shift) * np.linspace(0.1, 2, d)).float()


# ---- measures -------------------------------------------------------------------------------------------------------

def test_moments_are_numpys():
    x = some_features(90, 7)
    for block in (13, 1000):
        mean, covariance = moments(x, block)
        np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)


def test_frechet_of_independent_axes():
    """With diagonal covariances it is ‖Δμ‖² + Σ (σ_a − σ_b)²."""
    a = moments(with_moments([0, 0, 0], np.diag([1.0, 4.0, 9.0])))
    b = moments(with_moments([1, 2, 0], np.diag([4.0, 4.0, 0.25]), seed=1))
    assert frechet(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_any_covariances():
    """Against the textbook form, with the eigenvalues of the product C_a C_b, which is not symmetric."""
    rng = np.random.default_rng(0)
    ca, cb = (m @ m.T + 0.1 * np.eye(6) for m in rng.standard_normal((2, 6, 6)))
    a, b = moments(with_moments(np.zeros(6), ca)), moments(with_moments(np.ones(6), cb, seed=1))
    root_trace = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    assert frechet(a, b) == pytest.approx(6 + np.trace(ca) + np.trace(cb) - 2 * root_trace, rel=1e-9)


def test_two_halves_of_one_set_differ_by_the_known_bias():
    """Two samples of n points from one standard Gaussian in d dimensions lie apart, on average, by 2d/n of the means
    and, to first order, d(d + 1)/4 · 2/n of the covariances: (C_a^½ − C_b^½) has elements of variance ≈ 2/(4n) each,
    twice that on the diagonal."""
    d, n = 16, 4000
    found = [frechet(*(moments(half) for half in torch.from_numpy(np.random.default_rng(i).standard_normal((2, n, d)))))
             for i in range(20)]
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
    assert coverage(torch.from_numpy(points), torch.from_numpy(by), k=3, block=7) == pytest.approx(inside / 40)
    assert coverage(torch.from_numpy(by), torch.from_numpy(by)) == 1
    assert coverage(torch.from_numpy(points + 100), torch.from_numpy(by)) == 0


def test_inception_score():
    sure = 50 * torch.eye(10).repeat(3, 1)  # every image surely of one class, all classes equally often
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(torch.ones(30, 10)) == pytest.approx(1)
    assert inception_score(sure.repeat_interleave(2, 0), split=20) == pytest.approx(10)
    assert inception_score(50 * torch.eye(10), split=5) == pytest.approx(5)  # a split sees five of the classes
    logits = np.random.default_rng(0).standard_normal((20, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kl = [(row * (np.log(row) - np.log(p.mean(0)))).sum() for row in p]
    assert inception_score(torch.from_numpy(logits)) == pytest.approx(np.exp(np.mean(kl)), rel=1e-9)


def test_torch_fidelity_agrees():
    pytest.importorskip("torch_fidelity", reason="optional package", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = some_features(700, 200), some_features(500, 200, seed=1, shift=0.1)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    assert frechet(moments(a), moments(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    precision, recall = calculate_precision_recall_full(a[:, :8], b[:, :8])
    assert 0.05 < precision < 0.95
    assert coverage(a[:, :8], by=b[:, :8]) == pytest.approx(precision, rel=1e-3)
    assert coverage(b[:, :8], by=a[:, :8]) == pytest.approx(recall, rel=1e-3)
    theirs = isc_features_to_metric(a, splits=7, shuffle=False)["inception_score_mean"]
    assert inception_score(a, split=100) == pytest.approx(theirs, rel=1e-3)


# ---- images ---------------------------------------------------------------------------------------------------------

def some_images(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_npz_is_numpys(tmp_path):
    images = some_images(10, 4)
    write_npz(tmp_path / "ours.npz", 10, iter([images[:7], images[7:]]))
    assert np.array_equal(np.load(tmp_path / "ours.npz")["arr_0"], images)
    for name, save in (("plain", np.savez), ("small", np.savez_compressed)):  # theirs, read by us
        save(tmp_path / f"{name}.npz", mu=np.zeros(3), arr_0=images)
        found = ImageSet(tmp_path / f"{name}.npz")
        assert (found.count, found.side) == (10, 4)
        parts = list(found.batches(3))
        assert [len(part) for part in parts] == [3, 3, 3, 1]
        assert np.array_equal(np.concatenate(parts), images.transpose(0, 3, 1, 2))


def test_a_folder_of_images(tmp_path):
    images = some_images(3, 8)
    for i, image in enumerate(images):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{i % 2}/{i}.png")
    found = np.concatenate(list(ImageSet(tmp_path).batches(2)))
    assert np.array_equal(found, images[[0, 2, 1]].transpose(0, 3, 1, 2))  # sorted by name
    Image.fromarray(some_images(1, 8)[0][:, :6]).save(tmp_path / "odd.png")
    with pytest.raises(Fault, match="not squares of one size"):
        ImageSet(tmp_path)
    assert [len(part) for part in ImageSet(tmp_path, side=4).batches(9)] == [4]  # a reference is cropped and resized


def test_what_is_no_set_of_images(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", images=some_images(2, 4))
    np.savez(tmp_path / "right.npz", arr_0=some_images(2, 4))
    np.savez(tmp_path / "turned.npz", arr_0=np.asfortranarray(some_images(2, 4)))
    whole = (tmp_path / "right.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, words in (("empty", "no images"), ("text.npz", "not an .npz"), ("floats.npz", "uint8"),
                        ("nowhere", "no such"), ("other.npz", "arr_0"), ("cut.npz", "not an .npz"),
                        ("turned.npz", "column by column")):
        with pytest.raises(Fault, match=words):
            ImageSet(tmp_path / name)
    with pytest.raises(Fault, match="4 pixels wide, those to compare with 8"):
        ImageSet(tmp_path / "right.npz", side=8)
    with pytest.raises(Fault, match="has 2 images, and 2048 features need more"):
        protocol(tmp_path / "right.npz", tmp_path / "right.npz", None, torch.device("cpu"))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3), arr_0=some_images(2, 4))
    with pytest.raises(Fault, match="not finite"):
        reference_moments(tmp_path / "nan.npz")


def test_features_that_cannot_be_measured():
    with pytest.raises(Fault, match="more than 8 images, and there are 8"):
        moments(torch.randn(8, 8))
    with pytest.raises(Fault, match="not finite"):
        moments(torch.cat([torch.randn(20, 3), torch.full((1, 3), float("nan"))]))
    with pytest.raises(Fault, match="more than 3 images"):
        coverage(torch.randn(9, 2), by=torch.randn(3, 2))


# ---- the protocol ---------------------------------------------------------------------------------------------------

def test_protocol(tmp_path, monkeypatch):
    """With features made up from the images: which of them go where, and the reference's own statistics where it has
    them."""
    def features(network, images, device):
        x = torch.from_numpy(np.concatenate(list(images.batches(500)))).flatten(1).double() / 255
        return x[:, :40], x[:, 40:70], 5 * x[:, 70:80]

    monkeypatch.setattr(metrics, "load_inception", lambda weights, device: None)
    monkeypatch.setattr(metrics, "activations", features)
    ours, theirs = some_images(2100, 8), some_images(2100, 8, seed=1) // 2
    np.savez(tmp_path / "ours.npz", arr_0=ours)
    np.savez(tmp_path / "theirs.npz", arr_0=theirs)
    row = protocol(tmp_path / "ours.npz", tmp_path / "theirs.npz", None, torch.device("cpu"))

    a, b = (torch.from_numpy(x.transpose(0, 3, 1, 2).reshape(2100, -1) / 255) for x in (ours, theirs))
    assert row["fid"] == pytest.approx(frechet(moments(a[:, :40]), moments(b[:, :40])))
    assert row["sfid"] == pytest.approx(frechet(moments(a[:, 40:70]), moments(b[:, 40:70])))
    assert row["inception_score"] == pytest.approx(inception_score(5 * a[:, 70:80]))
    assert row["precision"] == coverage(a[:, :40], by=b[:, :40]) < row["recall"] == coverage(b[:, :40], by=a[:, :40])

    (mu, sigma), (mu_s, sigma_s) = moments(a[:, :40]), moments(a[:, 40:70])
    np.savez(tmp_path / "adm.npz", arr_0=theirs[:50], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    row = protocol(tmp_path / "ours.npz", tmp_path / "adm.npz", None, torch.device("cpu"))
    assert row["fid"] == pytest.approx(0, abs=1e-6) and row["sfid"] == pytest.approx(0, abs=1e-6)
    assert row["recall"] == coverage(b[:50, :40], by=a[:, :40])


def test_inception(tmp_path, monkeypatch):
    """ADM's features, by name, from torch-fidelity's network with random weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="optional package",
                                 exc_type=ImportError)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **more: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    network = metrics.load_inception(tmp_path / "inception.pth", torch.device("cpu"))
    np.savez(tmp_path / "images.npz", arr_0=some_images(3, 32))
    images = ImageSet(tmp_path / "images.npz")
    pool, spatial, logits = metrics.activations(network, images, torch.device("cpu"), batch=2)
    assert (pool.shape, spatial.shape, logits.shape) == ((3, 2048), (3, 17 * 17 * 7), (3, 1008))
    torch.testing.assert_close(logits, pool @ network.fc.weight.T)  # no bias

    caught = {}  # mixed_6's first convolution, (3, 192, 17, 17)
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: caught.update(into=args[0]))
    network(torch.from_numpy(np.concatenate(list(images.batches(3)))))
    first = network.Mixed_6d.branch1x1(caught["into"])[:, :7]
    torch.testing.assert_close(spatial.view(3, 17, 17, 7)[2, 5, 6], first[2, :, 5, 6])

    (tmp_path / "wrong.pth").write_bytes(b"no")
    with pytest.raises(Fault, match="no Inception weights"):
        metrics.load_inception(tmp_path / "wrong.pth", torch.device("cpu"))
    with pytest.raises(Fault, match="no Inception weights"):
        metrics.load_inception(tmp_path / "nowhere.pth", torch.device("cpu"))
