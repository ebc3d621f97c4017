"""Latents: images, encoded once by an autoencoder.

At 256 pixels and more, diffusion works on the latents of an autoencoder, which have an eighth of
the pixels a side, and 4 channels (arXiv 2112.10752). Encoding takes long, so it is done once, into
shards on disk (shards.py). A latent is a sample of the autoencoder's posterior, times 0.18215.

    pip install -r requirements-imagenet.txt                     for `diffusers`
    python latents.py --images IMAGENET/train --out latents      IMAGENET/train/<class>/*.jpg
    python latents.py … --worker 2/8                             the second of eight parts of this
    python teacher.py --preset imagenet256 --data latents

The files that a folder of latents is made of are listed once, in its files.json, and shard k holds
the k-th 256 of them. What was stopped is continued by the same command. An image that cannot be
read is reported at the end, and its shard is left out until that image is repaired, or removed.
"""

import startup  # noqa: F401  before the large packages

from math import ceil
from pathlib import Path

import numpy as np
import torch

from command_line import add_worker_flag, make_parser, positive_int, run_program
from data import is_test, latent_dtype, list_images, note_unread, read_images, stream
from files import UserError, check_finite, fingerprint, one_line, optional_import, save_json
from machine import Progress, Runtime, add_machine_flags, runtime_from, wait_for_all
from shards import SHARD, read_json, start_shards, write_shard

VAE = "stabilityai/sd-vae-ft-ema"  # the autoencoder of the public DiT
SCALE = 0.18215  # makes its latents about unit-size
CHANNELS = 4

# ---- 1. The autoencoder --------------------------------------------------------------------------


def load_vae(name: str, device):
    """An autoencoder of `diffusers`: a folder, or a name on the Hugging Face hub. Raises UserError
    where it is missing, not whole, or something else, or has other than 4 channels."""
    kind = optional_import("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL
    try:
        vae, found = kind.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # of several types, for a damaged folder or a wrong one
        raise UserError(
            f"no autoencoder {name!r} ({one_line(error)}): name a folder with --vae"
        ) from None
    if found["missing_keys"]:
        raise UserError(
            f"the autoencoder {name!r} is not whole: it has no {min(found['missing_keys'])}"
        )
    if vae.config.latent_channels != CHANNELS:
        raise UserError(
            f"the latents of {name!r} have {vae.config.latent_channels} channels, and DiT's have "
            f"{CHANNELS}: choose another --vae"
        )
    check_finite(vae.state_dict(), name)
    return vae.float().to(device).eval().requires_grad_(False)


@torch.no_grad()
def decode(vae, latents):
    """Images (b, 3, h, w) in [-1, 1] of latents (b, 4, h/8, w/8)."""
    return vae.decode(latents / SCALE).sample.clamp(-1, 1)


@torch.no_grad()
def encode(vae, images, noise, runtime: Runtime):
    """Latents (b, 4, h/8, w/8) of images (b, 3, h, w) in [-1, 1]: samples of the posterior, made
    with normal noise (b, 4, h/8, w/8). A few images at a time: encoding takes memory."""
    latents = []
    for some, eps in zip(images.split(32), noise.split(32), strict=True):
        with runtime.autocast():
            posterior = vae.encode(some.to(runtime.device)).latent_dist
        sample = posterior.mean.float().cpu() + posterior.std.float().cpu() * eps
        latents.append(SCALE * sample)
    return torch.cat(latents)


# ---- 2. Encoding a folder ------------------------------------------------------------------------


def list_once(root: Path, out: Path) -> tuple[list[str], dict[str, int]]:
    """The classes of a folder of images, and its images {path: label} in the order in which they
    are encoded: as they were when `out` was begun, whatever was added or removed since."""
    classes, files = list_images(root)
    listed = read_json(out / "files.json")
    if listed is None:
        return classes, files
    added = len(files.keys() - listed.keys())
    removed = len(listed.keys() - files.keys())
    if added or removed:
        print(
            f"images of {root} were removed ({removed:,}) or added ({added:,}) since {out} was "
            "begun. Added ones are left out: choose another --out to encode them too"
        )
    return classes, listed


def make_meta(vae, root: Path, image_size: int, flip: bool, classes: list[str], count: int) -> dict:
    """What meta.json says of the latents of `count` images. Raises UserError where images of this
    size cannot be halved as often as the autoencoder does it."""
    halvings = len(vae.config.block_out_channels) - 1
    factor = 2**halvings
    if image_size % factor:
        raise UserError(
            f"this autoencoder halves images {halvings} times, which {image_size} pixels do not "
            f"allow: choose an --image-size that is a multiple of {factor}"
        )
    return dict(
        images=str(root.resolve()),
        vae=fingerprint(vae.state_dict()),
        image_size=image_size,
        flip=flip,
        classes=classes,
        shape=(CHANNELS, image_size // factor, image_size // factor),
        shards=ceil(count / SHARD),
    )


def encode_shard(
    vae,
    root: Path,
    listed: dict[str, int],
    number: int,
    meta: dict,
    runtime: Runtime,
) -> dict:
    """The columns of a shard, made of those of its images {path: label} that are still there.
    Raises UserError where one of them cannot be read, and where none is there."""
    names = [name for name in listed if (root / name).exists()]
    if not names:
        raise UserError(
            f"{root / min(listed)} and the others of its shard are missing: put some of them back"
        )
    pixels = list(read_images([root / name for name in names], meta["image_size"], channels=3))
    images = torch.from_numpy(np.stack(pixels)) / 127.5 - 1                 # (n, 3, h, w)
    if meta["flip"]:
        names = names + names
        images = torch.cat([images, images.flip(-1)])
    shape = (len(images), *meta["shape"])
    noise = stream(0, number).standard_normal(shape, dtype=np.float32)
    return dict(
        label=[listed[name] for name in names],
        is_test=[is_test(name) for name in names],
        latent=encode(vae, images, torch.from_numpy(noise), runtime),
    )


def write_latents(
    root: Path,
    out: Path,
    vae,
    image_size: int,
    flip: bool,
    runtime: Runtime,
    worker: tuple[int, int] = (0, 1),
):
    """Encode the images of ROOT/<class>/ and, with `flip`, their mirror images, into shards in
    `out`. Shards that are there are kept. `worker`: see start_shards.

    Raises UserError where `out` holds something else and, in the end, where images could not be
    read: then the shards that they belong to are missing."""
    classes, files = list_once(root, out)
    note_unread(root)
    meta = make_meta(vae, root, image_size, flip, classes, len(files))
    dtype, shards = latent_dtype(meta["shape"]), meta["shards"]
    missing = start_shards(out, meta, dtype, shards, worker)
    if not (out / "files.json").exists():
        save_json(out / "files.json", files)
    items, problems = list(files.items()), []
    for number in Progress("shards of latents", missing, unit="images", size=SHARD):
        listed = dict(items[number * SHARD : (number + 1) * SHARD])
        try:
            columns = encode_shard(vae, root, listed, number, meta, runtime)
        except UserError as error:
            problems.append(str(error))
            continue
        write_shard(out, number, dtype, **columns)
    if problems:
        raise UserError(
            f"{len(problems):,} of {shards:,} shards are not written: {problems[0]}, then start "
            "again"
        )
    wait_for_all()


# ---- 3. The program ------------------------------------------------------------------------------


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="DIR/<class>/*.png (or jpg, …)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the latents")
    add("--image-size", type=positive_int, default=256, help="pixels a side (default: 256)")
    add("--vae", default=VAE, help=f"the autoencoder, a folder or a name (default: {VAE})")
    add("--flip", action="store_true", help="also encode the mirror image of each image")
    add_worker_flag(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    runtime = runtime_from(flags)
    vae = load_vae(flags.vae, runtime.device)
    write_latents(
        flags.images, flags.out, vae, flags.image_size, flags.flip, runtime, flags.worker
    )
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    run_program(main)
