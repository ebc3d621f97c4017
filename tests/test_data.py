"""The data sets, against facts that hold for pictures and not against the code that makes them: files are written with
Pillow and read back, the expected pixels come from the test's own arrays or from Pillow's decoder, and the properties
of the procedural sets (which picture a label shows, arms that do not touch) are measured on what they produce.
"""

import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from training import Fault

CIFAR10 = Path(data.__file__).resolve().parent.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"


def everything(dataset):
    """All images and labels of a data set, in its order."""
    return dataset.batch(np.arange(len(dataset)))


def contents(dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(dataset)[0]}


def save(path: Path, pixels: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def plain(height: int, width: int, colour) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


# ---- shapes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 40])
def test_shapes_are_float_images_with_integer_labels(size):
    dataset = data.shapes(200, size)
    images, labels = everything(dataset)
    assert images.shape == (200, 3, size, size) and images.dtype == torch.float32 and dataset.shape == (3, size, size)
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10)) and len(dataset.classes) == 10


def test_a_shape_depends_on_seed_and_index_only():
    few, many, other = (everything(data.shapes(count, 16, seed)) for count, seed in ((7, 3), (30, 3), (30, 4)))
    assert torch.equal(few[0], many[0][:7]) and torch.equal(few[1], many[1][:7])
    assert not any(torch.equal(a, b) for a, b in zip(many[0], other[0], strict=True))


def test_shapes_are_bright_on_a_darker_ground():
    images, _ = everything(data.shapes(100, 32))
    brightness = (images.amax(dim=1) + 1) / 2  # HSV's value
    corners = brightness[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < 0.36  # no shape reaches a corner: the ground
    assert brightness.amax(dim=(1, 2)).min() > 0.74


def test_discs_and_rings_have_the_area_of_discs_and_rings():
    """So a label means what its name says. Areas are fractions of the bounding square: π/4, and less the hole."""
    dataset = data.shapes(120, 64)
    images, labels = everything(dataset)
    for name, area in {"disc": np.pi / 4, "ring": np.pi / 4 * (1 - 0.55**2)}.items():
        chosen = images[labels == dataset.classes.index(name)]
        assert len(chosen) >= 3
        for value in chosen.amax(dim=1):
            inside = value > (value.min() + value.max()) / 2
            height, width = inside.any(dim=1).sum(), inside.any(dim=0).sum()
            assert (inside.sum() / (height * width)).item() == pytest.approx(area, abs=0.03)


# ---- points ---------------------------------------------------------------------------------------------------------

def test_points_lie_on_three_separate_arms():
    dataset = data.points(1500)
    xy, labels = everything(dataset)
    assert xy.shape == (1500, 2, 1, 1) and xy.dtype == torch.float32 and xy.abs().max() < 1.1
    assert set(labels.tolist()) == {0, 1, 2} and len(dataset.classes) == 3
    xy = xy[:, :, 0, 0]
    distance = torch.cdist(xy, xy).fill_diagonal_(9.0)
    assert (labels[distance.argmin(dim=1)] == labels).all()  # the nearest other point is on the same arm
    third = torch.tensor(2 * np.pi / 3)
    turn = torch.tensor([[third.cos(), third.sin()], [-third.sin(), third.cos()]])
    nearest = torch.cdist(xy[labels == 0] @ turn, xy[labels == 1]).amin(dim=1)
    assert nearest.median() < 0.03 < 0.2 < torch.cdist(xy[labels == 0], xy[labels == 1]).amin(dim=1).median()


@pytest.mark.parametrize("name", ["shapes", "points"])
def test_train_and_test_splits_share_nothing(name):
    train, test = (data.load(name, 16, split=split, count=200) for split in ("train", "test"))
    assert len(train) == len(test) == 200 and train.classes == test.classes
    assert len(contents(train)) == len(contents(test)) == 200
    assert not contents(train) & contents(test)


# ---- a folder of images ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(10, 30), (30, 10), (10, 13)])
def test_images_are_cropped_to_their_centre(tmp_path, height, width):
    pixels = plain(height, width, (0, 255, 0))
    top, left = (height - 10) // 2, (width - 10) // 2
    centre = np.random.default_rng(0).integers(256, size=(10, 10, 3), dtype=np.uint8)
    pixels[top : top + 10, left : left + 10] = centre
    save(tmp_path / "a" / "0.png", pixels)
    images, _ = everything(data.folder(tmp_path, 10))
    assert np.array_equal(data.to_uint8(images)[0], centre)


@pytest.mark.parametrize("wide", [True, False])
def test_images_are_cropped_and_then_resized(tmp_path, wide):
    """A ramp of 4 a pixel along the long side: of 60 pixels the middle 20 are kept, and every four become one."""
    ramp = np.broadcast_to(4 * np.arange(60)[None, :, None], (20, 60, 3))
    save(tmp_path / "a" / "0.png", ramp if wide else ramp.transpose(1, 0, 2))
    images, _ = everything(data.folder(tmp_path, 5))
    expected = np.broadcast_to(4 * (20 + np.arange(5) * 4 + 1.5), (5, 5))
    got = data.to_uint8(images)[0].astype(int)
    assert got.shape == (5, 5, 3)
    assert np.abs(got - (expected if wide else expected.T)[:, :, None]).max() <= 1


def test_grey_images_have_one_channel_of_luma(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    save(tmp_path / "a" / "0.png", pixels)
    images, _ = everything(data.folder(tmp_path, 8, channels=1))
    assert images.shape == (1, 1, 8, 8)
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(data.to_uint8(images)[0, :, :, 0] - luma).max() <= 1


def test_a_photograph_is_turned_as_its_camera_was(tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "Orientation": to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    assert (data.read_image(tmp_path / "a.png", 8, 3) == upright.transpose(2, 0, 1)).all()


def test_a_photograph_with_an_odd_tag_loads(tmp_path):
    """A unit of resolution that is text, beside the orientation: with that Pillow cannot turn a picture."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0128, 2, 2, b"2")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(tmp_path / "a.jpg", 8, 3)[0].min() > 250


def test_palette_and_transparent_images_load_in_their_colours(tmp_path):
    (tmp_path / "a").mkdir()
    colours = np.repeat(np.array([[[250, 10, 20]], [[30, 40, 200]]], np.uint8), 2, axis=1)  # (2, 2, 3): red over blue
    image = Image.fromarray(colours)
    image.quantize(4).save(tmp_path / "a" / "palette.png")
    image.convert("RGBA").save(tmp_path / "a" / "transparent.png")
    assert Image.open(tmp_path / "a" / "palette.png").mode == "P"
    images, _ = everything(data.folder(tmp_path, 2))
    assert np.array_equal(data.to_uint8(images), np.stack([colours, colours]))


def test_labels_follow_sorted_names_and_every_tenth_image_is_held_out(tmp_path):
    counts = {"moth": 3, "zebra": 12, "ant": 25}  # made in an order that is not sorted, nor is its reverse
    for name, count in counts.items():
        for i in range(count):
            colour = (len(name), 10 * i, 7)  # tells class and number
            save(tmp_path / name / f"{i:02d}.{('png', 'PNG')[i % 2]}", plain(4, 4, colour))
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "no images here").mkdir()
    (tmp_path / "readme.txt").write_text("not a class")

    seen = {}
    for split in ("train", "test"):
        dataset = data.load(str(tmp_path), 4, flip=True, split=split)
        images, labels = everything(dataset)
        assert dataset.classes == ["ant", "moth", "zebra"] and dataset.flip == (split == "train")
        letters, tens, _ = data.to_uint8(images)[:, 0, 0].T.tolist()
        assert [len(dataset.classes[label]) for label in labels] == letters
        seen[split] = [(label, ten // 10) for label, ten in zip(labels.tolist(), tens, strict=True)]
    assert seen["test"] == [(0, 9), (0, 19), (2, 9)]
    whole = [(label, i) for label, name in enumerate(sorted(counts)) for i in range(counts[name])]
    assert sorted(seen["train"] + seen["test"]) == whole  # all of them, none twice


def test_flip_mirrors_half_of_the_images_left_to_right_and_only_when_on():
    image = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    original = torch.from_numpy(image[0]).float() / 127.5 - 1
    mirrored = torch.from_numpy(image[0, :, :, ::-1].copy()).float() / 127.5 - 1
    for flip, few, most in ((True, 160, 240), (False, 0, 0)):
        images, _ = data.Dataset(image, np.zeros(1, np.int64), ["a"], flip=flip).draw(400, data.stream(0, 0))
        turned = sum(torch.equal(x, mirrored) for x in images)
        assert turned + sum(torch.equal(x, original) for x in images) == 400
        assert few <= turned <= most


@pytest.mark.parametrize("trouble, named, says", [
    ("missing", "", "no such folder"),
    ("empty", "", "no images"),
    ("no images", "", "no images"),
    ("text", "a/1.png", "cannot read"),
    ("cut short", "a/1.jpg", "cannot read"),
    ("too few to hold out", "", "too small"),
    ("not latents", "", "is no folder of latents"),
])
def test_a_folder_that_cannot_be_used_is_a_fault_that_names_the_path(tmp_path, trouble, named, says):
    root = tmp_path / "images"
    if trouble not in ("missing", "empty", "no images"):
        save(root / "a" / "0.png", plain(16, 16, (1, 2, 3)))  # a good one beside it
    if trouble == "empty":
        root.mkdir()
    if trouble == "no images":
        (root / "a").mkdir(parents=True)
        (root / "a" / "notes.txt").write_text("hello")
    if trouble == "text":
        (root / named).write_text("hello")
    if trouble == "cut short":
        save(root / named, np.random.default_rng(0).integers(256, size=(16, 16, 3)))
        (root / named).write_bytes((root / named).read_bytes()[:-200])
    with pytest.raises(Fault, match=says) as fault:
        data.folder(root, 8, channels=4 if trouble == "not latents" else 3,
                    split="test" if trouble == "too few to hold out" else "train")
    assert str(root / named) in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not beside the checkout")
def test_cifar10_jpegs_are_read_as_pillow_decodes_them(tmp_path):
    wanted = re.compile(r"test/(airplane|automobile)/00(0\d|1[0-4])\.jpg")
    with tarfile.open(CIFAR10) as archive:
        members = (member for member in archive if wanted.fullmatch(member.name))
        for _ in range(30):
            archive.extract(next(members), tmp_path, filter="data")
    for split in ("train", "test"):
        images, labels = everything(data.folder(tmp_path / "test", 32, split=split))
        ours = [9] if split == "test" else [*range(9), *range(10, 15)]
        files = [tmp_path / "test" / name / f"{i:04d}.jpg" for name in ("airplane", "automobile") for i in ours]
        assert len(files) == len(images) == (28 if split == "train" else 2)
        for file, image, label in zip(files, images, labels, strict=True):
            pixels = np.asarray(Image.open(file).convert("RGB"))
            assert pixels.shape == (32, 32, 3) and label == ("automobile" in str(file))
            assert np.allclose(image, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


# ---- randomness and pictures ----------------------------------------------------------------------------------------

def test_a_stream_depends_on_seed_and_index_only():
    first = data.stream(3, 5).standard_normal(8)
    np.random.seed(1)
    data.stream(3, 4).standard_normal(100)
    assert np.array_equal(data.stream(3, 5).standard_normal(8), first)
    others = [data.stream(*key).standard_normal(8) for key in ((3, 6), (4, 5), (5, 3))]
    assert all(np.abs(other - first).min() > 1e-6 for other in others)


def test_a_random_batch_depends_on_its_generator_only():
    dataset = data.shapes(50)
    dataset.flip = True
    batches = []
    for global_seed in (0, 1):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        batches.append(dataset.draw(20, data.stream(0, 7)))
    other = dataset.draw(20, data.stream(0, 8))
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], other[0])
    pictures, labels = everything(dataset)
    for image, label in zip(*batches[0], strict=True):  # each is one of the data set's, mirrored or not, with its label
        known = [torch.equal(image, p) or torch.equal(image.flip(-1), p) for p in pictures]
        assert label in labels[known]


def test_some_are_of_every_class_and_none_comes_twice():
    images = np.arange(300, dtype=np.float32).reshape(300, 1, 1, 1)
    sorted_by_class = data.Dataset(images, np.repeat([0, 1, 2], 100), "abc")
    images, labels = sorted_by_class.some(60)
    assert len(images.unique()) == 60 and min(labels.bincount()) > 10
    assert torch.equal(images, sorted_by_class.some(60)[0]) and len(sorted_by_class.some(1000)[0]) == 300


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images, _ = everything(data.Dataset(pixels, np.zeros(1, np.int64), ["a"]))
    assert images.min() == -1 and images.max() == 1
    assert np.array_equal(data.to_uint8(images)[0, :, :, 0], pixels[0, 0])
    beyond = torch.tensor([-3.0, -1.0, 0.999, 3.0]).reshape(4, 1, 1, 1)
    assert data.to_uint8(beyond).flatten().tolist() == [0, 0, 255, 255]


def test_a_grid_puts_images_row_by_row_between_white_gaps():
    colours = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, 1]])
    sheet = data.grid(colours[:, :, None, None].expand(5, 3, 16, 16), columns=3, side=64, gap=4)
    assert sheet.size == (4 + 3 * 68, 4 + 2 * 68)
    pixels = np.asarray(sheet)
    for i, colour in enumerate(data.to_uint8(colours[:, :, None, None])[:, 0, 0]):
        top, left = 4 + i // 3 * 68, 4 + i % 3 * 68
        assert (pixels[top : top + 64, left : left + 64] == colour).all()
    assert (pixels[:4] == 255).all() and (pixels[:, 68:72] == 255).all() and (pixels[72:, 140:] == 255).all()
    assert data.grid(torch.zeros(2, 1, 16, 16), columns=2).getpixel((10, 10)) == (128, 128, 128)  # grey images too
