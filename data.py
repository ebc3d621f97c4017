"""What networks learn from: images with class labels.

A data set is a `Dataset`. An image is (c, h, w), in [-1, 1]; a label is a whole number. There are

    textures    three kinds of textures in random colours. The default; nothing to download
    shapes      ten kinds of shapes in random colours
    points      a spiral in the plane, as 1×1 images of two channels: trajectories can be drawn
    scenes      small pictures with captions, which are the classes (scenes.py)
    DIR         your own images, DIR/<class>/*.png (or jpg, jpeg, webp, bmp). Without class folders,
                DIR/*.png are images of one class
    DIR         latents of images, which latents.py has made

`load` returns the set that a DataConfig names, either to train on or to test on. About one image in
ten of a folder is held out for testing. Which ones depends only on their file names, so that images
can be added later. The other sets are drawn by programs, with another seed for testing.

Noises, batches and the sets that are drawn here take their random numbers from `stream(seed, i)`.
So the noise of sample i or the batch of iteration i does not depend on what was drawn before.
"""

import hashlib
import os
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import ceil, pi, sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.random import Generator, Philox
from PIL import Image, ImageOps

from config import DataConfig, Preset, StudentRecord, TeacherRecord, parse_size
from figures import new_figure, plain, save_figure
from files import UserError, replace_file
from machine import Progress
from scenes import caption_list, caption_weights, draw_cover, draw_scenes
from shards import Shards, read_meta
from text import scene_prompts

EVALUATION_SEED = 2**34  # of noises for evaluation: larger than any seed of a training
SAMPLING_SEED = 2**35  # the first seed of sample.py
DRAWN = ("textures", "shapes", "points", "scenes")  # data sets that are drawn by programs
LEAST_IMAGES = 70  # for distances: a Gaussian in 64 features needs more than 64

# ---- 1. Random numbers ---------------------------------------------------------------------------


def stream(seed: int, index: int) -> Generator:
    """Random numbers that depend on (seed, index) only."""
    key = np.array([seed, index], dtype=np.uint64)
    return Generator(Philox(key=key))


def noise_and_labels(record: TeacherRecord | StudentRecord, seed: int, indices):
    """Noise x_T (b, c, h, w) and labels (b,) of the samples with these indices, for the network
    that `record` describes. Sample i depends on (seed, i) only. Classes are as frequent as in the
    network's data.

    The noise is rounded to float16 *before* it is used: it is stored so, and what is stored must be
    the noise from which the teacher's image was made."""
    config = record.model
    shape = (config.channels, config.image_size, config.image_size)
    frequencies = record.class_weights or None  # None: uniform
    noise, labels = [], []
    for i in indices:
        rng = stream(seed, i)
        noise.append(rng.standard_normal(shape, dtype=np.float32))
        labels.append(rng.choice(config.classes, p=frequencies))
    x_T = torch.from_numpy(np.stack(noise))
    return x_T.half().float(), torch.tensor(labels)


# ---- 2. A data set -------------------------------------------------------------------------------


class Dataset:
    """Images and their labels.

    images           (N, c, h, w), a NumPy array or an object that is indexed like one. uint8
                     values are pixels; other numbers are used unchanged
    labels           (N,), int64
    classes          their names
    flip             whether `draw` mirrors images at random
    class_weights    the fraction of images in each class; () where all are equally frequent
    prompts          where classes are captions: text.Prompts
    """

    def __init__(
        self,
        images,
        labels,
        classes,
        flip: bool = False,
        class_weights: tuple[float, ...] = (),
        prompts=None,
    ):
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.flip = flip
        self.class_weights = class_weights
        self.prompts = prompts
        self.shape = tuple(images.shape[1:])

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """The images (b, c, h, w), float32, and the labels (b,) of an array of indices. Pixels
        become numbers in [-1, 1]."""
        images = torch.from_numpy(self.images[index])
        if images.dtype == torch.uint8:
            images = images / 127.5 - 1
        return images.float(), torch.from_numpy(self.labels[index])

    def content_key(self) -> str:
        """16 hexadecimal digits that tell these images and labels from others. (Of latents, which
        are many, a thousand are compared.)"""
        in_memory = isinstance(self.images, np.ndarray)
        images = self.images if in_memory else self.some(1000)[0].numpy()
        digest = hashlib.sha256(repr((self.classes, images.shape)).encode())
        digest.update(np.ascontiguousarray(images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]

    def some(self, count: int):
        """`count` images in random order (a data set may be sorted by class). They are always the
        same ones, and none comes twice."""
        order = stream(0, 0).permutation(len(self))
        return self.batch(order[:count])

    def draw(self, count: int, rng: Generator):
        """A random batch, which depends on `rng` only."""
        images, labels = self.batch(rng.integers(len(self), size=count))
        if self.flip:
            mirrored = torch.from_numpy(rng.random(count) < 0.5)
            mirrored = rearrange(mirrored, "b -> b 1 1 1")
            images = torch.where(mirrored, images.flip(-1), images)
        return images, labels


# ---- 3. Textures ---------------------------------------------------------------------------------

GRAINS = (0, 60, 120)  # degrees; the classes: the direction in which the stripes run
WAVES = 12  # in a texture
PERIODS = 2.0  # mean number of a wave's periods across the picture
PERIODS_SPREAD = 0.44  # and its standard deviation
ANGLE_SPREAD = 0.28  # standard deviation of the direction of a wave's stripes, radians
CONTRAST = 2.2  # larger: stripes with sharper edges
# Hue, saturation and value of the dark tone and of the light tone are drawn between these limits.
# The hue of the light tone is relative to that of the dark one.
TONES_FROM = ((0.0, 0.55, 0.12), (0.06, 0.25, 0.85))
TONES_TO = ((1.0, 0.95, 0.37), (0.20, 0.75, 1.0))
CHUNK = 500  # textures that are drawn together


def hsv_to_rgb(hsv):
    """Colours (…, 3): from hue, saturation and value to red, green and blue, all in [0, 1]:
    V − V·S·max(0, min(k, 4 − k, 1)), where k = (n + 6·H) mod 6 and n is 5, 3 and 1."""
    hue, saturation, value = np.split(hsv, 3, axis=-1)
    k = (6 * hue + (5, 3, 1)) % 6
    return value - value * saturation * np.minimum(k, 4 - k).clip(0, 1)


def to_pixels(pictures):
    """Numbers in [0, 1], as those that are drawn here, to uint8. (For images in [-1, 1]:
    to_uint8.)"""
    return np.round(255 * pictures).astype(np.uint8)


def draw_textures(rng: Generator, size: int):
    """CHUNK textures (b, 3, size, size), uint8, and their labels (b,).

    A texture is band-limited Gaussian noise with a grain: a sum of random plane waves, whose
    stripes run about in the direction of its class. It is coloured in a dark and a light tone of
    similar hue."""
    labels = rng.integers(len(GRAINS), size=CHUNK)
    grain = np.radians(GRAINS)[labels]
    shape = (WAVES, CHUNK)
    angle = rng.normal(grain, ANGLE_SPREAD, shape)
    periods = rng.normal(PERIODS, PERIODS_SPREAD, shape)
    amplitude = rng.normal(0, sqrt(2 / WAVES), shape)  # so that the sum has variance 1
    phase = rng.uniform(0, 2 * pi, shape)

    line = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    field = np.zeros((CHUNK, size, size))
    for wave in zip(angle, periods, amplitude, phase, strict=True):
        a, k, strength, p = rearrange(np.stack(wave), "four b -> four b 1 1")
        across = np.sin(a) * x + np.cos(a) * y  # the coordinate across the stripes
        field += strength * np.cos(2 * pi * k * across + p)
    mix = 1 / (1 + np.exp(-CONTRAST * field))  # from 0, the dark tone, to 1, the light one
    mix = rearrange(mix, "b h w -> b 1 h w")

    tones = rng.uniform(TONES_FROM, TONES_TO, (CHUNK, 2, 3))
    tones[:, 1, 0] += tones[:, 0, 0]
    dark, light = rearrange(hsv_to_rgb(tones), "b two c -> two b c 1 1")
    pictures = dark + (light - dark) * mix
    return to_pixels(pictures), labels


def textures(count: int, size: int = 16, seed: int = 0) -> Dataset:
    """`count` textures of three classes, told apart by the direction of their grain. Picture i
    depends on (seed, i) only, because chunks are always drawn whole."""
    chunks = range(ceil(count / CHUNK))
    images, labels = [], []
    for i in Progress("drawing textures", chunks, unit="images", size=CHUNK):
        pictures, kinds = draw_textures(stream(seed, i), size)
        images.append(pictures)
        labels.append(kinds)
    return Dataset(
        np.concatenate(images)[:count],
        np.concatenate(labels)[:count],
        classes=[f"{degrees} degrees" for degrees in GRAINS],
    )


# ---- 4. Shapes -----------------------------------------------------------------------------------

SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "heart", "bar", "bow")


def draw_shape(name: str, rng: Generator, size: int):
    """A picture (3, size, size), uint8: a bright shape with a random colour, place, size and turn,
    on a dark ground with a random colour."""
    radius = rng.uniform(0.30, 0.42) * size
    centre = complex(*rng.uniform(radius, size - radius, size=2))
    turn = np.exp(1j * rng.uniform(-pi / 6, pi / 6))
    cover = draw_cover(name, centre, radius, size, turn)                    # (size, size), in 0 … 1
    ink = hsv_to_rgb(rng.uniform((0, 0.4, 0.75), (1, 1, 1)))
    ground = hsv_to_rgb(rng.uniform((0, 0.2, 0.05), (1, 1, 0.35)))
    ink, ground = rearrange([ink, ground], "two c -> two c 1 1")
    return to_pixels(ground + (ink - ground) * cover)


def shapes(count: int, size: int = 16, seed: int = 0) -> Dataset:
    """`count` pictures of SHAPES. Picture i depends on (seed, i) only."""
    images = np.empty((count, 3, size, size), np.uint8)
    labels = np.empty(count, np.int64)
    for i in Progress("drawing shapes", range(count), unit="images"):
        rng = stream(seed, i)
        labels[i] = rng.integers(len(SHAPES))
        images[i] = draw_shape(SHAPES[labels[i]], rng, size)
    return Dataset(images, labels, SHAPES)


# ---- 5. Scenes with captions ---------------------------------------------------------------------


def captioned_scenes(count: int, seed: int = 0) -> Dataset:
    """`count` scenes of scenes.py. Their classes are captions; `prompts` holds these, encoded."""
    print(f"drawing {count:,} scenes")
    images, labels = draw_scenes(count, seed)
    captions = caption_list()
    weights = tuple(caption_weights(captions).tolist())
    classes = [str(caption) for caption in captions]
    return Dataset(images, labels, classes, class_weights=weights, prompts=scene_prompts())


# ---- 6. Points -----------------------------------------------------------------------------------

ARMS = 3


def points(count: int, seed: int = 0) -> Dataset:
    """`count` points on a spiral. Its arms are the classes. An image is (2, 1, 1): x and y."""
    rng = stream(seed, 0)
    labels = rng.integers(ARMS, size=count)
    distance = np.sqrt(rng.uniform(0.02, 1, size=count))  # the root spreads points along an arm
    angle = 2 * pi * labels / ARMS + 1.25 * pi * distance
    x = 0.95 * distance * np.cos(angle)
    y = 0.95 * distance * np.sin(angle)
    xy = rearrange([x, y], "two n -> n two 1 1")
    xy = xy + 0.015 * rng.standard_normal(xy.shape)
    return Dataset(
        xy.astype(np.float32),
        labels,
        classes=[f"arm {i}" for i in range(ARMS)],
    )


# ---- 7. A folder of images -----------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the images in a folder, sorted. Hidden ones are skipped, and
    those that begin with "@" or "__", which some systems add (@eaDir, __MACOSX)."""
    folders, images = [], []
    for entry in os.scandir(folder):
        name = entry.name
        if name.startswith((".", "@", "__")):
            continue
        if entry.is_dir():
            folders.append(name)
        elif name.lower().endswith(SUFFIXES) and entry.is_file():
            images.append(name)
    return sorted(folders), sorted(images)


def list_images(root: Path) -> tuple[list[str], dict[str, int]]:
    """The classes of a folder and the label of each image, {"<class>/<file>": label}, both sorted
    by name. Raises UserError where images lie elsewhere than in ROOT/<class>/, or all in ROOT,
    which is then one class: some would be left out."""
    if not root.is_dir():
        raise UserError(f"no such folder of images: {root}")
    classes, images = list_folder(root)
    if classes and images:
        raise UserError(
            f"{root} holds images ({images[0]}) beside folders ({classes[0]}): put the images "
            "into folders too, one for each class, or take the folders away"
        )
    if images:
        return [root.resolve().name], dict.fromkeys(images, 0)
    labels = {}
    for label, name in enumerate(classes):
        deeper, images = list_folder(root / name)
        if deeper:
            raise UserError(
                f"{root / name} holds folders ({deeper[0]}): images are expected in "
                f"{root}/<class>/. If these folders are the classes, choose {root / name}"
            )
        if not images:
            raise UserError(f"no images in {root / name}: add some, or take this folder away")
        for image in images:
            labels[f"{name}/{image}"] = label
    if not labels:
        raise UserError(f"no images in {root}: expected {root}/<class>/*.png (or jpg, webp, bmp)")
    return classes, labels


def is_test(path: str) -> bool:
    """Whether an image is held out for testing, as about one in ten is. It depends on its file name
    only: images that are added do not change it."""
    digest = hashlib.sha256(os.fsencode(os.path.basename(path))).digest()
    return int.from_bytes(digest[:4], "big") % 10 == 0


def to_plain(image: Image.Image, channels: int) -> Image.Image:
    """The same image with 8 bits for each of three channels, or for one (grey). 16-bit greys are
    scaled; transparent images are laid over white. Raises ValueError where the range of the pixels
    is not known."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) / 65535
        image = Image.fromarray(to_pixels(grey))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB" if channels == 3 else "L")


def read_image(path: Path, size: int, channels: int):
    """The central square of an image, turned upright and reduced to (channels, size, size), uint8.
    It becomes a colour image (3 channels) or a grey one (1). What is transparent becomes white.

    Raises UserError where the file cannot be read, and where the image is smaller than `size`:
    images are never enlarged."""
    try:
        with Image.open(path) as image:
            with suppress(struct.error):  # a damaged tag beside that of the orientation
                image = ImageOps.exif_transpose(image)
            image = to_plain(image, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"cannot read the image {path} ({reason}): repair it, or take it away"
        ) from None
    side = min(image.size)
    if side < size:
        raise UserError(
            f"{path} is smaller than {size}×{size} pixels, and images are never enlarged: choose "
            f"--image-size {side} (or less), or take this image away"
        )
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    image = image.resize(
        (size, size),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    pixels = np.asarray(image).reshape(size, size, channels)
    return rearrange(pixels, "h w c -> c h w")


def read_images(paths: list[Path], size: int, channels: int):
    """Yields read_image of each path, in order. Several are read at a time."""
    read = partial(read_image, size=size, channels=channels)
    with ThreadPoolExecutor() as pool:
        yield from pool.map(read, paths)


def survey(root: Path, names) -> tuple[str, int, bool]:
    """The name of the smallest image of a folder, its smaller side in pixels, and whether all are
    grey. (Files that cannot be read are left to `read_image`, which names them.)"""
    sides, modes = {}, set()
    for name in Progress("looking at images", list(names), unit="images"):
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            with Image.open(root / name) as image:
                sides[name] = min(image.size)
                modes.add(image.mode)
    smallest = min(sides, key=sides.get, default="")
    is_grey = modes <= {"1", "L", "LA", "I;16", "I;16B", "I;16L"}
    return smallest, sides.get(smallest, 0), is_grey


def note_unread(root: Path):
    """Say which files of a folder of images are not read, because their names are not those of
    images."""
    unread = []
    for file in root.rglob("[!.]*"):
        if file.is_file() and file.suffix.lower() not in SUFFIXES:
            unread.append(file)
    if unread:
        print(f"note: {len(unread):,} files in {root} are not read, such as {min(unread)}")


def fit_to_images(preset: Preset, flags) -> Preset:
    """The preset of a training on a folder of images. Settings that no flag gives are chosen to fit
    the images:

    image_size        the preset's, or less where an image is smaller: whole patches
    channels          1 where all images are grey, else 3
    flip              no: mirror images of letters and digits are no letters and digits
    guidance_scale    1, which is none, where there is one class only

    Other presets are returned as they are. Prints what was chosen. `flags`: of teacher.py."""
    source, size = preset.data.source, preset.data.image_size
    is_folder = source is not None and source not in DRAWN
    if not is_folder or preset.data.channels not in (1, 3) or "vae" in (read_meta(source) or {}):
        return preset
    classes, files = list_images(Path(source))
    note_unread(Path(source))
    smallest, side, is_grey = survey(Path(source), files)
    if not side:
        raise UserError(f"none of the {len(files):,} images in {source} can be read")
    if flags.image_size is None and side < size:
        patch = parse_size(preset.size)["patch"]
        size = max(side // patch, 1) * patch
    channels = flags.channels or (1 if is_grey else 3)
    data = replace(preset.data, image_size=size, channels=channels)
    ode = preset.ode
    if len(classes) == 1 and flags.guidance_scale is None:
        ode = replace(ode, guidance_scale=1.0)
        print("all images are of one class: no guidance (see --guidance-scale)")
    print(
        f"training at {size}×{size} pixels (see --image-size): the smallest image, {smallest}, has "
        f"{side}×{side}"
    )
    held_out = sum(map(is_test, files))
    if held_out < LEAST_IMAGES:
        print(
            f"note: {held_out} images are held out, and distances to real images need "
            f"{LEAST_IMAGES}: evaluate.py --test DIR takes others"
        )
    return replace(preset, data=data, ode=ode)


def choose_split(config: DataConfig, split: str, classes, labels, test):
    """The indices of those images of a folder that belong to a split, and the fraction of them in
    each class (see Dataset). labels and test: (N,), of all images. Prints what was chosen.

    Raises UserError where a class has no image to train on, and where there is none to test on."""
    chosen = {"train": ~test, "test": test, "all": np.ones_like(test)}[split]
    counts = np.bincount(labels[chosen], minlength=len(classes))
    total = counts.sum()
    if split == "train" and counts.min() == 0:
        raise UserError(
            "about one image in ten is held out for testing, and so are all images of the class "
            f"{classes[counts.argmin()]!r} in {config.source}: add others"
        )
    if total == 0:
        raise UserError(
            "about one image in ten is held out for testing, but none of the few in "
            f"{config.source}: add others"
        )
    named = [f"{name} {n:,}" for name, n in zip(classes[:5], counts, strict=False)]
    more = ", …" if len(classes) > 5 else ""
    number = "1 class" if len(classes) == 1 else f"{len(classes):,} classes"
    kind = {1: "grey images", 3: "colour images"}.get(config.channels, "latents")
    mirrored = ", mirrored at random" if config.flip else ", not mirrored"
    if split != "train" or kind == "latents":
        mirrored = ""
    rest = {"train": "held out for testing", "test": "for training", "all": "left out"}[split]
    print(
        f"{config.source}: {total:,} {kind} of {config.image_size}×{config.image_size}{mirrored} "
        f"({len(labels) - total:,} others are {rest}); {number}: {', '.join(named)}{more}"
    )
    class_weights = ()
    if counts.min() != counts.max():
        class_weights = tuple((counts / total).tolist())
    return np.flatnonzero(chosen), class_weights


def image_folder(config: DataConfig, split: str) -> Dataset:
    """The images of a folder that belong to a split. Raises UserError where they cannot be used."""
    root, size, channels = Path(config.source), config.image_size, config.channels
    if channels not in (1, 3):
        raise UserError(
            f"{root} is a folder of images, and this network reads {channels} channels. If these "
            "are the channels of latents, encode the images first: python latents.py"
        )
    classes, files = list_images(root)
    names = list(files)
    labels = np.array(list(files.values()))
    test = np.array([is_test(name) for name in files])
    indices, class_weights = choose_split(config, split, classes, labels, test)
    paths = [root / names[i] for i in indices]
    images = np.empty((len(paths), channels, size, size), np.uint8)
    progress = Progress(
        "reading images",
        read_images(paths, size, channels),
        total=len(paths),
        unit="images",
    )
    for i, image in enumerate(progress):
        images[i] = image
    return Dataset(
        images,
        labels[indices],
        classes,
        flip=config.flip and split == "train",
        class_weights=class_weights,
    )


# ---- 8. A folder of latents ----------------------------------------------------------------------


def latent_dtype(shape) -> np.dtype:
    """What latents.py stores of an image."""
    return np.dtype([("label", "<i8"), ("is_test", "?"), ("latent", "<f2", tuple(shape))])


class Latents:
    """Some of the latents in a folder, as an array (N, c, h, w) that is read when it is indexed."""

    def __init__(self, shards: Shards, indices, shape):
        self.shards = shards
        self.indices = indices
        self.shape = (len(indices), *shape)

    def __getitem__(self, index):
        return np.stack([self.shards.value("latent", i) for i in self.indices[index]])


def latent_folder(config: DataConfig, split: str, meta: dict) -> Dataset:
    """The latents of a folder that belong to a split. Raises UserError where some are missing."""
    try:
        classes, shape = meta["classes"], meta["shape"]
        shards = Shards(config.source, latent_dtype(shape), meta["shards"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config.source}/meta.json is damaged ({error!r})") from None
    labels = shards.column("label")
    test = shards.column("is_test")
    indices, class_weights = choose_split(config, split, classes, labels, test)
    return Dataset(
        Latents(shards, indices, shape),
        labels[indices],
        classes,
        class_weights=class_weights,
    )


# ---- 9. Any of them ------------------------------------------------------------------------------


def data_source(text: str) -> str:
    """For argparse: the name of a set that is drawn, or the full path of a folder, so that the same
    folder is the same source however it was spelled."""
    return text if text in DRAWN else str(Path(text).resolve())


def load(
    config: DataConfig,
    split: str = "train",
    count: int | None = None,
) -> Dataset:
    """The data set that `config` describes.

    split    "train" or "test", which share no image; of a folder, also "all"
    count    how many images to draw; a folder has as many as it has

    Raises UserError where there is no such data set, where it cannot be used, and where its images
    have another size or other channels than `config` says."""
    source, size = config.source, config.image_size
    if source is None:
        raise UserError("this preset needs images: --data DIR, a folder with DIR/<class>/*.png")
    meta = read_meta(source) or {}
    is_latent = "vae" in meta
    if config.flip and (source in DRAWN or is_latent):
        raise UserError(f"{source} cannot be mirrored, as folders of images can be: use --no-flip")
    count = count or (5_000 if split == "test" else 50_000)
    seed = 0 if split == "train" else 1
    if source == "textures":
        dataset = textures(count, size, seed)
    elif source == "shapes":
        dataset = shapes(count, size, seed)
    elif source == "points":
        dataset = points(count, seed)
    elif source == "scenes":
        dataset = captioned_scenes(count, seed)
    elif is_latent:
        dataset = latent_folder(config, split, meta)
    else:
        dataset = image_folder(config, split)
    expected = (config.channels, size, size)
    if dataset.shape != expected:
        raise UserError(
            f"{source} has images of (channels, height, width) = {dataset.shape}, and {expected} "
            "is expected: choose another --preset, --channels or --image-size"
        )
    return dataset


# ---- 10. Pictures and files ----------------------------------------------------------------------


def to_uint8(images):
    """Images (…, c, h, w) in [-1, 1] to pixels (…, h, w, c), uint8. Values beyond are clipped."""
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    pixels = rearrange(pixels.round().to(torch.uint8), "... c h w -> ... h w c")
    return pixels.cpu().numpy()


def image_grid(images, columns: int, side: int = 64, gap: int = 4) -> Image.Image:
    """One picture of many, (n, c, h, w), row by row on white. Each is enlarged to about `side`
    pixels without smoothing. Of latents, the first three channels are shown."""
    zoom = max(1, round(side / images.shape[-1]))
    images = images[:, :3].float().cpu().expand(-1, 3, -1, -1)  # grey: three times the same
    tiles = repeat(images, "n c h w -> n c (h y) (w x)", y=zoom, x=zoom)
    tiles = F.pad(tiles, (gap, 0, gap, 0), value=1)  # at the left and above
    missing = -len(tiles) % columns
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, missing), value=1)
    sheet = rearrange(tiles, "(row column) c h w -> c (row h) (column w)", column=columns)
    sheet = F.pad(sheet, (0, gap, 0, gap), value=1)
    return Image.fromarray(to_uint8(sheet))


def save_picture(picture: Image.Image, file: Path):
    """Write a PNG file, whole or not at all."""
    replace_file(file, lambda opened: picture.save(opened, "PNG"))


def draw_images(rows: dict[str, torch.Tensor], file: Path, title: str = ""):
    """A figure with rows of images, {label: (n, c, h, w)}, all of the same n."""
    images = list(rows.values())
    count = len(images[0])
    sheet = image_grid(torch.cat(images), columns=count)
    figure, [axis] = new_figure(3.2 + 0.7 * count, 0.5 + 0.7 * len(rows))
    axis.imshow(sheet)
    height = sheet.height / len(rows)
    middles = [height * (i + 0.5) for i in range(len(rows))]
    axis.set_yticks(middles, [plain(label) for label in rows])
    axis.tick_params(length=0)
    axis.set(xticks=[], title=title)
    axis.spines[:].set_visible(False)
    save_figure(figure, file)


def write_npz(file: Path, count: int, batches):
    """Write `count` images, which come in batches (b, h, w, c), uint8, as the array arr_0 of an
    .npz file, the format of ADM's evaluator. No more than a batch is held in memory."""
    def write(opened):
        with zipfile.ZipFile(opened, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                for i, batch in enumerate(batches):
                    if i == 0:
                        shape = (count, *batch.shape[1:])
                        header = dict(descr="|u1", fortran_order=False, shape=shape)
                        np.lib.format.write_array_header_1_0(array, header)
                    array.write(batch.tobytes())

    replace_file(file, write)


def file_name(text: str) -> str:
    """A text, such as the name of a class, made safe as a part of a file name."""
    return re.sub(r"[^\w-]+", "-", text).strip("-")[:50] or "unnamed"
