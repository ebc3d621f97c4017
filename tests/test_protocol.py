"""ADM's protocol, with a reference file, an Inception network of random weights and images that are
made here."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import write_npz
from experiments import protocol as module
from experiments.protocol import ImageSet, inception_score, protocol, reference_moments
from files import UserError
from metrics import coverage, frechet, moments

CPU = torch.device("cpu")


def some_images(count, side, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# ---- images --------------------------------------------------------------------------------------


def test_npz_files_of_ours_and_of_numpy(tmp_path):
    images = some_images(10, 4)
    write_npz(tmp_path / "ours.npz", 10, iter([images[:7], images[7:]]))
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", mu=np.zeros(3), arr_0=images)
    for name in ("ours", "plain", "small"):
        found = ImageSet(tmp_path / f"{name}.npz")
        assert (found.count, found.side) == (10, 4)
        batches = list(found.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 3, 1]
        assert np.array_equal(torch.cat(batches), images.transpose(0, 3, 1, 2))


def test_a_folder_of_images(tmp_path):
    images = some_images(3, 8)
    for i, image in enumerate(images):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{i % 2}/{i}.png")
    found = torch.cat(list(ImageSet(tmp_path).batches(2)))
    assert np.array_equal(found, images[[0, 2, 1]].transpose(0, 3, 1, 2))  # sorted by name
    Image.fromarray(some_images(1, 8)[0][:, :6]).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match="not squares of one size"):
        ImageSet(tmp_path)
    resized = list(ImageSet(tmp_path, side=4).batches(9))
    assert [batch.shape for batch in resized] == [(4, 3, 4, 4)]


def test_what_is_no_set_of_images(tmp_path):
    images = some_images(2, 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "floats.npz", arr_0=images / 255)
    np.savez(tmp_path / "other.npz", images=images)
    np.savez(tmp_path / "right.npz", arr_0=images)
    np.savez(tmp_path / "turned.npz", arr_0=np.asfortranarray(images))
    whole = (tmp_path / "right.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    messages = {
        "empty": "no images",
        "text.npz": "not an .npz",
        "floats.npz": "uint8",
        "nowhere": "no such",
        "other.npz": "arr_0",
        "cut.npz": "not an .npz",
        "turned.npz": "column by column",
    }
    for name, words in messages.items():
        with pytest.raises(UserError, match=words):
            ImageSet(tmp_path / name)
    with pytest.raises(UserError, match="4 pixels wide, and the samples 8"):
        ImageSet(tmp_path / "right.npz", side=8)
    with pytest.raises(UserError, match="has 2 images, and 2,048 features need more"):
        protocol(tmp_path / "right.npz", tmp_path / "right.npz", None, CPU)


# ---- the protocol --------------------------------------------------------------------------------


@pytest.fixture
def made_up_features(monkeypatch):
    """The first 40, the next 30 and the next 10 pixels, in place of Inception's features."""
    def activations(network, images, device):
        x = torch.cat(list(images.batches(500))).flatten(1).double() / 255
        return x[:, :40], x[:, 40:70], 5 * x[:, 70:80]

    monkeypatch.setattr(module, "load_inception", lambda weights, device: None)
    monkeypatch.setattr(module, "activations", activations)
    monkeypatch.setattr(module, "POOL_FEATURES", 40)
    monkeypatch.setattr(module, "SPATIAL_FEATURES", 30)


def test_inception_score():
    sure = 50 * torch.eye(10).repeat(3, 1)  # each image clearly of one class, all equally often
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(torch.ones(30, 10)) == pytest.approx(1)
    assert inception_score(sure.repeat_interleave(2, 0), split=20) == pytest.approx(10)
    assert inception_score(50 * torch.eye(10), split=5) == pytest.approx(5)  # five in a split
    logits = np.random.default_rng(0).standard_normal((20, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kl = [(row * (np.log(row) - np.log(p.mean(0)))).sum() for row in p]
    assert inception_score(torch.from_numpy(logits)) == pytest.approx(np.exp(np.mean(kl)), rel=1e-9)


def test_torch_fidelity_has_the_same_inception_score():
    pytest.importorskip("torch_fidelity", reason="optional package", exc_type=ImportError)
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(700, 200, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=7, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split=100) == pytest.approx(theirs, rel=1e-3)


def test_protocol(tmp_path, made_up_features):
    """Which features go where, and the reference's own statistics where it has them."""
    ours, theirs = some_images(300, 8), some_images(300, 8, seed=1) // 2
    np.savez(tmp_path / "ours.npz", arr_0=ours)
    np.savez(tmp_path / "theirs.npz", arr_0=theirs)
    row = protocol(tmp_path / "ours.npz", tmp_path / "theirs.npz", None, CPU)

    flat = [x.transpose(0, 3, 1, 2).reshape(300, -1) / 255 for x in (ours, theirs)]
    a, b = map(torch.from_numpy, flat)
    assert row["images"] == 300
    assert row["fid"] == pytest.approx(frechet(moments(a[:, :40]), moments(b[:, :40])))
    assert row["sfid"] == pytest.approx(frechet(moments(a[:, 40:70]), moments(b[:, 40:70])))
    assert row["inception"] == pytest.approx(inception_score(5 * a[:, 70:80]))
    precision, recall = coverage(a[:, :40], by=b[:, :40]), coverage(b[:, :40], by=a[:, :40])
    assert (row["precision"], row["recall"]) == (precision, recall) and precision < recall

    statistics = dict(zip(("mu", "sigma"), moments(a[:, :40]), strict=True))
    statistics |= zip(("mu_s", "sigma_s"), moments(a[:, 40:70]), strict=True)
    np.savez(tmp_path / "adm.npz", arr_0=theirs[:50], **statistics)
    row = protocol(tmp_path / "ours.npz", tmp_path / "adm.npz", None, CPU)
    assert row["fid"] == pytest.approx(0, abs=1e-6)
    assert row["sfid"] == pytest.approx(0, abs=1e-6)
    assert row["recall"] == coverage(b[:50, :40], by=a[:, :40])


def test_the_reference_is_checked_before_the_work(tmp_path, made_up_features, monkeypatch):
    def not_reached(*args):
        raise AssertionError("features were computed first")

    monkeypatch.setattr(module, "activations", not_reached)
    images = some_images(50, 8)
    np.savez(tmp_path / "ours.npz", arr_0=images)
    right = dict(mu=np.zeros(40), sigma=np.eye(40), mu_s=np.zeros(30), sigma_s=np.eye(30))
    assert set(reference_moments_of(tmp_path, images, right)) == {"fid", "sfid"}
    assert set(reference_moments_of(tmp_path, images, dict(mu=right["mu"]))) == set()
    wrong = {
        "another network": dict(mu=np.zeros(64), sigma=np.eye(64)),
        "and \\(30, 30\\) are needed": dict(sigma_s=np.eye(29)),
        "not finite": dict(mu=np.full(40, np.nan)),
    }
    for words, change in wrong.items():
        np.savez(tmp_path / "reference.npz", arr_0=images, **(right | change))
        with pytest.raises(UserError, match=words):
            protocol(tmp_path / "ours.npz", tmp_path / "reference.npz", None, CPU)


def reference_moments_of(folder, images, statistics):
    np.savez(folder / "reference.npz", arr_0=images, **statistics)
    return reference_moments(folder / "reference.npz")


def test_the_program(tmp_path, made_up_features, monkeypatch, capsys):
    np.savez(tmp_path / "ours.npz", arr_0=some_images(50, 8))
    words = ["--samples", tmp_path / "ours.npz", "--reference", tmp_path / "ours.npz"]
    words += ["--out", tmp_path / "protocol.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["protocol.py", *map(str, words)])
    module.main()
    assert "sfid" in capsys.readouterr().out
    assert '"images": 50' in (tmp_path / "protocol.json").read_text()


@pytest.fixture
def no_modules(monkeypatch):
    """torch-fidelity, if it is there, has not been imported yet."""
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


def test_a_missing_package_is_named(no_modules, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # so Python does not find it
    with pytest.raises(UserError, match="torch-fidelity: pip install --no-deps torch-fidelity"):
        module.load_inception(None, CPU)


def test_torchvision_is_not_needed(no_modules, tmp_path, monkeypatch):
    """The rest of torch-fidelity imports it; where it was made for another PyTorch, it fails."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no operator torchvision::nms')")
    (package / "feature_extractor_inceptionv3.py").write_text("name = 'found'")
    monkeypatch.syspath_prepend(tmp_path)
    assert module.import_inception().name == "found"


def test_inception(tmp_path, monkeypatch):
    """ADM's features, by name, from torch-fidelity's network with random weights."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("optional package torch-fidelity")
    fidelity = module.import_inception()
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **more: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    network = module.load_inception(tmp_path / "inception.pth", CPU)
    np.savez(tmp_path / "images.npz", arr_0=some_images(3, 32))
    images = ImageSet(tmp_path / "images.npz")
    pool, spatial, logits = module.activations(network, images, CPU, batch=2)
    assert (pool.shape, logits.shape) == ((3, module.POOL_FEATURES), (3, 1008))
    assert spatial.shape == (3, module.SPATIAL_FEATURES)
    torch.testing.assert_close(logits, pool @ network.fc.weight.T)  # no bias

    caught = {}  # what the first convolution of mixed_6 reads, (3, 192, 17, 17)
    network.Mixed_6d.register_forward_pre_hook(lambda layer, args: caught.update(x=args[0]))
    network(torch.cat(list(images.batches(3))))
    first = network.Mixed_6d.branch1x1(caught["x"])[:, :7]
    torch.testing.assert_close(spatial.view(3, 17, 17, 7)[2, 5, 6], first[2, :, 5, 6])

    (tmp_path / "wrong.pth").write_bytes(b"no")
    for name in ("wrong.pth", "nowhere.pth"):
        with pytest.raises(UserError, match="no Inception weights"):
            module.load_inception(tmp_path / name, CPU)
