"""Latents are what the autoencoder of diffusers makes of an image; any number of workers may write
them; they are used in place of images. The autoencoder here is of the real kind, but tiny and
random."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CPU

import data
import latents
import sample
import teacher
from config import DataConfig
from files import UserError
from latents import load_vae

diffusers = pytest.importorskip("diffusers", reason="optional package diffusers is not installed")


def make_vae(channels=4):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),  # halves each side three times
        norm_num_groups=4,
        latent_channels=channels,
    )


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with images, 15 of one class and 25 of another. Shards of 16: three of them."""
    monkeypatch.setattr(latents, "SHARD", 16)
    rng = np.random.default_rng(0)
    for name, count in (("ant", 15), ("bee", 25)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:03d}.png")
    return tmp_path


def write(place, vae_folder, out, size=32, flip=False, worker=(0, 1)):
    vae = load_vae(str(vae_folder), CPU.device)
    latents.write_latents(place / "images", place / out, vae, size, flip, CPU, worker)


def load(folder, split="all", **more):
    return data.load(DataConfig(str(folder), 4, 4, **more), split)


def shards_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}


# ---- What is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_samples_of_the_posterior(place, vae_folder, flip):
    write(place, vae_folder, "z", flip=flip)
    dataset = load(place / "z")
    images, labels = dataset.batch(np.arange(len(dataset)))
    copies = 2 if flip else 1
    assert dataset.shape == (4, 4, 4) and dataset.classes == ("ant", "bee")
    assert labels.bincount().tolist() == [15 * copies, 25 * copies]
    assert images.dtype == torch.float32
    assert dataset.class_weights == (0.375, 0.625)

    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    pixels = np.array(Image.open(place / "images/bee/002.png"))[:, 4:36]  # the middle of 32×40
    pixels = torch.from_numpy(pixels.transpose(2, 0, 1)).float() / 127.5 - 1
    first = 16 * copies + 1  # the second image of the second shard is bee/002
    noise = data.stream(0, 1).standard_normal((16 * copies, 4, 4, 4), dtype=np.float32)
    cases = {first: pixels, first + 16: pixels.flip(-1)} if flip else {first: pixels}
    for record, image in cases.items():
        with torch.no_grad():
            posterior = vae.encode(image[None]).latent_dist
        eps = torch.from_numpy(noise[record - 16 * copies])
        expected = 0.18215 * (posterior.mean + posterior.std * eps)[0]
        torch.testing.assert_close(images[record], expected, rtol=1e-3, atol=1e-3)


def test_the_split_is_that_of_the_images(place, vae_folder):
    write(place, vae_folder, "z", flip=True)
    counts = []
    for split in ("train", "test"):
        of_latents = load(place / "z", split)
        of_images = data.load(DataConfig(str(place / "images"), 32, 3), split)
        assert sorted(of_latents.labels) == sorted([*of_images.labels, *of_images.labels])
        counts.append(len(of_latents))
    assert counts == [76, 4]  # for testing: bee/019, bee/020 and their mirror images
    images, _ = load(place / "z", "test").batch(np.arange(4))
    both, _ = load(place / "z").batch(np.arange(80))
    assert all(any(torch.equal(image, other) for other in both) for image in images)


def test_decode_inverts_the_scale(vae_folder):
    vae = load_vae(str(vae_folder), CPU.device)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    images = latents.decode(vae, 0.18215 * z)
    assert images.shape == (2, 3, 32, 32) and not images.requires_grad
    torch.testing.assert_close(images, make_vae().eval().decode(z).sample.clamp(-1, 1))


# ---- Interrupted and shared writing --------------------------------------------------------------


def test_shared_or_interrupted_writing_gives_the_same_files(place, vae_folder, capsys):
    write(place, vae_folder, "whole")
    write(place, vae_folder, "shared", worker=(1, 2))
    assert list(shards_of(place / "shared")) == ["00001.npy"]
    with pytest.raises(UserError, match="00000.npy is missing or damaged: run the program that"):
        load(place / "shared")
    write(place, vae_folder, "shared", worker=(0, 2))
    assert shards_of(place / "whole") == shards_of(place / "shared")
    assert len(shards_of(place / "whole")) == 3
    with pytest.raises(UserError, match="something else: flip is False there and True here"):
        write(place, vae_folder, "whole", flip=True)


def test_a_bad_image_is_named_and_costs_no_shard_that_is_written(place, vae_folder, capsys):
    """Nor does its repair, nor its removal."""
    write(place, vae_folder, "whole")
    bad = place / "images/bee/003.png"  # in the second of three shards
    good = bad.read_bytes()
    bad.write_bytes(good[:-200])
    with pytest.raises(UserError, match="1 of 3 shards are not written: cannot .*003.png") as e:
        write(place, vae_folder, "z")
    assert "\n" not in str(e.value)
    whole, there = shards_of(place / "whole"), shards_of(place / "z")
    assert list(there) == ["00000.npy", "00002.npy"] and there.items() <= whole.items()

    bad.write_bytes(good)  # repaired
    write(place, vae_folder, "z")
    assert shards_of(place / "z") == whole

    (place / "z" / "00001.npy").unlink()
    bad.unlink()  # removed
    capsys.readouterr()
    write(place, vae_folder, "z")
    assert "were removed (1) or added (0) since" in capsys.readouterr().out
    assert there.items() <= shards_of(place / "z").items()
    images, labels = load(place / "z").batch(np.arange(39))
    assert labels.bincount().tolist() == [15, 24] and len(images) == 39


def test_images_that_are_added_later_are_reported(place, vae_folder, capsys):
    write(place, vae_folder, "z")
    before = shards_of(place / "z")
    Image.new("RGB", (32, 32)).save(place / "images/ant/000b.png")
    write(place, vae_folder, "z")
    assert "were removed (0) or added (1) since" in capsys.readouterr().out
    assert shards_of(place / "z") == before


def test_missing_images_are_no_empty_shard(place, vae_folder):
    write(place, vae_folder, "z", worker=(1, 3))
    for i in range(10, 25):
        os.unlink(place / f"images/bee/{i:03d}.png")
    with pytest.raises(UserError, match="bee/017.png and the others of its shard are missing"):
        write(place, vae_folder, "z")
    assert list(shards_of(place / "z")) == ["00000.npy", "00001.npy"]


# ---- What is refused -----------------------------------------------------------------------------


def test_a_size_that_cannot_be_halved_is_refused(place, vae_folder):
    with pytest.raises(UserError, match="halves images 3 times, which 28 pixels do not allow"):
        write(place, vae_folder, "z", size=28)
    assert not (place / "z").exists()


def test_another_autoencoder_is_refused(place, vae_folder, tmp_path):
    write(place, vae_folder, "z")
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="something else: vae is .* there and .* here"):
        write(place, tmp_path / "other", "z")


def test_an_autoencoder_must_be_whole_and_have_four_channels(vae_folder, tmp_path):
    make_vae(channels=16).save_pretrained(tmp_path / "sixteen")
    with pytest.raises(UserError, match="have 16 channels, and DiT's have 4"):
        load_vae(str(tmp_path / "sixteen"), CPU.device)
    safetensors = pytest.importorskip("safetensors.torch")  # diffusers needs it
    (tmp_path / "cut").mkdir()
    weights = safetensors.load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.bias"]
    safetensors.save_file(weights, tmp_path / "cut" / "diffusion_pytorch_model.safetensors")
    config = (vae_folder / "config.json").read_text()
    (tmp_path / "cut" / "config.json").write_text(config)
    with pytest.raises(UserError, match="is not whole: it has no decoder.conv_in.bias"):
        load_vae(str(tmp_path / "cut"), CPU.device)
    (tmp_path / "cut" / "config.json").write_text(config.replace("8,", "16,"))
    for name, content in (("text", "hello"), ("odd", config.replace("4", '"many"'))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    for name in ("cut", "text", "odd", "nowhere"):
        with pytest.raises(UserError, match=f"no autoencoder '.*{name}'.*: name a folder") as e:
            load_vae(str(tmp_path / name), CPU.device)
        assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_an_autoencoder_with_values_that_are_not_finite(tmp_path):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = float("nan")
    vae.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="is damaged: quant_conv.bias holds values that are not"):
        load_vae(str(tmp_path / "nan"), CPU.device)


def test_latents_cannot_be_mirrored_later(place, vae_folder):
    write(place, vae_folder, "z")
    with pytest.raises(UserError, match="z cannot be mirrored"):
        load(place / "z", flip=True)


# ---- The programs --------------------------------------------------------------------------------


def run(monkeypatch, module, words: str):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words.split(), "--device", "cpu"])
    module.main()


def test_a_teacher_learns_latents_and_its_samples_are_decoded(place, vae_folder, monkeypatch):
    monkeypatch.chdir(place)
    run(monkeypatch, latents, f"--images images --out z --image-size 32 --vae {vae_folder}")
    assert json.loads((place / "z" / "files.json").read_text())["bee/024.png"] == 1
    small = "--image-size 4 --size N/2 --batch 4 --iterations 2 --euler-steps 5"
    run(monkeypatch, teacher, f"--preset imagenet256 --data z --out run {small}")
    flags = f"--vae {vae_folder} --count 3 --npz --draw-trajectory --out s"
    run(monkeypatch, sample, f"run/teacher.pt {flags}")
    assert np.load(place / "s/samples.npz")["arr_0"].shape == (3, 32, 32, 3)
    assert Image.open(place / "s/trajectory.png").size[1] > 6 * 32


def test_the_help_is_short(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run(monkeypatch, latents, "--help")
    assert len(capsys.readouterr().out.splitlines()) <= 60
