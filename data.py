"""What is learned from: images, for the teacher, and trajectories on disk, for the student.

Every data set is a `Dataset`: images in [-1, 1], (c, h, w), or latents, with integer labels.

    shapes    ten kinds of shapes, drawn with Pillow: as many as you want, nothing to download. The default
    points    spirals in the plane, as 1×1 images of two channels, so that a whole trajectory can be drawn on paper
    folder    your own images: ROOT/<class>/*.png|jpg|jpeg|webp, cropped and resized to the model's size
    latents   the same, encoded once by an autoencoder: what diffusion at 256 pixels and more works on

`load(...)` picks one by name.

    python data.py --data shapes                                   a look at a data set: writes runs/data.png
    python data.py latents --images IMAGENET/train --out DIR       encode a folder, with the autoencoder of `diffusers`
"""

import argparse
import colorsys
import io
import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps

from training import (Fault, Progress, autocast, command, difference, machine_flags, make_folder, optional, part_flag,
                      pick_device, positive, rank, replace_file, save_json, wait_for_all, world, writable)

SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "heart", "bar", "bow")
IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


class Dataset:
    """Images in memory: uint8 (N, c, h, w) for pictures, float32 for anything else; labels (N,); `classes`, their
    names."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], flip: bool = False):
        self.images, self.labels, self.classes, self.flip = images, labels, list(classes), flip
        self.shape = None if images is None else tuple(images.shape[1:])

    def __len__(self):
        return len(self.images)

    def batch(self, index) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (b, c, h, w), float32 in [-1, 1], and labels (b,) of the given indices."""
        images = torch.from_numpy(np.asarray(self.images[index]))
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        return images, torch.from_numpy(np.asarray(self.labels[index])).long()

    def some(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` of them at random, always the same and none twice: a data set may be sorted by class."""
        return self.batch(stream(0, 0).permutation(len(self))[:count])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch, with random horizontal flips where the data set has them on: a function of `rng` alone."""
        images, labels = self.batch(rng.integers(len(self), size=count))
        if self.flip:
            turned = torch.from_numpy(rng.random(count) < 0.5)
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        return images, labels


def stream(seed: int, index: int) -> np.random.Generator:
    """Random numbers that depend on (seed, index) and nothing else: not on batch size, device or what was drawn
    before."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def image_shape(about: dict) -> list[int]:
    """[c, h, w] of the images of a network, from its checkpoint's `about`."""
    return [about["model"]["channels"], about["model"]["image_size"], about["model"]["image_size"]]


def noise_and_labels(about: dict, seed: int, indices) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise x_T (b, c, h, w) and labels (b,) of the samples with these indices. Sample i depends on (seed, i) only. The
    noise is rounded to float16, as it is on disk, *before* it is used: noise and image then belong together."""
    streams = [stream(seed, i) for i in indices]
    noise = np.stack([rng.standard_normal(image_shape(about), dtype=np.float32) for rng in streams])
    labels = [int(rng.integers(about["model"]["classes"])) for rng in streams]
    return torch.from_numpy(noise).half().float(), torch.tensor(labels)


def must_match(about: dict, dataset: Dataset):
    """Raises Fault where a data set has other classes than the network that `about` describes, or another size."""
    known = about["classes"] != [str(i) for i in range(len(about["classes"]))]  # a public teacher's are but numbers
    same = (len(dataset.classes), list(dataset.shape)) == (len(about["classes"]), image_shape(about))
    if not same or known and dataset.classes != about["classes"]:
        raise Fault("these images are of other classes, or another size, than the network's: check --preset and --data")


# ---- shapes ---------------------------------------------------------------------------------------------------------

def outline(name: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit circle, or about so (the bow's lie at 1.25: at the border it may be cut)."""
    def polygon(radii, start=-math.pi / 2):
        return [(r * math.cos(start + 2 * math.pi * i / len(radii)), r * math.sin(start + 2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)]

    if name == "heart":  # x = 16 sin³u, y = 13 cos u − 5 cos 2u − 2 cos 3u − cos 4u, the classic curve
        u = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        x, y = 16 * np.sin(u) ** 3, 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
        return list(zip(x / 17, -y / 17, strict=True))
    a = 0.3
    return {
        "square": polygon([1] * 4, start=-math.pi / 4),
        "triangle": polygon([1] * 3),
        "cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                  (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
        "star": polygon([1, 0.4] * 5),
        "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
        "bow": [(-1, -0.75), (1, 0.75), (1, -0.75), (-1, 0.75)],
    }[name]


def draw_shape(label: int, rng: np.random.Generator, size: int) -> np.ndarray:
    """One picture, (3, size, size) uint8: a bright shape on a darker ground, both of random colour, at a random
    place, size and turn. Drawn four to eight times too large and averaged down, which is anti-aliasing."""
    scale = 8 if size <= 32 else 4
    radius = rng.uniform(0.30, 0.42) * size * scale
    cx, cy = rng.uniform(radius, size * scale - radius, size=2)
    turn = rng.uniform(-math.pi / 6, math.pi / 6)
    canvas = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(canvas)

    def disc(x, y, r, fill):
        x, y, r = cx + radius * x, cy + radius * y, radius * r
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    name = SHAPES[label]
    if name in ("disc", "ring", "crescent"):
        disc(0, 0, 1, 255)
        if name == "ring":
            disc(0, 0, 0.55, 0)
        if name == "crescent":
            disc(0.55 * math.cos(turn), 0.55 * math.sin(turn), 0.8, 0)
    else:
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        pen.polygon([(cx + cos * x - sin * y, cy + sin * x + cos * y) for x, y in outline(name)], fill=255)
    cover = np.asarray(canvas.reduce(scale), dtype=np.float32) / 255  # (size, size), 1 inside the shape
    ink, ground = colour(rng, (0.4, 1.0), (0.75, 1.0)), colour(rng, (0.2, 1.0), (0.05, 0.35))
    picture = ground[:, None, None] + (ink - ground)[:, None, None] * cover
    return np.round(255 * picture).astype(np.uint8)


def colour(rng, saturation, value) -> np.ndarray:
    """A random hue with saturation and value in the given ranges, as RGB in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)))


def shapes(count: int, size: int = 16, seed: int = 0) -> Dataset:
    """`count` pictures of SHAPES; picture i depends on (seed, i) only."""
    images, labels = np.empty((count, 3, size, size), np.uint8), np.empty(count, np.int64)
    for i in Progress(f"drawing {count:,} shapes", range(count), unit="images"):
        rng = stream(seed, i)
        labels[i] = rng.integers(len(SHAPES))
        images[i] = draw_shape(labels[i], rng, size)
    return Dataset(images, labels, SHAPES)


# ---- points ---------------------------------------------------------------------------------------------------------

def points(count: int, seed: int = 0, arms: int = 3) -> Dataset:
    """`count` points on a spiral of `arms` arms, one class an arm; an image is (2, 1, 1): x and y."""
    rng = stream(seed, 0)
    labels = rng.integers(arms, size=count)
    u = np.sqrt(rng.uniform(0.02, 1, size=count))  # along the arm; the root spreads points evenly over its length
    angle = 2 * math.pi * labels / arms + 1.25 * math.pi * u
    xy = 0.95 * u[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.015 * rng.standard_normal((count, 2))
    return Dataset(xy.astype(np.float32)[:, :, None, None], labels, [f"arm {i}" for i in range(arms)])


# ---- a folder of images ---------------------------------------------------------------------------------------------

def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """Centre-crop to a square, resize to `size`, RGB or grey: (channels, size, size) uint8. Raises Fault if
    unreadable."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            with suppress(struct.error):  # an odd tag beside that of how the picture lies: taken as it is
                image = ImageOps.exif_transpose(image)
            image = image.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Fault(f"cannot read the image {path} ({str(error).splitlines()[0]}): repair it or remove it") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def list_images(root: str | Path) -> tuple[list[str], list[tuple[Path, int, bool]]]:
    """The classes of ROOT/<class>/, sorted by name, and their images: (file, label, whether it is kept for testing, as
    every tenth of a class is). Raises Fault when there is no such folder, no class or no image in it."""
    root = Path(root)
    if not root.is_dir():
        raise Fault(f"no such folder of images: {root}")
    classes = sorted(d.name for d in root.iterdir() if d.is_dir())
    files = {name: sorted(f for f in (root / name).iterdir() if f.suffix.lower() in IMAGES) for name in classes}
    classes = [name for name in classes if files[name]]
    if not classes:
        raise Fault(f"no images in {root}: expected {root}/<class>/*.png (or jpg, jpeg, webp)")
    return classes, [(path, label, i % 10 == 9) for label, name in enumerate(classes)
                     for i, path in enumerate(files[name])]


def read_images(paths, size: int, channels: int):
    """read_image for each path, in order, several at a time."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(partial(read_image, size=size, channels=channels), paths)


def folder(root: str | Path, size: int, channels: int = 3, flip: bool = True, split: str = "train") -> Dataset:
    """The images of ROOT/<class>/, but for those kept for testing; or, with split="test", just these. Raises Fault, see
    list_images and read_image."""
    if channels not in (1, 3):
        raise Fault(f"{root} is no folder of latents, which this network works on: python data.py latents makes them")
    classes, files = list_images(root)
    chosen = [(path, label) for path, label, test in files if test == (split == "test")]
    if not chosen:
        raise Fault(f"{root} is too small: every tenth image of a class is kept for testing, and no class has ten")
    read = read_images([path for path, _ in chosen], size, channels)
    images = np.stack(list(Progress(f"reading {len(chosen):,} images", read, len(chosen), unit="images")))
    return Dataset(images, np.array([label for _, label in chosen]), classes, flip=flip and split == "train")


def load(name: str, size: int, channels: int = 3, flip: bool = False, split: str = "train",
         count: int | None = None) -> Dataset:
    """The data set called "shapes" or "points", or else the folder `name`, of latents or of images. `split`: "train" or
    "test", disjoint. `count`: how many to make; a folder has as many as it has."""
    count = count or (50_000 if split == "train" else 5_000)
    seed = 0 if split == "train" else 1
    if name == "shapes":
        return shapes(count, size, seed)
    if name == "points":
        return points(count, seed)
    if "vae" in (read_meta(name) or {}):
        return Latents(name, split)
    return folder(name, size, channels, flip, split)


# ---- shards on disk -------------------------------------------------------------------------------------------------
# A folder of trajectories or of latents: meta.json says what they are; 00000.npy, 00001.npy, … are shards of SHARD
# records each (the last one may have fewer), memory-mapped when read. A shard is written whole or not at all, and
# depends, but for rounding, on the meta and its number (and the images) alone: several processes and machines can write
# one folder.

SHARD = 256


def record(meta: dict) -> np.dtype:
    """A trajectory: label, the states x_T, …, and the clean-image predictions x̂_0 at the marks; with meta["keep"]
    "clean" or "states" only x_T of the states, or no predictions. Or a latent."""
    shape = tuple(meta["shape"])
    if "marks" not in meta:
        return np.dtype([("label", "<i4"), ("latent", "<f2", shape)])
    states = 1 if meta["keep"] == "clean" else 1 + len(meta["marks"])
    clean = 0 if meta["keep"] == "states" else len(meta["marks"])
    return np.dtype([("label", "<i4"), ("states", "<f2", (states, *shape)), ("clean", "<f2", (clean, *shape))])


def read_meta(folder: Path) -> dict | None:
    """The meta.json of a folder of shards; None where there is none. Raises Fault if it is damaged."""
    try:
        return dict(json.loads((Path(folder) / "meta.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise Fault(f"{folder}/meta.json is damaged, or another program's: choose another folder, or remove this file "
                    "with all that was written beside it") from None


def is_whole(folder: Path, meta: dict, number: int) -> bool:
    """Whether a shard is there, and neither damaged, nor cut short, nor grown."""
    file, size = Path(folder) / f"{number:05d}.npy", min(SHARD, meta.get("count", math.inf) - number * SHARD)
    if not file.exists():
        return False
    try:
        rows = np.load(file, mmap_mode="r")
    except OSError:  # no permission: nothing that writing again would put right
        raise
    except Exception:  # a damaged header makes np.load raise all sorts of things
        return False
    return (rows.shape, rows.dtype) == ((size,), record(meta)) and file.stat().st_size == rows.offset + rows.nbytes


class Shards:
    """The undamaged shards of a folder, memory-mapped, as one array of records. At most 256 files are open at a time: a
    large folder has more than a process may open."""

    def __init__(self, folder: Path, meta: dict):
        numbers = sorted(int(file.stem) for file in Path(folder).glob("[0-9]*.npy") if file.stem.isdecimal())
        self.files = [Path(folder) / f"{i:05d}.npy" for i in numbers if is_whole(folder, meta, i)]
        self.open = lru_cache(maxsize=256)(partial(np.load, mmap_mode="r"))

    def __len__(self):
        return (len(self.files) - 1) * SHARD + len(self.open(self.files[-1])) if self.files else 0

    def __getitem__(self, index: int):
        return self.open(self.files[index // SHARD])[index % SHARD]


def start_shards(folder: Path, meta: dict, count: int, part: tuple[int, int] = (0, 1)) -> list[int]:
    """Make the folder, or check that it was made with this `meta`; return the numbers of the shards still to be written
    for `count` records, by this process. `part` (i, k): only of every k-th shard from the i-th on. Raises Fault when
    the folder holds something else."""
    folder = make_folder(folder)
    there = read_meta(folder)
    if there is None:
        if any(f.name != "meta.json" and not f.name.startswith(".") for f in folder.iterdir()):
            raise Fault(f"{folder} holds other files: choose another folder")
        save_json(folder / "meta.json", meta)
    elif there != meta:
        raise Fault(f"{folder} holds other trajectories or latents: {difference(there, meta)}. "
                    "Choose another folder, or remove that one")
    mine = range(part[0], math.ceil(count / SHARD), part[1])
    todo = [i for i in mine if not is_whole(folder, meta, i)]
    for i in todo:
        if (folder / f"{i:05d}.npy").exists():
            print(f"{folder}/{i:05d}.npy is damaged: writing it again")
    if todo:
        print(f"writing {len(todo):,} of {len(mine):,} shards of {SHARD}, into {folder}")
    wait_for_all()  # so that all see the same
    return todo[rank()::world()]


def write_shard(folder: Path, meta: dict, number: int, **columns):
    """Write a shard from the columns of its records: arrays or tensors, the first axis the record."""
    rows = np.empty(len(columns["label"]), record(meta))
    for name, values in columns.items():
        rows[name] = values.cpu() if torch.is_tensor(values) else values
    whole = io.BytesIO()
    np.save(whole, rows)  # in memory first: straight to a file, numpy does not say that the disk is full
    replace_file(Path(folder) / f"{number:05d}.npy", lambda file: file.write(whole.getbuffer()))


# ---- latents --------------------------------------------------------------------------------------------------------
# At 256 pixels and more, diffusion runs in the latent space of an autoencoder, 8 times smaller each way (2112.10752).
# Encoding is done once; `diffusers` has the network.

VAE, SCALE = "stabilityai/sd-vae-ft-ema", 0.18215  # the public DiT's; the factor makes latents about unit-size


def load_vae(name: str, device):
    """The autoencoder of a name on a hub or a folder. Raises Fault where it, or the package, is not to be had."""
    try:
        return optional("diffusers").AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise Fault(f"no autoencoder {name!r} ({str(error).splitlines()[0]}): name a folder with --vae") from None


def write_latents(root: Path, vae_name: str, out: Path, size: int, flip: bool, part, device, bf16=False):
    """Encode the images of ROOT/<class>/ into shards; with `flip`, each and its mirror image. `part`: see start_shards.
    Continues what is there."""
    classes, files = list_images(root)
    vae, copies = load_vae(vae_name, device), 1 + flip
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = [vae.config.latent_channels, size // factor, size // factor]
    meta = dict(images=str(root), vae=vae_name, size=size, flip=flip, classes=classes, shape=shape,
                sizes=np.bincount([label for _, label, _ in files]).tolist(), count=len(files) * copies)
    todo = start_shards(out, meta, meta["count"], part)
    for number in Progress("shards of latents", todo, unit="latents", weight=SHARD):
        rows = range(number * SHARD, min((number + 1) * SHARD, meta["count"]))
        chosen = [files[i // copies] for i in rows]
        images = torch.from_numpy(np.stack(list(read_images([path for path, _, _ in chosen], size, 3))))
        mirrored = torch.tensor([i % copies == 1 for i in rows])[:, None, None, None]
        images = torch.where(mirrored, images.flip(-1), images).float() / 127.5 - 1
        noise = torch.from_numpy(np.stack([stream(0, i).standard_normal(shape, dtype=np.float32) for i in rows]))
        with autocast(device, bf16):
            seen = [vae.encode(part.to(device)).latent_dist for part in images.split(32)]
        mean, std = (torch.cat([getattr(one, key).float().cpu() for one in seen]) for key in ("mean", "std"))
        write_shard(out, meta, number, label=[label for _, label, _ in chosen], latent=SCALE * (mean + std * noise))


class Latents(Dataset):
    """A folder that write_latents made, memory-mapped. Raises Fault where some of it is still missing."""

    def __init__(self, folder: str | Path, split: str = "train"):
        meta = read_meta(folder)
        self.shards, copies = Shards(folder, meta), 1 + meta.get("flip", False)
        if "vae" not in meta or len(self.shards) < meta["count"]:
            raise Fault(f"{folder} does not hold all its latents: run `python data.py latents` to its end")
        test = np.concatenate([np.arange(copies * size) // copies % 10 == 9 for size in meta["sizes"]])
        self.index = np.flatnonzero(test == (split == "test"))  # of the records that belong to this split
        labels = np.repeat(np.arange(len(meta["sizes"])), copies * np.array(meta["sizes"]))[self.index]
        super().__init__(None, labels, meta["classes"])
        self.shape = tuple(meta["shape"])

    def __len__(self):
        return len(self.index)

    def batch(self, index):
        """Latents (b, 4, h, w), about unit-size, and labels (b,)."""
        latents = np.stack([self.shards[i]["latent"] for i in self.index[index]])
        return torch.from_numpy(latents).float(), torch.from_numpy(self.labels[index])


# ---- trajectories ---------------------------------------------------------------------------------------------------

def choose_marks(kept: int, S: int) -> np.ndarray:
    """Which of the `kept` marks, counted from 1, a student of S steps uses: every (kept / S)-th. Raises Fault if S
    does not divide them."""
    if kept % S:
        possible = ", ".join(str(s) for s in range(1, kept + 1) if kept % s == 0)
        raise Fault(f"the trajectories keep {kept} states, which do not make {S} steps: choose --steps from {possible}")
    return np.arange(kept // S, kept + 1, kept // S)


class Trajectories:
    """A folder of trajectories, read for a student of S steps. `kind` "states": x_T, then the states x_τ themselves;
    "clean": x_T, then the clean-image predictions x̂_0. `times` (S + 1,) are the path times of x_T and of the S
    marks; `count` limits how many are used. Raises Fault for a folder that is missing, empty, of another teacher, or
    without the marks of S steps."""

    def __init__(self, folder: Path, teacher: str, S: int, kind: str = "states", count: int | None = None):
        meta = read_meta(folder)
        if meta is None:
            raise Fault(f"no trajectories in {folder}: write them with `python teacher.py trajectories`")
        if meta.get("teacher") != teacher:
            raise Fault(f"{folder} holds trajectories of another teacher ({meta.get('teacher')}, not {teacher}): "
                        "choose another --trajectories folder, or remove that one")
        if meta["keep"] not in ("both", kind):
            raise Fault(f"{folder} keeps the {meta['keep']} alone: use --trajectory {meta['keep']}, or write others")
        self.meta, self.kind = meta, kind
        self.marks = choose_marks(len(meta["marks"]), S)
        self.times = [meta["times"][i] for i in (0, *self.marks)]
        self.shards = Shards(folder, meta)
        if len(self.shards) < (count or 1):
            raise Fault(f"{folder} holds {len(self.shards):,} whole trajectories of {count or 1:,}: write the others")
        self.count = count or len(self.shards)

    def __len__(self):
        return self.count

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences (b, S + 1, c, h, w), x_T first and the endpoint last, and labels (b,)."""
        rows = [self.shards[i] for i in indices]
        if self.kind == "states":
            x = np.stack([row["states"][[0, *self.marks]] for row in rows])
        else:
            x = np.stack([np.concatenate([row["states"][:1], row["clean"][self.marks - 1]]) for row in rows])
        return torch.from_numpy(x.astype(np.float32)), torch.tensor([int(row["label"]) for row in rows])


# ---- pictures -------------------------------------------------------------------------------------------------------

def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (…, c, h, w) in [-1, 1] -> uint8 (…, h, w, c), clipped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").cpu().numpy()


def grid(images: torch.Tensor, columns: int, side: int = 64, gap: int = 4) -> Image.Image:
    """One picture of many, row by row, each enlarged to about `side` pixels without smoothing. Of latents, the first
    three channels are shown."""
    zoom = max(1, round(side / images.shape[-1]))
    tiles = [Image.fromarray(tile.squeeze()) for tile in to_uint8(images[:, :3])]
    tiles = [tile.resize((tile.width * zoom, tile.height * zoom), Image.Resampling.NEAREST) for tile in tiles]
    cell = tiles[0].width + gap
    sheet = Image.new("RGB", (columns * cell + gap, math.ceil(len(tiles) / columns) * cell + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * cell, gap + i // columns * cell))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("job", nargs="?", choices=("look", "latents"), default="look", help="what to do (default: look)")
    add("--data", "--images", default="shapes", help="shapes, or a folder ROOT/<class>/*.png (default: shapes)")
    add("--image-size", type=positive, help="pixels of an image's side (default: 16; latents: 256)")
    add("--out", type=Path, help="the picture to write (default: runs/data.png), or the folder for latents")
    add("--vae", default=VAE, help=f"latents: the autoencoder, a folder or a hub's name (default: {VAE})")
    add("--flip", action="store_true", help="latents: also of each image's mirror image")
    part_flag(add)
    machine_flags(add)
    args = parser.parse_args()
    if args.job == "latents":
        if args.data == "shapes" or args.out is None:
            raise Fault("latents need a folder of images and one for the result: --images ROOT --out DIR")
        write_latents(args.data, args.vae, args.out, args.image_size or 256, args.flip, args.part,
                      pick_device(args.device), args.bf16)
        return
    if args.data == "points":
        raise Fault("points are not pictures: `python distill.py --preset points` draws them in the plane")
    images, labels = load(args.data, args.image_size or 16, count=100).some(100)
    out = writable((args.out or Path("runs/data.png")).with_suffix(".png"))
    grid(images[labels.argsort()], columns=10).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    command(main)
