"""The numbers: how good few steps are, what they cost, and where the errors come from.

Distances between sets of images are taken in the features of a *small classifier trained on the same data set*, which
this program trains when it first needs it. They compare methods on one data set; they are not the FID of papers.

    Fréchet distance      between Gaussians fitted to the features of generated and of held-out real images
    precision, recall     the share of generated images close to real ones, and the reverse (1904.06991, k = 3)
    accuracy              how often the classifier sees the class that was asked for
    error                 mean squared error to the teacher's full-step image from the same noise and label
    exposure bias         the error per step when fed the teacher's states, and when fed its own (distill.py)

    python evaluate.py                              the shapes student that ships with the repository
    python evaluate.py runs/shapes runs/n0          several runs of one teacher, side by side
    python evaluate.py --flops DiT-XL/2             what a network costs, by count: 4 states, history in 6 layers

The table goes to the screen and evaluation.json; the pictures are evaluation.png and samples.png.
"""

import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import data
from model import HISTORIES, DiT, size
from sample import HELD_OUT, compare, figure, methods, seen, table
from teacher import ASSETS, PATHS, advance, load_network
from training import (Fault, Progress, at_once, autocast, command, fingerprint, machine_flags, make_folder, pick_device,
                      positive, save_json, train, whole, writable)

# ---- 1. Features ----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (b, c, h, w) to 64 features and, from these, class logits. For points (1×1 images), a small MLP."""

    def __init__(self, channels: int, image_size: int, classes: int):
        super().__init__()
        if image_size == 1:
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU())
        else:
            layers, width = [nn.Conv2d(channels, 32, 3, padding=1), nn.GELU()], 32
            while image_size > 4:  # halve until 4×4 or less
                image_size, wider = (image_size + 1) // 2, min(2 * width, 128)
                layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.GELU()]
                width = wider
            self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * image_size**2, 64), nn.GELU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.body(x))


def train_classifier(dataset: data.Dataset, about: dict, folder: Path, device, iterations=800, batch=128):
    """The classifier of a data set, from `folder` if it has been trained before."""
    c, h, _ = dataset.shape
    name = re.sub(r"\W+", "-", about["data"]).strip("-")
    config = dict(channels=c, image_size=h, classes=len(dataset.classes))
    out = writable(Path(folder) / f"{name}-{c}x{h}.pt")
    torch.manual_seed(0)
    model = Classifier(**config).to(device)

    average, _ = train("classifier", model, lambda step: dataset.draw(batch, data.stream(1, step)),
                       lambda model, x, y: F.cross_entropy(model(x), y), out,
                       dict(kind="classifier", model=config, data=about["data"]),
                       iterations=iterations, batch=batch, lr=2e-3)
    return average


@torch.no_grad()
def features(classifier, images, batch=500):
    """Images (N, c, h, w), in [-1, 1], to features (N, 64), float64, and predicted classes (N,); on the CPU. Pictures
    are first rounded to 8 bits, as real ones are."""
    device, found, predicted = next(classifier.parameters()).device, [], []
    for x in images.split(batch):
        if x.shape[1] in (1, 3):
            x = torch.from_numpy(data.to_uint8(x)).movedim(-1, 1) / 127.5 - 1
        feature = classifier.body(x.to(device))
        found.append(feature.cpu().double())
        predicted.append(classifier.head(feature).argmax(1).cpu())
    return torch.cat(found), torch.cat(predicted)


# ---- 2. Distances ---------------------------------------------------------------------------------------------------

def frechet(a, b) -> float:
    """Fréchet distance between Gaussians fitted to features a (N, d) and b (M, d):
    ‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½)                                                 (FID, 1706.08500)"""
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^½
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()  # tr (C_a C_b)^½
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def coverage(points, by, k=3, block=1000) -> float:
    """The share of `points` (N, d) that lie within the manifold of `by` (M, d): in the ball of at least one of its
    points, whose radius reaches its k-th neighbour (1904.06991). Precision is coverage(generated, by=real), recall is
    coverage(real, by=generated)."""
    radius = torch.cat([torch.cdist(rows, by).kthvalue(k + 1, dim=1).values for rows in by.split(block)])  # 1st: itself
    inside = [(torch.cdist(rows, by) <= radius).any(dim=1) for rows in points.split(block)]
    return torch.cat(inside).double().mean().item()


def distances(classifier, images, labels, real) -> dict:
    """The distances of a set of images from the features of real ones, and the accuracy where labels are given."""
    found, predicted = features(classifier, images)
    return dict(frechet=frechet(found, real), precision=coverage(found, by=real), recall=coverage(real, by=found),
                accuracy=(predicted == labels).double().mean().item())


# ---- 3. Exposure bias -----------------------------------------------------------------------------------------------

@torch.no_grad()
def exposure_bias(student, about: dict, teacher_states, own_states, y) -> dict[str, list[float]]:
    """The student's mean squared error to the teacher's next state at each of its S steps, {"forced": (S,), "own":
    (S,)}: fed the teacher's states, as in training, and fed its own, as in sampling. What lies between is exposure
    bias. From the same noises: all the teacher's states (b, steps + 1, …), and the student's (b, S + 1, …)."""
    S, marks = about["S"], torch.tensor(about["marks"])
    truth = teacher_states[:, [0, *marks]]  # (b, S + 1, c, h, w)
    if about["trajectory"] == "clean":
        grid = PATHS[about["path"]].grid(about["steps"]).to(truth.device)
        truth = torch.cat([truth[:, :1], seen(about, teacher_states, grid)[:, marks - 1]], 1)
    times, told = (torch.tensor(about[key], device=truth.device) for key in ("times", "told"))
    forced = advance(about, student(truth[:, :S], told, y).float(), truth[:, :S], times[:-1], times[1:])
    return {name: rearrange((x - truth[:, 1:]).square(), "b s c h w -> s (b c h w)").mean(1).tolist()
            for name, x in (("forced", forced), ("own", own_states[:, 1:]))}


# ---- 4. Cost --------------------------------------------------------------------------------------------------------

def costs_of(name: str, image_size: int, channels: int, S: int, history_layers: int) -> dict[str, dict]:
    """What reading S states costs a network of that size, without history and with each kind: {row: {"gmacs",
    "percent"}}, billions of multiply-accumulates an image, and how much that is above no history. Nothing is allocated.
    Raises Fault for a configuration that cannot be."""
    rows = {}
    for history in HISTORIES:
        try:
            with torch.device("meta"):
                model = DiT(image_size=image_size, channels=channels, classes=1000, **size(name), history=history,
                            history_layers=history_layers)
        except ValueError as error:
            raise Fault(str(error)) from None
        macs = model.macs(S)
        rows[f"{history} history"] = dict(gmacs=macs / 1e9, percent=100 * (macs / (S * model.macs()) - 1))
    return rows


# ---- 5. The program -------------------------------------------------------------------------------------------------

COLUMNS = {"calls": "d", "gmacs": ".4f", "ms": ".2f", "error": ".6f", "frechet": ".3f", "above": ".3f",
           "precision": ".3f", "recall": ".3f", "accuracy": ".3f"}


def generate(run, about: dict, count: int, device, bf16=False, title="sampling"):
    """`count` images (N, c, h, w) by a way of sampling, (x_T, y) -> states, from held-out noises; and their
    labels."""
    images, labels, batch = [], [], at_once(device)
    for start in Progress(title, range(0, count, batch), unit="images", weight=batch):
        x_T, y = data.noise_and_labels(about, HELD_OUT, range(start, min(start + batch, count)))
        with autocast(device, bf16):
            images.append(run(x_T.to(device), y.to(device))[:, -1].cpu())
        labels.append(y)
    return torch.cat(images), torch.cat(labels)


def load_runs(runs: list[Path], teacher_path: Path | None, device):
    """Students, from run folders or files, and the teacher they share: ({name: (model, about)}, teacher, its about).
    The teacher is looked for at `teacher_path`, or else beside the first student, in runs/ and among the shipped
    ones. Raises Fault when it is not there, or when the students' trajectories differ in kind."""
    students = {}
    for run in runs:
        path = run if run.suffix == ".pt" else run / "student.pt"
        name = path.parent.name if path.name == "student.pt" else path.stem
        if name in students:
            raise Fault(f"two runs are called {name}, and a table cannot tell them apart: rename one")
        students[name] = load_network(path, "student", device)
    wanted = {tuple(about[key] for key in ("teacher", "guidance", "steps")) for _, about in students.values()}
    if len(wanted) > 1:
        raise Fault("these runs have different teachers, or trajectories of different guidance or steps: "
                    "evaluate them one at a time")
    [(fingerprint_wanted, _, _)] = wanted
    places = [runs[0] / "teacher.pt", *Path("runs").glob("*/teacher.pt"), *ASSETS.glob("*-teacher.pt")]
    for place in [teacher_path] if teacher_path else filter(Path.exists, places):
        model, about = load_network(place, "teacher", device)
        if fingerprint(model.state_dict()) == fingerprint_wanted:
            return students, model, about
    raise Fault(f"{teacher_path} is not the teacher of {runs[0]}" if teacher_path else
                f"the teacher of {runs[0]} was not found: name it with --teacher")


def draw(curves: dict[str, dict], rows: dict, out: Path):
    """evaluation.png: the exposure-bias curves, and distance against cost."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    page, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (name, curve) in enumerate(curves.items()):
        steps = range(1, len(curve["own"]) + 1)
        left.plot(steps, curve["forced"], "o--", color=f"C{i}", label=f"{name}, fed the teacher's states")
        left.plot(steps, curve["own"], "o-", color=f"C{i}", label=f"{name}, fed its own")
    left.set(xlabel="step", ylabel="mean squared error to the teacher's state", yscale="log", title="Exposure bias")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)  # below: curves fill the panel
    right.axhline(rows["other real images"]["frechet"], color="0.6", linestyle=":", label="other real images")
    for name, row in rows.items():
        if row.get("gmacs"):
            right.plot(row["gmacs"], row["frechet"], "o", label=name)
    right.set(xlabel="billion multiply-accumulates an image", ylabel="Fréchet distance (small classifier)",
              xscale="log", yscale="log", title="Distance to real images against cost")
    right.legend(fontsize=8)
    page.tight_layout()
    page.savefig(writable(out), dpi=110)
    plt.close(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[ASSETS / "shapes-student.pt"], help="run folders, or student files")
    add("--teacher", type=Path, help="their teacher's checkpoint (default: found by its fingerprint)")
    add("--data", help="the data set, where it is no longer where the teacher saw it")
    add("--count", type=positive, default=5000, help="generated and real images to compare (default: 5000)")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder for the results (default: runs/evaluation)")
    add("--flops", metavar="SIZE/PATCH", help="instead: count the arithmetic of a network, of these four properties:")
    add("--image-size", type=positive, default=32, help="pixels, or latents, of a side (default: 32, 256 pixels)")
    add("--channels", type=positive, default=4, help="of its images or latents (default: 4)")
    add("--steps", type=positive, default=4, help="states it reads (default: 4)")
    add("--history-layers", type=whole, default=6, help="layers that read the history (default: 6)")
    machine_flags(add)
    args = parser.parse_args()
    if args.flops:
        rows = costs_of(args.flops, args.image_size, args.channels, args.steps, args.history_layers)
        print(table(rows, {"gmacs": ".2f", "percent": ".2f"}))
        return
    if args.count < 200:
        raise Fault("64 features need at least 200 images: raise --count")

    device, out = pick_device(args.device), make_folder(args.out)
    students, teacher, teacher_about = load_runs(args.runs, args.teacher, device)
    about = next(iter(students.values()))[1]
    kind = (args.data or about["data"], about["model"]["image_size"], about["model"]["channels"])
    train_set, held_out = data.load(*kind), data.load(*kind, split="test", count=args.count)
    if len(held_out) < 200:
        raise Fault(f"only {len(held_out)} real images are kept for testing, and 64 features need at least 200")
    classifier = train_classifier(train_set, about, Path("runs/classifiers"), device)
    real_images, real_labels = held_out.some(args.count)
    real, predicted = features(classifier, real_images)
    print(f"classifier: {(predicted == real_labels).double().mean():.2%} right on {len(real):,} held-out real images")
    rows = {"other real images": distances(classifier, *train_set.some(len(real)), real)}

    curves, shown = {}, {}
    for name, (student, about) in students.items():
        costs, states, y = compare(teacher, teacher_about, student, about, device, args.bf16)
        for way, (calls, run) in methods(teacher, teacher_about, student, about).items():
            row = way.replace("student", name).replace("its", f"{name},")
            if row not in rows:  # the teacher's rows are shared
                images, labels = generate(run, about, args.count, device, args.bf16, row)
                macs = calls * teacher.macs() if way.startswith("teacher") else student.macs(calls)
                rows[row] = costs[way] | dict(gmacs=macs / 1e9) | distances(classifier, images, labels, real)
                shown[row] = states[way]
        full, _, own = list(states.values())[:3]
        with autocast(device, args.bf16):
            curves[name] = exposure_bias(student, about, full, own, y)

    best = rows[f"teacher, {about['steps']} steps"]["frechet"]
    for row in rows.values():
        row["above"] = row["frechet"] - best
    print("", table(rows, COLUMNS), "", sep="\n")
    print("calls of the network, and billions of multiply-accumulates (gmacs), for an image; error: to the teacher's;\n"
          "frechet: to real images, in features of a small classifier (not FID); above: minus that of the teacher\n")
    for name, curve in curves.items():
        for fed in ("forced", "own"):
            print(f"{name}: error per step, fed {'the teacher' if fed == 'forced' else 'its own'}: "
                  + "  ".join(f"{e:.6f}" for e in curve[fed]))
    save_json(out / "evaluation.json", dict(count=args.count, device=str(device), rows=rows, exposure=curves,
                                            runs={name: about for name, (_, about) in students.items()}))
    draw(curves, rows, out / "evaluation.png")
    number = 100 if about["model"]["image_size"] == 1 else 16
    figure({name: s[:number] for name, s in shown.items() if "shuffled" not in name}, out / "samples.png", y[:number])
    print(f"\nwrote evaluation.json, evaluation.png and samples.png into {out}")


if __name__ == "__main__":
    command(main)
