"""The numbers: how good few steps are, what they cost, and where the errors come from.

Distances between sets of images are taken in the features of a *small classifier trained on the same data set*, which
this program trains when it first needs it. They compare methods on one data set; they are not the FID of papers.

    Fréchet distance, precision, recall     of generated images against held-out real ones (metrics.py)
    accuracy              how often the classifier sees the class that was asked for
    error                 mean squared error to the teacher's full-step image from the same noise and label
    exposure bias         the error per step when fed the teacher's states, and when fed its own (distill.py)
    attention             how much of it goes from each state to each earlier one: what the history is used for

    python evaluate.py                              the shapes student that ships with the repository
    python evaluate.py runs/shapes runs/n0          several runs of one teacher, side by side
    python evaluate.py --flops DiT-XL/2             what a network costs, by count: 4 states, history in 6 layers
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz      the papers' protocol

Tables go to the screen and evaluation.json (protocol.json); the pictures are evaluation.png and samples.png.
"""

import argparse
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import data
from distill import predict
from metrics import coverage, frechet, moments, protocol
from model import HISTORIES, DiT, size, visible
from sample import HELD_OUT, compare, figure, methods, seen, table
from teacher import ASSETS, PATHS, load_network, solve
from training import (Fault, Progress, at_once, autocast, command, fingerprint, machine_flags, make_folder, pick_device,
                      positive, replace_file, save_json, train, whole, writable)

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
    """The classifier of a data set, from `folder` if it has been trained before. Raises Fault where there is nothing to
    tell apart."""
    if len(dataset.classes) < 2:
        raise Fault("distances are taken in the features of a classifier, and these images are of one class")
    c, h, _ = dataset.shape
    name = re.sub(r"\W+", "-", about["data"]).strip("-")
    config = dict(channels=c, image_size=h, classes=len(dataset.classes))
    out = writable(Path(folder) / f"{name}-{c}x{h}-{len(dataset)}.pt")
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


# ---- 2. A judge -----------------------------------------------------------------------------------------------------

class Judge:
    """Compares ways of sampling a teacher's data set: with held-out real images, in the features of the data set's
    classifier, and with the teacher's own images from the same `count` held-out noises. `source`: the data set, if it
    is not where the teacher saw it; `cache`: a file to keep the teacher's images in, which take long to make. Raises
    Fault where there are too few images."""

    def __init__(self, teacher, about: dict, count: int, device, bf16=False, source: str | None = None,
                 cache: Path | None = None):
        self.about, self.count, self.device, self.bf16 = about, count, device, bf16
        kind = (source or about["data"], about["model"]["image_size"], about["model"]["channels"])
        train_set, held_out = data.load(*kind), data.load(*kind, split="test", count=count)
        data.must_match(about, train_set)
        if min(len(held_out), count) < 200:
            raise Fault(f"64 features need at least 200 images of each kind, and there are {len(held_out)} real ones "
                        f"kept for testing, to be compared with {count}: take more, or another data set")
        self.classifier = train_classifier(train_set, about, Path("runs/classifiers"), device)
        real_images, real_labels = held_out.some(count)
        self.real, predicted = features(self.classifier, real_images)
        self.right = (predicted == real_labels).double().mean().item()
        self.rows = {"other real images": self.distances(*train_set.some(len(self.real)))}
        try:
            images, labels = torch.load(cache, weights_only=True)
        except Exception:  # none, not there, or damaged
            images, labels = self.generate(lambda x_T, y: solve(teacher, about, x_T, y)[1], "teacher")
            if cache:
                replace_file(cache, lambda file: torch.save((images, labels), file))
        self.target = images
        self.best = self.distances(images, labels) | dict(above=0.0, error=0.0)

    def generate(self, run, title):
        """Images (N, c, h, w) by a way of sampling, (x_T, y) -> states, from held-out noises; and their labels."""
        images, labels, batch = [], [], at_once(self.device)
        for start in Progress(f"{title}, batches", range(0, self.count, batch), unit="images", weight=batch):
            x_T, y = data.noise_and_labels(self.about, HELD_OUT, range(start, min(start + batch, self.count)))
            with autocast(self.device, self.bf16):
                images.append(run(x_T.to(self.device), y.to(self.device))[:, -1].cpu())
            labels.append(y)
        images = torch.cat(images)
        if not images.isfinite().all():
            raise Fault(f"{title}: some images are not finite. Was the training cut short, or its --lr too high?")
        return images, torch.cat(labels)

    def distances(self, images, labels) -> dict:
        """Fréchet distance, precision and recall to the held-out real images, and accuracy."""
        found, predicted = features(self.classifier, images)
        return dict(frechet=frechet(moments(found), moments(self.real)),
                    precision=coverage(found, by=self.real), recall=coverage(self.real, by=found),
                    accuracy=(predicted == labels).double().mean().item())

    def __call__(self, run, title: str) -> dict:
        """The row of a way of sampling: its distances, how far `above` the teacher's is the Fréchet distance, and the
        mean squared error to the teacher's images."""
        images, labels = self.generate(run, title)
        row = self.distances(images, labels)
        return row | dict(above=row["frechet"] - self.best["frechet"],
                          error=(images - self.target).square().mean().item())


# ---- 3. Exposure bias, and what the history is used for -------------------------------------------------------------

@torch.no_grad()
def exposure_bias(student, about: dict, teacher_states, own_states, y) -> dict[str, list[float]]:
    """The student's mean squared error to the teacher's next state at each of its S steps, {"forced": (S,), "own":
    (S,)}: fed the teacher's states, as in training, and fed its own, as in sampling. What lies between is exposure
    bias. From the same noises: all the teacher's states (b, steps + 1, …), and the student's (b, S + 1, …)."""
    marks = torch.tensor(about["marks"])
    truth = teacher_states[:, [0, *marks]]  # (b, S + 1, c, h, w)
    if about["trajectory"] == "clean":
        grid = PATHS[about["path"]].grid(about["steps"]).to(truth.device)
        truth = torch.cat([truth[:, :1], seen(about, teacher_states, grid)[:, marks - 1]], 1)  # step k ends at mark k
    forced = predict(student, about, truth[:, :-1], y)
    return {name: rearrange((x - truth[:, 1:]).square(), "b s c h w -> s (b c h w)").mean(1).tolist()
            for name, x in (("forced", forced), ("own", own_states[:, 1:]))}


@torch.no_grad()
def attention(student, states, y, told) -> list:
    """How a student that reads the states (b, S, c, h, w) spreads its attention: (N, S, S), for each of its N history
    layers and each state the shares that go to each of the states, the mean over samples, tokens and heads. y: (b,);
    told: (S,), the states' times."""
    shares = []

    def watch(module, args, output):  # computes again what scaled_dot_product_attention keeps to itself
        x, history, _ = args
        S, n = x.shape[1:3]
        q, k, _ = rearrange(module.qkv(x), "b s n (qkv h d) -> qkv b h (s n) d", qkv=3, h=module.heads)
        owner = torch.arange(S, device=x.device).repeat_interleave(n)[None, None, :, None]  # whose key it is
        rows = torch.zeros(S, S, device=x.device)
        for i, queries in enumerate(q.split(n, dim=2)):
            scores = queries @ visible(k, i, n, history).mT / q.shape[-1] ** 0.5
            weights = scores.float().softmax(-1).mean((0, 1, 2))
            rows[i].index_add_(0, visible(owner, i, n, history).flatten(), weights)
        shares.append(rows.tolist())

    hooks = [block.attn.register_forward_hook(watch) for block in student.blocks[: student.history_layers]]
    student(states, told, y)
    for hook in hooks:
        hook.remove()
    return shares


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


PROTOCOL = {"images": ",d", "fid": ".3f", "sfid": ".3f", "inception_score": ".3f", "precision": ".4f",
            "recall": ".4f"}


def load_runs(runs: list[Path], teacher_path: Path | None, device):
    """Students, from run folders or files, and the teacher they share: ({name: (model, about)}, teacher). The teacher
    is looked for at `teacher_path`, or else beside the first student, in runs/ and among the shipped ones. Raises Fault
    when it is not there, or when the students differ in their teacher, or in the guidance or steps of its ODE."""
    students = {}
    for run in runs:
        path = run if run.suffix == ".pt" else run / "student.pt"
        name = path.resolve().parent.name if path.name == "student.pt" else path.stem
        if name in students:
            raise Fault(f"two runs are called {name}, and a table cannot tell them apart: rename one")
        if name.startswith("teacher") or "shuffled" in name:
            raise Fault(f"a run called {name} would be taken for another row of the table: rename it")
        students[name] = load_network(path, "student", device)
    wanted = {tuple(about.get(key) for key in ("teacher", "guidance", "steps", "guided_channels"))
              for _, about in students.values()}
    if len(wanted) > 1:
        raise Fault("these runs have different teachers, or trajectories of different guidance or steps: "
                    "evaluate them one at a time")
    [(fingerprint_wanted, *_)] = wanted
    if teacher_path:
        model, _ = load_network(teacher_path, "teacher", device)
        if fingerprint_wanted in (None, fingerprint(model.state_dict())):  # None: the authors' files do not say
            return students, model
        raise Fault(f"{teacher_path} is not the teacher of {runs[0]}")
    beside = runs[0].parent if runs[0].suffix == ".pt" else runs[0]
    for place in (beside / "teacher.pt", *Path("runs").glob("*/teacher.pt"), *ASSETS.glob("*-teacher.pt")):
        with suppress(Fault):  # not there, or damaged: it may be another
            model, _ = load_network(place, "teacher", device)
            if fingerprint(model.state_dict()) == fingerprint_wanted:
                return students, model
    raise Fault(f"the teacher of {runs[0]} was not found: name it with --teacher")


def draw(curves: dict[str, dict], shares: dict[str, list], out: Path):
    """evaluation.png: the exposure-bias curves and, for each student with a history, where its attention goes."""
    from matplotlib.figure import Figure

    page = Figure((5.5 + 5.5 * len(shares), 4.4), layout="tight")
    left, *others = page.subplots(1, 1 + len(shares), squeeze=False)[0]
    for i, (name, curve) in enumerate(curves.items()):
        steps = range(1, len(curve["own"]) + 1)
        left.plot(steps, curve["forced"], "o--", color=f"C{i}", label=f"{name}, fed the teacher's states")
        left.plot(steps, curve["own"], "o-", color=f"C{i}", label=f"{name}, fed its own")
    left.set(xlabel="step", ylabel="mean squared error to the teacher's state", yscale="log", title="Exposure bias")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)  # below: curves fill the panel
    for axis, (name, layers) in zip(others, shares.items(), strict=True):
        step, read = torch.tril_indices(len(layers[0]), len(layers[0]))
        cells = 100 * torch.tensor(layers)[:, step, read]  # (N, pairs), %
        axis.imshow(cells, vmin=0, vmax=100, cmap="Blues", origin="lower", aspect="auto")
        for (layer, pair), cell in np.ndenumerate(cells.numpy()):
            axis.text(pair, layer, f"{cell:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if cell > 50 else "black")
        labels = [f"step {i + 1}: {'itself' if i == j else 'noise' if j == 0 else f'state {j}'}"
                  for i, j in zip(step.tolist(), read.tolist(), strict=True)]
        axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(layers)), range(1, len(layers) + 1))
        axis.set(ylabel="layer", title=f"{name}: what a step's attention reads, %")
    page.savefig(writable(out), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[ASSETS / "shapes-student.pt"], help="run folders, or student files")
    add("--teacher", type=Path, help="their teacher's checkpoint (default: found by its fingerprint)")
    add("--data", help="the data set, where it is no longer where the teacher saw it")
    add("--count", type=positive, default=5000, help="generated and real images to compare (default: 5000)")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder for the results (default: runs/evaluation)")
    add("--samples", type=Path, help="instead: ADM's protocol for these images, an .npz file with arr_0, or a folder")
    add("--reference", type=Path, help="and for these real ones: ADM's .npz, or a folder of images")
    add("--inception", type=Path, metavar="FILE", help="torch-fidelity's Inception weights (default: it fetches them)")
    add("--flops", metavar="SIZE/PATCH", help="instead: count the arithmetic of a network, described by the next four")
    add("--image-size", type=positive, default=32, help="side of its images or latents (default: 32, of 256 pixels)")
    add("--channels", type=positive, default=4, help="of its images or latents (default: 4)")
    add("--steps", type=positive, default=4, help="states it reads (default: 4)")
    add("--history-layers", type=whole, default=6, help="layers that read the history (default: 6)")
    machine_flags(add)
    args = parser.parse_args()
    if args.flops:
        rows = costs_of(args.flops, args.image_size, args.channels, args.steps, args.history_layers)
        print(table(rows, {"gmacs": ".2f", "percent": ".2f"}))
        return
    device, out = pick_device(args.device), make_folder(args.out)
    if args.samples or args.reference or args.inception:
        if not (args.samples and args.reference):
            raise Fault("the protocol compares --samples with a --reference: give both")
        row = protocol(args.samples, args.reference, args.inception, device)
        print("", table({str(args.samples): row}, PROTOCOL), "", sep="\n")
        save_json(out / "protocol.json", dict(samples=str(args.samples), reference=str(args.reference), **row))
        print(f"wrote {out / 'protocol.json'}")
        return
    students, teacher = load_runs(args.runs, args.teacher, device)
    judge = Judge(teacher, next(iter(students.values()))[1], args.count, device, args.bf16, args.data)
    print(f"classifier: {judge.right:.2%} right on {len(judge.real):,} held-out real images")

    rows, curves, shares, shown = dict(judge.rows), {}, {}, {}
    for name, (student, about) in students.items():
        costs, states, y = compare(teacher, student, about, device, args.bf16, name)
        for row, (calls, run) in methods(teacher, student, about, name).items():
            if row not in rows:  # the teacher's rows are shared
                macs = calls * teacher.macs() if row.startswith("teacher") else student.macs(calls)
                if row.endswith("shuffled"):  # without the cache, step by step
                    macs = sum(student.macs(states) for states in range(1, calls + 1))
                found = judge(run, row) if shown else judge.best  # the first way is the teacher's own
                rows[row] = costs[row] | dict(gmacs=macs / 1e9) | found
                shown[row] = states[row]
        full, own = states[f"teacher, {about['steps']} steps"], states[f"{name}, {about['S']} steps"]
        with autocast(device, args.bf16):
            curves[name] = exposure_bias(student, about, full, own, y)
            if f"{name}, history shuffled" in states:
                shares[name] = attention(student, own[:, :-1], y, torch.tensor(about["told"], device=device))

    print("", table(rows, COLUMNS), "", sep="\n")
    print("calls of the network, and billions of multiply-accumulates (gmacs), for an image; error: to the teacher's;\n"
          "frechet: to real images, in features of a small classifier (not FID); above: minus that of the teacher\n")
    for name, curve in curves.items():
        for fed in ("forced", "own"):
            print(f"{name}: error per step, fed {'the teacher' if fed == 'forced' else 'its own'}: "
                  + "  ".join(f"{e:.6f}" for e in curve[fed]))
    save_json(out / "evaluation.json", dict(count=args.count, device=str(device), rows=rows,
                                            exposure=curves, attention=shares,
                                            runs={name: about for name, (_, about) in students.items()}))
    draw(curves, shares, out / "evaluation.png")
    figure({name: s for name, s in shown.items() if "shuffled" not in name}, out / "samples.png", y)
    print(f"\nwrote evaluation.json, evaluation.png and samples.png into {out}")


if __name__ == "__main__":
    command(main)
