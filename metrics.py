"""How far two sets of images are apart: the measures of the papers, on features of any network, and the protocol of
ImageNet's tables.

    Fréchet distance      between Gaussians fitted to the features of both sets: FID, with Inception's features
    Inception Score       how sure a classifier is of each image, and how many classes it sees in all (1606.03498)
    precision, recall     the share of generated images that lie among the real ones, and the reverse (1904.06991)

All work block by block: 50,000 images of 2,048 features need no more than 4 GB.

The protocol is that of ADM's evaluator (Dhariwal & Nichol, 2105.05233), which nearly all papers use. It sees images in
8 bits through the Inception network of 2015, which the package torch-fidelity has (evaluate.py --samples).
"""

import pickle
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from data import IMAGES, read_images
from training import Fault, Progress, optional, replace_file

# ---- 1. Measures of features ----------------------------------------------------------------------------------------


def moments(features, block=1000):
    """Mean (d,) and covariance (d, d), in float64, of features (N, d). Raises Fault where N images are too few for d
    features, or a feature is not finite."""
    count, d = features.shape
    if count <= d:
        raise Fault(f"a Gaussian in {d:,} features needs more than {d:,} images, and there are {count:,}")
    mean = sum(rows.double().sum(0) for rows in features.split(block)) / count
    if not mean.isfinite().all():
        raise Fault("some features are not finite: are there images of NaN?")
    centred = (rows.double() - mean for rows in features.split(block))
    return mean, sum(rows.T @ rows for rows in centred) / (count - 1)


def frechet(a, b) -> float:
    """Fréchet distance between two Gaussians (mean, covariance):
    ‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½)                                                 (FID, 1706.08500)"""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^½
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (C_a C_b)^½
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def coverage(points, by, k=3, block=1000) -> float:
    """The share of `points` (N, d) that lie within the manifold of `by` (M, d): in the ball of at least one of its
    points, whose radius reaches its k-th neighbour (1904.06991). Precision is coverage(generated, by=real), recall is
    coverage(real, by=generated)."""
    if len(by) <= k:
        raise Fault(f"a point's {k} neighbours need more than {k} images, and there are {len(by)}")
    radius = torch.cat([torch.cdist(rows, by).kthvalue(k + 1, dim=1).values for rows in by.split(block)])  # 1st: itself
    inside = [(torch.cdist(rows, by) <= radius).any(dim=1) for rows in points.split(block)]
    return torch.cat(inside).cpu().double().mean().item()


def inception_score(logits, split=5000) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)), over splits of 5,000 images, averaged; logits (N, classes)."""
    def score(rows):
        log_p = rows.double().log_softmax(1)
        p = log_p.exp()
        return (p * (log_p - p.mean(0).log())).sum(1).mean().exp()

    return torch.stack([score(rows) for rows in logits.split(split)]).mean().item()


# ---- 2. Sets of images ----------------------------------------------------------------------------------------------

def write_npz(path: Path, count: int, batches):
    """Write `count` uint8 images, which come in batches (b, side, side, c), as arr_0 of an .npz file: what ADM's
    evaluator reads. Never holds more than a batch."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            for i, batch in enumerate(batches):
                if i == 0:
                    header = dict(descr="|u1", fortran_order=False, shape=(count, *batch.shape[1:]))
                    np.lib.format.write_array_header_1_0(array, header)
                array.write(batch.tobytes())

    replace_file(path, write)


@contextmanager
def open_npz(path: Path):
    """arr_0 of an .npz file: (its shape, its dtype, a file that stands at its first byte). Raises Fault."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, by_columns, dtype = read[np.lib.format.read_magic(array)[0]](array)
            if by_columns:
                raise ValueError("it is stored column by column")
            yield shape, dtype, array
    except FileNotFoundError:
        raise Fault(f"no such file or folder: {path}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise Fault(f"{path} is not an .npz file with an array arr_0, or is damaged ({error})") from None


class ImageSet:
    """Square uint8 images, read batch by batch: arr_0 of an .npz file, or all the images of a folder and its
    subfolders. With a `side`, a folder's images are cropped and resized to it (not quite as ADM's file was made: for
    numbers to set beside a paper's, use that), and a file's must have it. Raises Fault for what is not images of one
    size."""

    def __init__(self, path: Path, side: int | None = None):
        self.path, self.files = Path(path), None
        if self.path.is_dir():
            self.files = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in IMAGES)
            if not self.files:
                raise Fault(f"no images in {path}")
            sizes = {Image.open(file).size for file in self.files} if side is None else {(side, side)}
            if len(sizes) > 1 or any(w != h for w, h in sizes):
                raise Fault(f"the images in {path} are not squares of one size: there are {sorted(sizes)[:3]}")
            self.count, self.side = len(self.files), sizes.pop()[0]
        else:
            with open_npz(self.path) as (shape, dtype, _):
                if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
                    raise Fault(f"arr_0 in {path} is {dtype} {shape}: uint8 (count, side, side, 3) is needed")
            self.count, self.side = shape[:2]
            if side not in (None, self.side):
                raise Fault(f"the images in {path} are {self.side} pixels wide, those to compare with {side}")

    def batches(self, size: int):
        """uint8 (b, 3, side, side), in order."""
        if self.files:
            for start in range(0, self.count, size):
                yield np.stack(list(read_images(self.files[start : start + size], self.side, 3)))
        else:
            with open_npz(self.path) as (shape, _, array):
                for start in range(0, self.count, size):
                    rows = array.read(min(size, self.count - start) * self.side**2 * 3)
                    rows = np.frombuffer(rows, np.uint8).reshape(-1, self.side, self.side, 3)
                    yield rearrange(rows, "b h w c -> b c h w").copy()  # ours to write to, as torch wants it


# ---- 3. The protocol ------------------------------------------------------------------------------------------------

def load_inception(weights: Path | None, device):
    """The Inception network of FID, from the package torch-fidelity; `weights`: its file, which the package fetches
    if it is not named. Raises Fault where either is not to be had."""
    module = optional("torch_fidelity.feature_extractor_inceptionv3")
    try:
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        return network.to(device).eval()  # which torch-fidelity 0.3 leaves to us
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise Fault(f"no Inception weights ({str(error).splitlines()[0]}): name torch-fidelity's file with "
                    "--inception") from None


@torch.no_grad()
def activations(network, images: ImageSet, device, batch=64):
    """What ADM's evaluator takes of each image: the 2048 features after pooling; of the "spatial" features, those of
    the first convolution of block mixed_6, the first seven channels, 17×17 of them, flattened channels last; and the
    logits without their bias. Three tensors (N, …), float32, on the CPU."""
    spatial = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: spatial.append(rearrange(out[:, :7], "b c h w -> b (h w c)").cpu()))
    found = []
    for x in Progress(f"features of {images.path}", images.batches(batch), -(-images.count // batch), unit="images",
                      weight=batch):
        found.append([features.cpu() for features in network(torch.from_numpy(x).to(device))])
    hook.remove()
    pool, logits = zip(*found, strict=True)
    return torch.cat(pool), torch.cat(spatial), torch.cat(logits)


def reference_moments(path: Path) -> dict:
    """The statistics that ADM's reference files hold ready: {"fid": (mu, sigma), "sfid": (mu_s, sigma_s)}, or {}."""
    if Path(path).suffix != ".npz":
        return {}
    names = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
    try:
        with np.load(path) as file:
            there = {key: tuple(torch.from_numpy(file[name]).double() for name in pair) for key, pair in names.items()
                     if set(pair) <= set(file.files)}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Fault(f"{path} cannot be read as a reference ({error})") from None
    if not all(x.isfinite().all() for pair in there.values() for x in pair):
        raise Fault(f"the statistics in {path} are not finite: fetch the file again")
    return there


def protocol(samples: Path, reference: Path, weights: Path | None, device) -> dict:
    """FID, sFID, Inception Score, precision and recall of the images `samples`, as ADM's evaluator takes them, against
    a `reference`: its .npz, whose statistics are used where it has them, or a folder of images."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # numbers to compare with others'
    images = ImageSet(samples)
    real, there = ImageSet(reference, images.side), reference_moments(reference)
    few = [one for one in (images, *[real] * (len(there) < 2)) if one.count <= 2048]
    if few:
        raise Fault(f"{few[0].path} has {few[0].count:,} images, and 2048 features need more than that")
    network = load_inception(weights, device)
    pool, spatial, logits = activations(network, images, device)
    real_pool, real_spatial, _ = activations(network, real, device)
    fid, sfid = there.get("fid") or moments(real_pool), there.get("sfid") or moments(real_spatial)
    row = dict(images=images.count, fid=frechet(moments(pool), fid), sfid=frechet(moments(spatial), sfid),
               inception_score=inception_score(logits))
    pool, real_pool = pool.to(device), real_pool.to(device)  # the many distances are for the GPU
    return row | dict(precision=coverage(pool, by=real_pool), recall=coverage(real_pool, by=pool))
