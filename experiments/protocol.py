"""The protocol of ImageNet's tables: FID, sFID, Inception Score, precision and recall.

It is that of ADM's evaluator (Dhariwal & Nichol, arXiv 2105.05233), which nearly all papers use,
with 50,000 images. Images in 8 bits go through the Inception network of 2015, which the package
torch-fidelity provides.

    pip install --no-deps torch-fidelity         without torchvision, which is not needed here

    FID         Fréchet distance in the 2,048 features after the last pooling
    sFID        Fréchet distance in 2,023 spatial features, of 17×17 pixels in seven channels
    Inception   Inception Score: high where each image is clearly of one class, and all classes
                occur (arXiv 1606.03498)
    precision   the fraction of images that lie among the reference's 10,000; recall: the reverse

    python sample.py runs/imagenet256/student.pt --count 50000 --npz
    python experiments/protocol.py --samples runs/samples/samples.npz \\
        --reference VIRTUAL_imagenet256_labeled.npz

The table goes to the screen and into runs/protocol.json.
"""

import importlib.util
import math
import pickle
import sys
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from command_line import make_parser, run_program
from data import SUFFIXES, read_images
from evaluate import table
from files import UserError, one_line, optional_import, output_file, save_json
from machine import Progress, pick_device
from metrics import coverage, frechet, moments

POOL_FEATURES = 2048
SPATIAL_FEATURES = 7 * 17 * 17
COLUMNS = {
    "images": ",d",
    "fid": ".3f",
    "sfid": ".3f",
    "inception": ".3f",
    "precision": ".4f",
    "recall": ".4f",
}

# ---- 1. Sets of images ---------------------------------------------------------------------------


@contextmanager
def open_npz(path: Path):
    """arr_0 of an .npz file: (its shape, its dtype, a file that stands at its first byte). Raises
    UserError where there is no such array."""
    read_header = {
        1: np.lib.format.read_array_header_1_0,
        2: np.lib.format.read_array_header_2_0,
    }
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            version, _ = np.lib.format.read_magic(array)
            shape, by_columns, dtype = read_header[version](array)
            if by_columns:
                raise ValueError("it is stored column by column")
            yield shape, dtype, array
    except FileNotFoundError:
        raise UserError(f"no such file or folder: {path}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not an .npz file with an array arr_0, or is damaged ({error})"
        ) from None


class ImageSet:
    """Square uint8 images in colour, read batch by batch: arr_0 of an .npz file, or all images of
    a folder and its subfolders.

    With a `side`, a file's images must have it, and a folder's are cropped and resized to it. (The
    images in ADM's file were resized in a slightly different way: for numbers that stand beside a
    paper's, use that file.)

    Raises UserError for anything that is not images of one size."""

    def __init__(self, path: Path, side: int | None = None):
        self.path, self.files = Path(path), []
        if self.path.is_dir():
            self.open_folder(side)
            return
        with open_npz(self.path) as (shape, dtype, _):
            is_images = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
            if dtype != np.uint8 or not is_images:
                raise UserError(
                    f"arr_0 in {path} is {dtype} {shape}: uint8 (count, side, side, 3) is needed"
                )
        self.count, self.side = shape[:2]
        if side not in (None, self.side):
            raise UserError(
                f"the images in {path} are {self.side} pixels wide, and the samples {side}"
            )

    def open_folder(self, side: int | None):
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                self.files.append(file)
        if not self.files:
            raise UserError(f"no images in {self.path}")
        sizes = {(side, side)}
        if side is None:
            sizes = {Image.open(file).size for file in self.files}
        width, height = next(iter(sizes))
        if len(sizes) > 1 or width != height:
            raise UserError(
                f"the images in {self.path} are not squares of one size: {sorted(sizes)[:3]}"
            )
        self.count, self.side = len(self.files), width

    def batches(self, size: int):
        """uint8 tensors (b, 3, side, side), in order."""
        if self.files:
            for start in range(0, self.count, size):
                images = read_images(self.files[start : start + size], self.side, 3)
                yield torch.from_numpy(np.stack(list(images)))
            return
        with open_npz(self.path) as (_, _, array):
            for start in range(0, self.count, size):
                shape = (min(size, self.count - start), self.side, self.side, 3)
                pixels = array.read(math.prod(shape))
                images = np.frombuffer(pixels, np.uint8).reshape(shape)     # (b, h, w, 3)
                yield torch.from_numpy(rearrange(images, "b h w c -> b c h w").copy())


# ---- 2. The reference ----------------------------------------------------------------------------


def reference_moments(path: Path) -> dict:
    """The statistics in ADM's reference files, {"fid": (mu, sigma), "sfid": (mu_s, sigma_s)}, or {}
    where there are none. Raises UserError where they are damaged, or of other features."""
    if path.is_dir():
        return {}
    found = {}
    wanted = {
        "fid": ("mu", "sigma", POOL_FEATURES),
        "sfid": ("mu_s", "sigma_s", SPATIAL_FEATURES),
    }
    try:
        with np.load(path) as file:
            for name, (mean, covariance, d) in wanted.items():
                if {mean, covariance} <= set(file.files):
                    found[name] = check_moments(path, file[mean], file[covariance], d)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} cannot be read as a reference ({error})") from None
    return found


def check_moments(path: Path, mean, covariance, d: int):
    """The pair as float64 tensors. Raises UserError where they are not those of d features."""
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise UserError(
            f"the statistics in {path} have the shapes {mean.shape} and {covariance.shape}, and "
            f"({d},) and ({d}, {d}) are needed: they were made with another network"
        )
    mean, covariance = torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"the statistics in {path} are not finite: download the file again")
    return mean, covariance


# ---- 3. Inception --------------------------------------------------------------------------------


def import_inception():
    """The module of torch-fidelity that holds the network, without the rest of the package. That
    needs torchvision, each release of which works with one release of PyTorch only, and pip would
    replace the PyTorch that is installed. Raises UserError where the package is missing."""
    found = importlib.util.find_spec("torch_fidelity")
    if found is not None:
        # With this, Python looks for modules in the package and does not run its __init__.py.
        package = importlib.util.module_from_spec(found)
        sys.modules.setdefault("torch_fidelity", package)
    name = "torch_fidelity.feature_extractor_inceptionv3"
    return optional_import(name, install="--no-deps torch-fidelity")


def load_inception(weights: Path | None, device):
    """The Inception network of FID, from torch-fidelity. `weights`: its file, which the package
    downloads if none is named. Raises UserError where either is missing."""
    module = import_inception()
    outputs = [str(POOL_FEATURES), "logits_unbiased"]
    try:
        network = module.FeatureExtractorInceptionV3("inception", outputs, weights)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"no Inception weights ({one_line(error)}): name torch-fidelity's file with --inception"
        ) from None
    return network.to(device).eval()


@torch.no_grad()
def activations(network, images: ImageSet, device, batch: int = 64):
    """What ADM's evaluator takes of each image: the features after pooling (N, 2048); the spatial
    ones (N, 2023), that is, the first seven channels of the first convolution of block mixed_6,
    channels last; and the logits without their bias (N, 1008). float32, on the CPU."""
    spatial, pool, logits = [], [], []

    def keep_spatial(module, inputs, output):
        spatial.append(rearrange(output[:, :7], "b c h w -> b (h w c)").cpu())

    hook = network.Mixed_6d.branch1x1.register_forward_hook(keep_spatial)
    progress = Progress(
        f"features of {images.path}",
        images.batches(batch),
        total=math.ceil(images.count / batch),
        unit="images",
        size=batch,
        amount=images.count,
    )
    for pixels in progress:
        features, outputs = network(pixels.to(device))
        pool.append(features.cpu())
        logits.append(outputs.cpu())
    hook.remove()
    return torch.cat(pool), torch.cat(spatial), torch.cat(logits)


# ---- 4. The protocol -----------------------------------------------------------------------------


def inception_score(logits, split: int = 5000) -> float:
    """exp of the mean of KL(p(y|x) ‖ p(y)) over the images of a split; the average over splits of
    5,000 images. logits: (N, classes)."""
    scores = []
    for rows in logits.split(split):
        log_p = rows.double().log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0)
        divergence = (p * (log_p - marginal.log())).sum(dim=1)
        score = divergence.mean().exp()
        scores.append(score.item())
    return sum(scores) / len(scores)


def protocol(samples: Path, reference: Path, weights: Path | None, device) -> dict:
    """FID, sFID, Inception Score, precision and recall of the images `samples`. `reference`: ADM's
    .npz, whose statistics are used where it has them, or a folder of images. What can be refused is
    refused before the features are computed."""
    # TF32 would change the numbers, which are to be compared with those of others.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    images = ImageSet(samples)
    real = ImageSet(reference, images.side)
    statistics = reference_moments(reference)
    need_many = [images] if len(statistics) == 2 else [images, real]
    for one in need_many:
        if one.count <= POOL_FEATURES:
            raise UserError(
                f"{one.path} has {one.count:,} images, and {POOL_FEATURES:,} features need more"
            )
    network = load_inception(weights, device)
    pool, spatial, logits = activations(network, images, device)
    real_pool, real_spatial, _ = activations(network, real, device)
    fid = statistics.get("fid") or moments(real_pool)
    sfid = statistics.get("sfid") or moments(real_spatial)
    row = dict(
        images=images.count,
        fid=frechet(moments(pool), fid),
        sfid=frechet(moments(spatial), sfid),
        inception=inception_score(logits),
    )
    pool, real_pool = pool.to(device), real_pool.to(device)  # the many distances are for a GPU
    row["precision"] = coverage(pool, by=real_pool)
    row["recall"] = coverage(real_pool, by=pool)
    return row


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="an .npz file with arr_0, or a folder")
    add("--reference", type=Path, required=True, help="real images: ADM's .npz file, or a folder")
    add("--inception", type=Path, metavar="FILE", help="weights (default: they are downloaded)")
    add("--out", type=Path, default=Path("runs/protocol.json"), help="default: runs/protocol.json")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    flags = parser.parse_args()
    out = output_file(flags.out)
    row = protocol(flags.samples, flags.reference, flags.inception, pick_device(flags.device))
    print("", table({str(flags.samples): row}, COLUMNS), "", sep="\n")
    save_json(out, dict(samples=str(flags.samples), reference=str(flags.reference)) | row)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_program(main)
