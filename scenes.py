"""Scenes: small pictures with captions, for text-to-image in miniature.

A scene shows one to three objects of 6 colours × 5 shapes on a dark ground, and its caption names
them:

    one         a red star
    two         a red star and a blue ring          (two different objects)
    relation    a red star left of a blue ring      a red star above a blue ring
    count       two green discs                     three green discs

What makes them useful is that they can be *read back without a learned network*: objects are
separate, their colours are those of a palette, and their shapes are the renderer's own. So one can
score exactly how well a generated image follows its caption (`read_scene`, `score`), in the
categories of T2I-CompBench (arXiv 2307.06350): attribute binding, spatial relation, number.

Objects stand in the cells of a 3×3 grid, a little off their centres. A cell is one patch of the
network, so that each token shows one object, or none. A small network learns that within an hour on
a CPU. Where objects may stand anywhere, learning takes many times as long.

A fifth of the colour–shape pairs never occur in training captions (`HELD_OUT`): do networks that
have seen red stars and cyan rings draw a cyan star?
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 21  # pixels a side
CELL = 7  # of the grid in which objects stand
GROUND = (18, 18, 24)
COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 70),
    "blue": (70, 100, 255),
    "yellow": (245, 215, 60),
    "cyan": (60, 215, 225),
    "magenta": (220, 70, 215),
}
SHAPES = ("disc", "ring", "square", "triangle", "star")
NUMBERS = {2: "two", 3: "three"}
CATEGORIES = ("one", "two", "relation", "count")
HELD_OUT = tuple(zip(COLOURS, SHAPES + SHAPES[:1], strict=True))  # red disc, green ring, …
RADII = (2.4, 2.8)  # least and largest radius of an object, pixels
JITTER = 0.15  # how far its centre may be from the cell's in x and in y, pixels
WAIST = 0.38  # of a star: see outline


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene; x and y: its centre, in pixels from the upper left corner."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


# ---- 1. Drawing ----------------------------------------------------------------------------------


def polygon(radii: list[float], start: float):
    """Corners at these distances from the centre, at equal angles, as complex numbers."""
    angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
    return radii * np.exp(1j * angles)


def outline(name: str, waist: float):
    """The corners of a shape that is a polygon, as x + i·y. They lie in the unit circle, or nearly
    so. waist: how far the inner corners of a star are from its centre. (Some of these shapes are in
    no scene, but in the data set `shapes` of data.py.)"""
    if name == "heart":  # a well-known curve
        u = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        x = 16 * np.sin(u) ** 3
        y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
        return (x - 1j * y) / 17
    arm = np.array([-0.3 - 1j, 0.3 - 1j, 0.3 - 0.3j])
    return {
        "square": polygon([1] * 4, start=-math.pi / 4),
        "triangle": polygon([1] * 3, start=-math.pi / 2),
        "cross": np.concatenate([arm, arm * 1j, -arm, arm * -1j]),
        "star": polygon([1, waist] * 5, start=-math.pi / 2),
        "bar": np.array([-1 - 0.3j, 1 - 0.3j, 1 + 0.3j, -1 + 0.3j]),
        "bow": np.array([-1 - 0.75j, 1 + 0.75j, 1 - 0.75j, -1 + 0.75j]),
    }[name]


def draw_cover(
    name: str,
    centre: complex,
    radius: float,
    size: int,
    turn: complex = 1,
    waist: float = 0.4,
) -> np.ndarray:
    """The fraction of each pixel that a shape covers, (size, size): drawn large and averaged down.
    centre, x + i·y, and radius: in pixels; turn: a complex number of length 1."""
    scale = 8 if size <= 32 else 4  # how many times larger it is drawn
    centre, radius = scale * centre, scale * radius
    canvas = Image.new("L", (scale * size, scale * size))
    pen = ImageDraw.Draw(canvas)

    def disc(at: float, r: float, fill: int):
        z = centre + radius * turn * at
        r = radius * r
        pen.ellipse([z.real - r, z.imag - r, z.real + r, z.imag + r], fill=fill)

    if name in ("disc", "ring", "crescent"):
        disc(0, 1, fill=255)
        if name == "ring":
            disc(0, 0.55, fill=0)
        if name == "crescent":
            disc(0.55, 0.8, fill=0)
    else:
        corners = centre + radius * turn * outline(name, waist)
        pen.polygon([(z.real, z.imag) for z in corners], fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def draw_scene(objects: list[SceneObject]) -> np.ndarray:
    """A picture, (3, SIZE, SIZE), uint8."""
    picture = np.zeros((3, SIZE, SIZE)) + np.array(GROUND)[:, None, None]
    for one in objects:
        centre = complex(one.x, one.y)
        cover = draw_cover(one.shape, centre, one.radius, SIZE, waist=WAIST)
        ink = np.array(COLOURS[one.colour])[:, None, None]
        picture += cover * (ink - picture)
    return np.round(picture).astype(np.uint8)


# ---- 2. Captions and their scenes ----------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """What a caption says: its objects as (colour, shape), and how they relate."""

    category: str  # one of CATEGORIES
    objects: tuple[tuple[str, str], ...]
    relation: str = ""  # "left of" or "above"

    def __str__(self):
        colour, shape = self.objects[0]
        if self.category == "count":
            return f"{NUMBERS[len(self.objects)]} {colour} {shape}s"
        named = [f"a {colour} {shape}" for colour, shape in self.objects]
        joint = {"two": " and ", "relation": f" {self.relation} "}.get(self.category, "")
        return joint.join(named)

    @property
    def is_held_out(self) -> bool:
        return any(pair in HELD_OUT for pair in self.objects)


@cache
def indexed_captions() -> list[Caption]:
    """All captions, in the order in which networks know them by their indices: those of training,
    then those that name a held-out pair."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    captions = [Caption("one", (pair,)) for pair in pairs]
    for number in NUMBERS:
        captions += [Caption("count", (pair,) * number) for pair in pairs]
    for first in pairs:
        for second in pairs:
            if first != second:
                captions.append(Caption("two", (first, second)))
                captions.append(Caption("relation", (first, second), "left of"))
                captions.append(Caption("relation", (first, second), "above"))
    return sorted(captions, key=lambda caption: caption.is_held_out)


def caption_list(held_out: bool = False) -> list[Caption]:
    """The captions of training, or those that name a held-out pair."""
    return [caption for caption in indexed_captions() if caption.is_held_out == held_out]


def caption_weights(captions: list[Caption]) -> np.ndarray:
    """How often each caption is drawn, so that the categories are equally frequent."""
    categories = [caption.category for caption in captions]
    weights = np.array([1 / categories.count(category) for category in categories])
    return weights / weights.sum()


def place(caption: Caption, rng: np.random.Generator) -> list[SceneObject]:
    """Random cells and sizes for the objects of a caption, so that its relation holds."""
    side = SIZE // CELL
    while True:
        objects = []
        cells = rng.choice(side**2, size=len(caption.objects), replace=False)
        for (colour, shape), cell in zip(caption.objects, cells, strict=True):
            corner = CELL * np.array([cell % side, cell // side])
            x, y = corner + CELL / 2 + rng.uniform(-JITTER, JITTER, size=2)
            radius = float(rng.uniform(*RADII))
            objects.append(SceneObject(colour, shape, float(x), float(y), radius))
        if not caption.relation or fulfils(caption.relation, *objects, margin=1.0):
            return objects


def fulfils(relation: str, a: SceneObject, b: SceneObject, margin: float = 0.0) -> bool:
    """Whether a is left of, or above, b: their distance in that direction exceeds the distance
    across it by more than a margin, in pixels."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if relation == "left of" else (dy, dx)
    return along > abs(across) + margin


def draw_scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` scenes of training captions: images (count, 3, SIZE, SIZE), uint8, and the indices of
    their captions in `caption_list()`. Scene i depends on (seed, i) only."""
    captions = caption_list()
    weights = caption_weights(captions)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        labels[i] = rng.choice(len(captions), p=weights)
        images[i] = draw_scene(place(captions[labels[i]], rng))
    return images, labels


# ---- 3. Reading a scene back ---------------------------------------------------------------------

WINDOW = 12  # pixels a side of the window in which a shape is recognised


@cache
def templates() -> tuple[np.ndarray, list[tuple[str, float, float, float]]]:
    """Covers of every shape at many sizes and sub-pixel places, (m, WINDOW²), and what they are:
    (shape, x, y, radius), in the window."""
    covers, names = [], []
    for shape in SHAPES:
        for radius in np.arange(2.0, 3.6, 0.2):
            for dx in np.arange(-1.25, 1.5, 0.25):
                for dy in np.arange(-1.25, 1.5, 0.25):
                    x, y = WINDOW / 2 + dx, WINDOW / 2 + dy
                    cover = draw_cover(shape, complex(x, y), radius, WINDOW, waist=WAIST)
                    covers.append(cover.ravel())
                    names.append((shape, x, y, radius))
    return np.stack(covers), names


def connected_components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected regions of a boolean image, each as a boolean image."""
    left = mask.copy()
    regions = []
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(left.argmax(), left.shape)] = True
        grown = dilate(region) & left
        while grown.sum() > region.sum():
            region = grown
            grown = dilate(region) & left
        regions.append(region)
        left &= ~region
    return regions


def dilate(mask: np.ndarray) -> np.ndarray:
    """Every pixel that is set, or that touches one that is."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def read_scene(image: np.ndarray) -> list[SceneObject]:
    """The objects in a picture (3, SIZE, SIZE), uint8. They are looked for in the regions that are
    brighter than the ground. Their colour is the nearest of the palette, and their shape is the
    template with the largest overlap (intersection over union of covers). A region that resembles
    no shape is not an object, and counts neither for nor against a caption."""
    brightness = image.max(axis=0).astype(np.float32)
    objects = []
    for region in connected_components(brightness > 120):
        if region.sum() >= 4:  # pixels; less is noise
            objects.append(read_object(image, dilate(region)))
    return [one for one in objects if one is not None]


def read_object(image: np.ndarray, region: np.ndarray) -> SceneObject | None:
    """The object in a region of a picture, None where it resembles no shape."""
    colour = nearest_colour(image[:, region])
    ground, ink = np.array(GROUND, np.float32), np.array(COLOURS[colour], np.float32)
    direction = (ink - ground) / np.square(ink - ground).sum()
    # How far each pixel is on the way from ground (0) to ink (1), and a window around the region.
    cover = np.einsum("c, c h w -> h w", direction, image - ground[:, None, None])
    cover = cover.clip(0, 1) * region
    ys, xs = np.nonzero(region)
    top = (ys.min() + ys.max() + 1) // 2 - WINDOW // 2
    left = (xs.min() + xs.max() + 1) // 2 - WINDOW // 2
    padded = np.pad(cover, WINDOW)
    window = padded[top + WINDOW : top + 2 * WINDOW, left + WINDOW : left + 2 * WINDOW].ravel()
    covers, names = templates()
    overlap = np.minimum(covers, window).sum(1) / np.maximum(covers, window).sum(1)
    best = overlap.argmax()
    if overlap[best] < 0.7:
        return None
    shape, x, y, radius = names[best]
    return SceneObject(colour, shape, left + x, top + y, float(radius))


def nearest_colour(pixels: np.ndarray) -> str:
    """The palette's colour of pixels (3, m) that are partly ground: the one whose direction from
    the ground is closest in angle to that of their mean."""
    ground = np.array(GROUND, np.float32)
    mean = pixels.mean(axis=1) - ground
    cosines = {}
    for name, ink in COLOURS.items():
        direction = np.array(ink, np.float32) - ground
        cosines[name] = direction @ mean / np.linalg.norm(direction)
    return max(cosines, key=cosines.get)


# ---- 4. Scoring ----------------------------------------------------------------------------------


def score(caption: Caption, objects: list[SceneObject]) -> dict[str, float]:
    """How well the objects of an image fulfil a caption. These scores are 0 or 1:

    binding     every object that the caption names is there, with its colour and its shape
    count       there are as many objects as it names
    relation    the named objects are there and stand as it says (captions with a relation only)
    all         1 where all of these are 1
    """
    found = [(one.colour, one.shape) for one in objects]
    binding = all(found.count(pair) >= caption.objects.count(pair) for pair in caption.objects)
    scores = dict(binding=float(binding), count=float(len(objects) == len(caption.objects)))
    if caption.relation:
        scores["relation"] = float(relation_holds(caption, objects))
    return scores | dict(all=min(scores.values()))


def adherence(scenes: list[list[SceneObject]], captions: list[Caption]) -> dict[str, float]:
    """The mean scores of scenes, each read by `read_scene` from an image that was made for its
    caption: the fraction that is wholly right, for each category and overall; then the means of
    binding, relation and count."""
    scores = [score(c, objects) for c, objects in zip(captions, scenes, strict=True)]
    means = {}
    for category in CATEGORIES:
        chosen = [s["all"] for s, c in zip(scores, captions, strict=True) if c.category == category]
        if chosen:
            means[category] = float(np.mean(chosen))
    for key in ("all", "binding", "relation", "count"):
        chosen = [s[key] for s in scores if key in s]
        if chosen:
            means["all right" if key == "all" else key + " right"] = float(np.mean(chosen))
    return means


def relation_holds(caption: Caption, objects: list[SceneObject]) -> bool:
    """Whether some pair of the named objects stands as the caption says."""
    first, second = (
        [one for one in objects if (one.colour, one.shape) == pair] for pair in caption.objects
    )
    return any(fulfils(caption.relation, a, b) for a in first for b in second)
