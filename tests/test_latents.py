"""Latents: encoded once, as the autoencoder of diffusers does it, by any number of processes; and used in place of
images. The autoencoder here is of the real kind, but tiny and with random weights."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import teacher
from training import Fault

diffusers = pytest.importorskip("diffusers", reason="optional package diffusers is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, 150 of each of two classes, and an autoencoder that halves each side three times."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4).save_pretrained(folder / "vae")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(150):
            pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:03d}.png")
    return folder


def write(monkeypatch, place, out, *words):
    monkeypatch.setattr(sys, "argv", ["data.py", "latents", "--images", str(place / "images"), "--vae",
                                      str(place / "vae"), "--image-size", "32", "--out", str(out), "--device", "cpu",
                                      *words])
    data.main()


def test_latents_are_the_autoencoders_posterior_samples(place, monkeypatch, tmp_path):
    write(monkeypatch, place, tmp_path / "z", "--flip")
    train, test = data.load(tmp_path / "z", 4), data.load(tmp_path / "z", 4, split="test")
    assert (len(train), len(test), train.shape, train.classes) == (540, 60, (4, 4, 4), ["ant", "bee"])
    vae = diffusers.AutoencoderKL.from_pretrained(place / "vae")
    image = np.array(Image.open(place / "images/ant/001.png"))[:, 4:36].transpose(2, 0, 1)  # the middle of 32×40
    for record, pixels in ((2, image), (3, image[:, :, ::-1])):  # each image, then its mirror image
        with torch.no_grad():
            posterior = vae.encode(torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1).latent_dist
        noise = torch.from_numpy(data.stream(0, record).standard_normal((4, 4, 4), dtype=np.float32))
        latent = train.batch(np.array([record]))[0][0]
        torch.testing.assert_close(latent, 0.18215 * (posterior.mean + posterior.std * noise)[0], rtol=1e-3, atol=1e-3)
    assert train.batch(slice(0, 3))[1].tolist() == [0, 0, 0] and test.labels.tolist() == [0] * 30 + [1] * 30


def test_shared_or_interrupted_writing_gives_the_same_files(place, monkeypatch, tmp_path):
    write(monkeypatch, place, tmp_path / "whole")
    write(monkeypatch, place, tmp_path / "shared", "--part", "2/2")
    with pytest.raises(Fault, match="does not hold all its latents"):
        data.load(tmp_path / "shared", 4)
    write(monkeypatch, place, tmp_path / "shared", "--part", "1/2")
    for name in ("00000.npy", "00001.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    with pytest.raises(Fault, match="flip is False there, not True"):
        write(monkeypatch, place, tmp_path / "whole", "--flip")


def test_a_teacher_learns_latents_and_its_samples_are_decoded(place, monkeypatch, tmp_path):
    write(monkeypatch, place, tmp_path / "z")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "teacher.py --preset imagenet256 --data z --image-size 4 --size N/2 --batch 4 "
                                     "--iterations 2 --out run --device cpu".split())
    teacher.main()
    monkeypatch.setattr(sys, "argv", f"sample.py run/teacher.pt --vae {place}/vae --count 3 --npz --trajectory --out s "
                                     "--device cpu".split())
    sample.main()
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape == (3, 32, 32, 3)
    assert Image.open(tmp_path / "s/trajectory.png").size[1] > 26 * 32
