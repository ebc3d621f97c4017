"""Data sets. Where pixels are expected, they come from the test's own arrays or from Pillow's
decoder. What the procedural sets promise (the direction of a grain, which shape a label names, arms
that do not touch) is measured on their pictures."""

import argparse
import json
import re
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEACHER

import data
from config import PRESETS, DataConfig, override_parts
from files import UserError

CIFAR10 = Path(data.__file__).resolve().parents[1] / "shared" / "data" / "cifar10-jpeg.tar.gz"


def everything(dataset):
    """All images and labels of a data set, in its order."""
    return dataset.batch(np.arange(len(dataset)))


def contents(dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(dataset)[0]}


def save(path: Path, pixels):
    """pixels: (h, w, 3), or a colour for an image of 8×8."""
    if np.ndim(pixels) == 1:
        pixels = np.broadcast_to(pixels, (8, 8, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, np.uint8)).save(path)


def read(folder: Path, size=8, channels=3, split="all", **more):
    return data.load(DataConfig(str(folder), size, channels, **more), split)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- Textures ------------------------------------------------------------------------------------


def test_a_texture_has_the_grain_that_its_label_names():
    """The grain is perpendicular to the gradients: their mean orientation, from the structure
    tensor."""
    dataset = data.textures(600)
    images, labels = everything(dataset)
    assert dataset.shape == (3, 16, 16) and images.dtype == torch.float32
    assert labels.bincount().min() > 150 and dataset.class_weights == ()
    brightness = images.mean(dim=1)
    right = brightness[:, 1:-1, 2:] - brightness[:, 1:-1, :-2]
    up = brightness[:, :-2, 1:-1] - brightness[:, 2:, 1:-1]
    for label, name in enumerate(dataset.classes):
        x, y = right[labels == label], up[labels == label]
        gradient = 0.5 * torch.atan2((2 * x * y).sum(), (x**2 - y**2).sum()).rad2deg()
        grain = (gradient + 90) % 180
        expected = int(name.removesuffix(" degrees"))
        assert abs((grain - expected + 90) % 180 - 90) < 4


def test_a_texture_is_smooth_and_has_two_tones():
    images, _ = everything(data.textures(200))
    assert 0.4 < (images[:, :, 1:] - images[:, :, :-1]).abs().amax((1, 2, 3)).median() < 1.2
    pixels = images.flatten(2)                                              # (b, 3, 256)
    pixels = pixels - pixels.mean(dim=2, keepdim=True)
    spread = torch.linalg.svdvals(pixels)                                   # (b, 3)
    assert (spread[:, 0] > 0.5).all()
    assert (spread[:, 1] < 0.3).all()  # the colours lie on a line, but for rounding


# ---- Shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40])
def test_shapes_are_images_with_labels(size):
    dataset = data.shapes(200, size)
    images, labels = everything(dataset)
    assert images.shape == (200, 3, size, size) and images.dtype == torch.float32
    assert dataset.shape == (3, size, size) and dataset.class_weights == ()
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10)) and len(dataset.classes) == 10


def test_shapes_are_bright_on_a_darker_ground():
    images, _ = everything(data.shapes(100, 32))
    value = (images.amax(dim=1) + 1) / 2  # of hue, saturation and value
    corners = value[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < 0.36  # no shape reaches a corner
    assert value.amax(dim=(1, 2)).min() > 0.74


def test_discs_and_rings_have_their_area():
    """So a label means what it says. Areas are fractions of the bounding square."""
    dataset = data.shapes(120, 64)
    images, labels = everything(dataset)
    for name, area in {"disc": np.pi / 4, "ring": np.pi / 4 * (1 - 0.55**2)}.items():
        chosen = images[labels == dataset.classes.index(name)]
        assert len(chosen) >= 3
        for value in chosen.amax(dim=1):
            inside = value > (value.min() + value.max()) / 2
            height, width = inside.any(dim=1).sum(), inside.any(dim=0).sum()
            assert (inside.sum() / (height * width)).item() == pytest.approx(area, abs=0.03)


# ---- Points, and all procedural sets -------------------------------------------------------------


def test_points_lie_on_three_separate_arms():
    dataset = data.points(1500)
    xy, labels = everything(dataset)
    assert xy.shape == (1500, 2, 1, 1) and xy.dtype == torch.float32 and xy.abs().max() < 1.1
    assert set(labels.tolist()) == {0, 1, 2} and len(dataset.classes) == 3
    xy = xy[:, :, 0, 0]
    distance = torch.cdist(xy, xy).fill_diagonal_(9.0)
    assert (labels[distance.argmin(dim=1)] == labels).all()  # the nearest point is on the same arm
    third = torch.tensor(2 * np.pi / 3)
    turn = torch.tensor([[third.cos(), third.sin()], [-third.sin(), third.cos()]])
    arm, next_arm = xy[labels == 0], xy[labels == 1]
    nearest = torch.cdist(arm @ turn, next_arm).amin(dim=1)
    assert nearest.median() < 0.03 < 0.2 < torch.cdist(arm, next_arm).amin(dim=1).median()


@pytest.mark.parametrize("draw", [data.textures, data.shapes])
def test_a_picture_depends_on_seed_and_index_only(draw):
    few, many, other = (everything(draw(n, 16, seed)) for n, seed in ((7, 3), (600, 3), (600, 4)))
    assert torch.equal(few[0], many[0][:7]) and torch.equal(few[1], many[1][:7])
    assert not any(torch.equal(a, b) for a, b in zip(many[0], other[0], strict=True))


@pytest.mark.parametrize("source, size, channels", [
    ("textures", 16, 3), ("shapes", 16, 3), ("points", 1, 2),
])
def test_train_and_test_splits_of_procedural_sets_share_nothing(source, size, channels):
    config = DataConfig(source, size, channels)
    train, test = (data.load(config, split, count=200) for split in ("train", "test"))
    assert len(train) == len(test) == 200 and train.classes == test.classes
    assert len(contents(train)) == len(contents(test)) == 200
    assert not contents(train) & contents(test)


# ---- A folder: pixels ----------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(10, 30), (30, 10), (10, 13)])
def test_images_are_cropped_to_their_centre(tmp_path, height, width):
    pixels = np.zeros((height, width, 3))
    top, left = (height - 10) // 2, (width - 10) // 2
    pixels[top : top + 10, left : left + 10] = noise(10, 10, 3)
    save(tmp_path / "a" / "0.png", pixels)
    images, _ = everything(read(tmp_path, 10))
    assert np.array_equal(data.to_uint8(images)[0], noise(10, 10, 3))


@pytest.mark.parametrize("is_wide", [True, False])
def test_images_are_cropped_and_then_reduced(tmp_path, is_wide):
    """A ramp of 4 a pixel along the long side. Of 60 pixels the middle 20 are kept, and four of
    them become one."""
    ramp = np.broadcast_to(4 * np.arange(60)[None, :, None], (20, 60, 3))
    save(tmp_path / "a" / "0.png", ramp if is_wide else ramp.transpose(1, 0, 2))
    images, _ = everything(read(tmp_path, 5))
    pixels = data.to_uint8(images)[0].astype(int)
    expected = np.broadcast_to(4 * (20 + np.arange(5) * 4 + 1.5), (5, 5))
    expected = expected if is_wide else expected.T
    assert pixels.shape == (5, 5, 3) and np.abs(pixels - expected[:, :, None]).max() <= 1


def test_grey_images_have_one_channel_of_luma(tmp_path):
    pixels = noise(8, 8, 3)
    save(tmp_path / "a" / "0.png", pixels)
    images, _ = everything(read(tmp_path, channels=1))
    assert images.shape == (1, 1, 8, 8)
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(data.to_uint8(images)[0, :, :, 0] - luma).max() <= 1


def test_a_photograph_is_turned_upright(tmp_path):
    upright = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # "Orientation": to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    assert (data.read_image(tmp_path / "a.png", 8, 3) == upright.transpose(2, 0, 1)).all()


def test_a_photograph_with_an_odd_tag_can_be_read(tmp_path):
    """A unit of resolution that is text, beside the orientation: Pillow cannot turn such an
    image."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0128, 2, 2, b"2")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(tmp_path / "a.jpg", 8, 3)[0].min() > 250


def transparent(mode: str) -> Image.Image:
    """An image of 2×2 that is black, and in its lower row transparent."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 2), "black")
        image.putalpha(Image.fromarray(np.array([[255, 255], [0, 0]], np.uint8)))
        return image
    colours = np.array([[[0] * 3] * 2, [[9] * 3] * 2], np.uint8)
    image = Image.fromarray(colours)
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(tmp_path, mode, channels):
    image, options = transparent(mode), {}
    if mode not in ("RGBA", "LA"):  # one of the colours is declared transparent
        options = dict(transparency=image.getpixel((0, 1)))
    image.save(tmp_path / "a.png", **options)
    assert Image.open(tmp_path / "a.png").mode == mode
    pixels = data.read_image(tmp_path / "a.png", 2, channels)
    assert pixels.tolist() == [[[0, 0], [255, 255]]] * channels


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (200, 0, 100, 51)).save(tmp_path / "a.png")  # 51 is a fifth of 255
    pixels = data.read_image(tmp_path / "a.png", 2, 3)
    assert pixels[:, 0, 0].tolist() == [244, 204, 224]  # 255 − (255 − colour) / 5


def test_palettes_keep_their_colours(tmp_path):
    colours = np.array([[[250, 10, 20]] * 2, [[30, 40, 200]] * 2], np.uint8)
    Image.fromarray(colours).quantize(4).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert np.array_equal(data.read_image(tmp_path / "a.png", 2, 3), colours.transpose(2, 0, 1))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    grey = np.array([[0, 65535], [257, 25700 + 129]], np.uint16)  # 129 is more than half of 257
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png", 2, 3).tolist() == [[[0, 255], [1, 101]]] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(UserError, match="a.png .its pixels are 32-bit numbers, whose range is not"):
        data.read_image(tmp_path / "a.png", 2, 3)


def test_images_are_never_enlarged(tmp_path):
    save(tmp_path / "a" / "0.png", noise(8, 12, 3))
    assert len(read(tmp_path, 8)) == 1
    with pytest.raises(UserError, match="a/0.png is smaller than 9×9 .* choose --image-size 8 "):
        read(tmp_path, 9)


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not beside the checkout")
def test_cifar10_jpegs_are_read_as_pillow_decodes_them(tmp_path):
    wanted = re.compile(r"test/(airplane|automobile)/00(0\d|1[0-4])\.jpg")
    with tarfile.open(CIFAR10) as archive:
        members = (member for member in archive if wanted.fullmatch(member.name))
        for _ in range(30):
            archive.extract(next(members), tmp_path, filter="data")
    images, labels = everything(read(tmp_path / "test", 32))
    names = ("airplane", "automobile")
    files = [tmp_path / "test" / name / f"{i:04d}.jpg" for name in names for i in range(15)]
    assert len(images) == 30
    for file, image, label in zip(files, images, labels, strict=True):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert pixels.shape == (32, 32, 3) and label == ("automobile" in str(file))
        assert np.allclose(image, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


# ---- A folder: classes and splits ----------------------------------------------------------------

# The split is a promise to every network that was ever trained: of 000.png … 049.png, these are for
# testing.
TEST_NUMBERS = (19, 20, 26)


def write_numbered(root: Path, counts: dict[str, int], first=0):
    """Images whose colour tells their class, by the length of its name, and their number."""
    for name, count in counts.items():
        for i in range(first, count):
            save(root / name / f"{i:03d}.png", (len(name), i, 7))


def numbers(dataset) -> list[tuple[int, int]]:
    """(length of the class's name, number) of each image."""
    images, labels = everything(dataset)
    lengths, found, _ = data.to_uint8(images)[:, 0, 0].T.tolist()
    assert [len(dataset.classes[label]) for label in labels] == lengths
    return list(zip(lengths, found, strict=True))


def test_classes_are_sorted_and_an_image_s_name_decides_its_split(tmp_path):
    counts = {"moth": 13, "zebra": 50, "ant": 25}  # not in sorted order
    write_numbered(tmp_path, counts)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not a class")
    train, test, both = (read(tmp_path, split=split) for split in ("train", "test", "all"))
    assert train.classes == test.classes == ("ant", "moth", "zebra")
    expected = {(len(name), i) for name, count in counts.items() for i in range(count)}
    held_out = {(length, i) for length, i in expected if i in TEST_NUMBERS}
    assert set(numbers(test)) == held_out and len(test) == len(held_out)
    assert set(numbers(train)) == expected - held_out and len(train) == 88 - len(held_out)
    assert sorted(numbers(both)) == sorted(expected)


def test_images_that_are_added_move_no_others(tmp_path):
    write_numbered(tmp_path, {"ant": 30})
    before = set(numbers(read(tmp_path, split="test")))
    write_numbered(tmp_path, {"ant": 60, "zebra": 20}, first=10)
    assert before == {(n, i) for n, i in numbers(read(tmp_path, split="test")) if n == 3 and i < 30}


def test_about_one_image_in_ten_is_for_testing():
    tested = [data.is_test(f"n01440764/n01440764_{i}.JPEG") for i in range(5000)]
    assert 410 < sum(tested) < 590  # four standard deviations
    assert data.is_test("a/x.png") == data.is_test("b/x.png") == data.is_test("x.png")


def test_unequal_classes_have_weights(tmp_path):
    write_numbered(tmp_path, {"ant": 3, "zebra": 1})
    assert read(tmp_path).class_weights == (0.75, 0.25)
    write_numbered(tmp_path, {"zebra": 3}, first=1)
    assert read(tmp_path).class_weights == ()


def test_images_without_classes_are_one_class(tmp_path):
    for i in range(3):
        save(tmp_path / "cats" / f"{i}.JPG", (1, i, 0))
    dataset = read(tmp_path / "cats")
    assert (dataset.classes, len(dataset), dataset.class_weights) == (("cats",), 3, ())


def test_what_systems_add_to_folders_is_skipped(tmp_path):
    write_numbered(tmp_path, {"ant": 2})
    added = (".git/x.png", "__MACOSX/x.png", "@eaDir/x.png", "ant/._000.png", "ant/@eaDir/x.png")
    for name in added:
        save(tmp_path / name, (9, 9, 9))
    (tmp_path / ".DS_Store").write_text("")
    assert numbers(read(tmp_path)) == [(3, 0), (3, 1)]


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "webp", "bmp"])
def test_suffixes(tmp_path, suffix):
    save(tmp_path / "a" / f"0.{suffix}", (200, 10, 10))
    save(tmp_path / "a" / "1.gif", (200, 10, 10))
    assert len(read(tmp_path)) == 1


def test_a_folder_is_described(tmp_path, capsys):
    write_numbered(tmp_path, {name * 3: 21 for name in "abcdef"})
    read(tmp_path, channels=1, split="train", flip=True)
    assert capsys.readouterr().out == (
        f"{tmp_path}: 114 grey images of 8×8, mirrored at random (12 others are held out for "
        "testing); 6 classes: aaa 19, bbb 19, ccc 19, ddd 19, eee 19, …\n"
    )


def break_folder(root: Path, trouble: str):
    write_numbered(root, {"ant": 1})
    file = root / "ant" / "001.png"
    if trouble == "text":
        file.write_text("hello")
    if trouble == "cut short":
        save(file, noise(16, 16, 3))
        file.write_bytes(file.read_bytes()[:-200])
    if trouble == "beside folders":
        save(root / "x.png", (0, 0, 0))
    if trouble == "deeper":
        save(root / "ant" / "red" / "x.png", (0, 0, 0))
    if trouble == "one level too high":
        save(root / "train" / "bee" / "x.png", (0, 0, 0))
    if trouble == "other format":
        save(root / "bee" / "x.gif", (0, 0, 0))
    if trouble == "empty class":
        (root / "bee").mkdir()


@pytest.mark.parametrize("trouble, says", [
    ("text", "cannot read the image ROOT/ant/001.png "),
    ("cut short", "cannot read the image ROOT/ant/001.png "),
    ("beside folders", "ROOT holds images (x.png) beside folders (ant)"),
    ("deeper", "ROOT/ant holds folders (red): images are expected in ROOT/<class>/"),
    ("one level too high", "If these folders are the classes, choose ROOT/train"),
    ("other format", "no images in ROOT/bee"),
    ("empty class", "no images in ROOT/bee"),
])
def test_an_arrangement_that_would_leave_images_out_is_refused(tmp_path, trouble, says):
    break_folder(tmp_path / "images", trouble)
    with pytest.raises(UserError, match=re.escape(says.replace("ROOT", f"{tmp_path}/images"))) as e:
        read(tmp_path / "images")
    assert "\n" not in str(e.value)


def test_a_folder_without_images_or_with_too_few_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder of images"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in .*: expected .*/<class>/"):
        read(tmp_path)
    save(tmp_path / "ant" / "000.png", (0, 0, 0))
    with pytest.raises(UserError, match="none of the few in .* add others"):
        read(tmp_path, split="test")
    save(tmp_path / "bee" / f"{TEST_NUMBERS[0]:03d}.png", (0, 0, 0))
    with pytest.raises(UserError, match="so are all images of the class 'bee'"):
        read(tmp_path, split="train")


# ---- what a training takes from a folder ---------------------------------------------------------


def fit(root, *words, preset="cifar10"):
    """The preset as teacher.py uses it with these flags."""
    parser = argparse.ArgumentParser()
    for name, kind in dict(image_size=int, channels=int, guidance_scale=float).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction)
    flags = parser.parse_args(words)
    chosen = override_parts(PRESETS[preset], flags, "data", "ode")
    chosen = replace(chosen, data=replace(chosen.data, source=str(root)))
    return data.fit_to_images(chosen, flags)


def test_a_training_fits_its_images(tmp_path, capsys):
    """Small grey digits: neither enlarged, nor coloured, nor mirrored."""
    for i in range(30):
        path = tmp_path / str(i % 2) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(9, 11 + i % 3)).save(path)
    found = fit(tmp_path)
    assert found.data == DataConfig(str(tmp_path), image_size=8, channels=1, flip=False)
    assert found.ode == PRESETS["cifar10"].ode  # two classes: with guidance
    said = capsys.readouterr().out
    assert "training at 8×8 pixels (see --image-size): the smallest image, 0/0.png, has 9×9" in said
    assert "3 images are held out, and distances to real images need 70" in said
    dataset = data.load(found.data)
    assert dataset.shape == (1, 8, 8) and not dataset.flip
    assert "27 grey images of 8×8, not mirrored (3 others" in capsys.readouterr().out


def test_flags_go_before_what_images_say(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "0.png")
    words = "--flip --channels 3 --image-size 16 --guidance-scale 2".split()
    found = fit(tmp_path, *words)
    assert found.data == DataConfig(str(tmp_path), image_size=16, channels=3, flip=True)
    assert found.ode.guidance_scale == 2


def test_large_colour_images_have_the_size_of_the_preset(tmp_path):
    save(tmp_path / "a" / "0.png", noise(64, 80, 3))
    Image.fromarray(noise(64, 64)).save(tmp_path / "a" / "1.png")  # grey, among coloured ones
    assert fit(tmp_path).data == DataConfig(str(tmp_path), image_size=32, channels=3)
    small = fit(tmp_path, preset="textures").data
    assert small == DataConfig(str(tmp_path), image_size=16, channels=3)


def test_one_class_has_no_guidance(tmp_path, capsys):
    save(tmp_path / "0.png", (1, 2, 3))
    assert fit(tmp_path).ode.guidance_scale == 1
    assert "one class: no guidance (see --guidance-scale)" in capsys.readouterr().out


def test_a_bad_image_is_left_to_the_reader(tmp_path):
    save(tmp_path / "0.png", (1, 2, 3))
    (tmp_path / "1.png").write_text("hello")
    assert fit(tmp_path).data.image_size == 8


def test_what_is_drawn_fits_already():
    for name in ("textures", "points"):
        preset = PRESETS[name]
        assert data.fit_to_images(preset, argparse.Namespace()) == preset


def test_a_preset_of_latents_does_not_turn_into_one_of_images(tmp_path):
    write_numbered(tmp_path, {"ant": 3})
    found = fit(tmp_path, preset="imagenet256")
    with pytest.raises(UserError, match="encode the images first: python latents.py"):
        data.load(found.data)


def test_files_that_are_not_read_are_reported(tmp_path, capsys):
    write_numbered(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / "ant" / "x.gif").touch()
    (tmp_path / "labels.csv").touch()
    (tmp_path / ".DS_Store").touch()
    data.note_unread(tmp_path)
    assert capsys.readouterr().out == (
        f"note: 2 files in {tmp_path} are not read, such as {tmp_path}/ant/x.gif\n"
    )
    data.note_unread(tmp_path / "bee")
    assert not capsys.readouterr().out


def test_a_folder_is_the_same_source_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for text in ("a", "./a", "a/", "a/../a", str(tmp_path / "a"), "link"):
        assert data.data_source(text) == str(tmp_path.resolve() / "a")
    assert data.data_source("textures") == "textures"


def test_a_meta_json_of_another_program(tmp_path):
    write_numbered(tmp_path, {"ant": 3})
    (tmp_path / "meta.json").write_text('{"photographer": "A. N. Other"}')
    assert len(read(tmp_path)) == 3
    (tmp_path / "meta.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="meta.json is damaged, or was written by another program"):
        read(tmp_path)
    whole = dict(vae="0", classes=["a"], shape=[4, 2, 2], shards=0)
    for change in (dict(shape="wide"), dict(shards="many"), dict(shape=None)):
        (tmp_path / "meta.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match="meta.json is damaged"):
            read(tmp_path, 2, 4)


# ---- load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, says", [
    (DataConfig(None, 32, 3), "this preset needs images: --data DIR"),
    (DataConfig("textures", 16, 1), "(3, 16, 16), and (1, 16, 16) is expected"),
    (DataConfig("points", 4, 2), "(2, 1, 1), and (2, 4, 4) is expected"),
    (DataConfig("textures", 16, 3, flip=True), "textures cannot be mirrored"),
    (DataConfig("ROOT", 8, 4), "encode the images first: python latents.py"),
])
def test_load_refuses_what_does_not_fit(tmp_path, config, says):
    write_numbered(tmp_path, {"ant": 1})
    if config.source == "ROOT":
        config = replace(config, source=str(tmp_path))
    with pytest.raises(UserError, match=re.escape(says)):
        data.load(config, count=10)


# ---- Batches -------------------------------------------------------------------------------------


def test_flip_mirrors_half_of_the_images_and_only_in_training(tmp_path):
    pixels = noise(4, 4, 3)
    for name in ("x.png", "y.png"):
        save(tmp_path / name, pixels)
    original = torch.from_numpy(pixels.transpose(2, 0, 1)) / 127.5 - 1
    cases = (("train", True, 160, 240), ("train", False, 0, 0), ("all", True, 0, 0))
    for split, flip, fewest, most in cases:
        images, _ = read(tmp_path, 4, split=split, flip=flip).draw(400, data.stream(0, 0))
        mirrored = sum(torch.equal(x, original.flip(-1)) for x in images)
        assert mirrored + sum(torch.equal(x, original) for x in images) == 400
        assert fewest <= mirrored <= most


def test_a_random_batch_depends_on_its_generator_only():
    dataset = data.shapes(50)
    dataset.flip = True
    batches = []
    for global_seed in (0, 1):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        batches.append(dataset.draw(20, data.stream(0, 7)))
    other, _ = dataset.draw(20, data.stream(0, 8))
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], other)
    pictures, labels = everything(dataset)
    for image, label in zip(*batches[0], strict=True):  # one of the set's, mirrored or not
        known = [torch.equal(image, p) or torch.equal(image.flip(-1), p) for p in pictures]
        assert label in labels[known]


def test_some_are_of_every_class_and_none_comes_twice():
    images = np.arange(300, dtype=np.float32).reshape(300, 1, 1, 1)
    dataset = data.Dataset(images, np.repeat([0, 1, 2], 100), "abc")
    images, labels = dataset.some(60)
    assert len(images.unique()) == 60 and labels.bincount().min() > 10
    assert torch.equal(images, dataset.some(60)[0]) and len(dataset.some(1000)[0]) == 300


def test_a_stream_depends_on_seed_and_index_only():
    first = data.stream(3, 5).standard_normal(8)
    np.random.seed(1)
    data.stream(3, 4).standard_normal(100)
    assert np.array_equal(data.stream(3, 5).standard_normal(8), first)
    others = [data.stream(*key).standard_normal(8) for key in ((3, 6), (4, 5), (5, 3))]
    assert all(np.abs(other - first).min() > 1e-6 for other in others)


# ---- Noise and labels ----------------------------------------------------------------------------


def test_sample_i_is_the_same_in_any_batch():
    noise, labels = data.noise_and_labels(TEACHER, 5, range(600))
    some, some_labels = data.noise_and_labels(TEACHER, 5, [7, 123, 7])
    assert torch.equal(some, noise[[7, 123, 7]]) and torch.equal(some_labels, labels[[7, 123, 7]])
    assert not torch.equal(data.noise_and_labels(TEACHER, 6, range(600))[0], noise)
    assert len({tuple(x.flatten().tolist()) for x in noise}) == 600  # no two alike

    assert noise.shape == (600, 3, 8, 8) and noise.dtype == torch.float32
    assert torch.equal(noise.half().float(), noise)  # as it is stored
    assert abs(noise.mean()) < 0.012 and abs(noise.var() - 1) < 0.017  # four standard deviations
    assert labels.dtype == torch.int64 and labels.max() == 4
    assert all(71 < n < 169 for n in labels.bincount(minlength=5))  # five of them


def test_uniform_labels_are_drawn_after_the_noise():
    """As they always were: what was written before stays what it is."""
    x_T, labels = data.noise_and_labels(TEACHER, 9, [3])
    rng = data.stream(9, 3)
    first = rng.standard_normal((3, 8, 8), dtype=np.float32)
    assert np.array_equal(x_T[0].numpy(), first.astype(np.float16))
    assert labels.tolist() == [rng.integers(5)]


def test_labels_are_as_frequent_as_in_the_data():
    weights = (0.5, 0.0, 0.25, 0.125, 0.125)
    record = replace(TEACHER, class_weights=weights)
    noise, labels = data.noise_and_labels(record, 5, range(2000))
    frequencies = labels.bincount(minlength=5) / 2000
    assert (frequencies - torch.tensor(weights)).abs().max() < 0.045  # four standard deviations
    assert frequencies[1] == 0
    assert torch.equal(noise, data.noise_and_labels(TEACHER, 5, range(2000))[0])  # the same noise
    assert data.noise_and_labels(record, 5, [77])[1] == labels[77]


# ---- Pictures and files --------------------------------------------------------------------------


def test_pixels_survive_the_way_to_numbers_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images, _ = everything(data.Dataset(pixels, np.zeros(1, np.int64), ["a"]))
    assert images.min() == -1 and images.max() == 1
    assert np.array_equal(data.to_uint8(images)[0, :, :, 0], pixels[0, 0])
    beyond = torch.tensor([-3.0, -1.0, 0.999, 3.0]).reshape(4, 1, 1, 1)
    assert data.to_uint8(beyond).flatten().tolist() == [0, 0, 255, 255]


def test_a_grid_puts_images_row_by_row_between_white_gaps():
    colours = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, 1]])
    images = colours[:, :, None, None].expand(5, 3, 16, 16)
    sheet = data.image_grid(images, columns=3, side=64, gap=4)
    assert sheet.size == (4 + 3 * 68, 4 + 2 * 68)
    pixels = np.asarray(sheet)
    for i, colour in enumerate(data.to_uint8(images)[:, 0, 0]):
        top, left = 4 + i // 3 * 68, 4 + i % 3 * 68
        assert (pixels[top : top + 64, left : left + 64] == colour).all()
    assert (pixels[:4] == 255).all() and (pixels[-4:] == 255).all()
    assert (pixels[:, 68:72] == 255).all() and (pixels[72:, 140:] == 255).all()
    grey = data.image_grid(torch.zeros(2, 1, 16, 16), columns=2)
    assert grey.getpixel((10, 10)) == (128, 128, 128)
    assert data.image_grid(torch.zeros(3, 4, 16, 16), columns=2).size == (140, 140)  # latents


def test_npz_is_numpy_s(tmp_path):
    images = noise(10, 4, 4, 3)
    data.write_npz(tmp_path / "a.npz", 10, iter([images[:7], images[7:]]))
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)


@pytest.mark.parametrize("text, name", [
    ("golden retriever", "golden-retriever"), ("../a\\b: c?", "a-b-c"), ("é_1-2", "é_1-2"),
    ("..", "unnamed"), ("x" * 300, "x" * 50),
])
def test_file_names_are_safe(text, name):
    assert data.file_name(text) == name


@pytest.mark.parametrize("source", ["textures", "shapes", "points"])
def test_what_is_drawn_to_compare_with_was_not_trained_on(source):
    size, channels = (1, 2) if source == "points" else (16, 3)
    config = DataConfig(source, image_size=size, channels=channels)
    train, test, both = (data.load(config, split, 500).images for split in ("train", "test", "all"))
    assert np.array_equal(test, both) and not np.array_equal(train, test)
