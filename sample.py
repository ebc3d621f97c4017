"""Sampling: images from a student in a few steps, or from a teacher in many.

The student's loop is the whole point of ARD (paper, Sec. 3): each step reads the noise x_T and *everything it has
produced since*, not the last state only. Keys and values of the earlier states are cached, so step s costs one state,
not s.

    python sample.py                                      four-step images from the shipped student, into runs/samples/
    python sample.py assets/shapes-teacher.pt             the same noises through the teacher's 24 steps
    python sample.py --labels star heart --trajectory     stars and hearts, and how they came to be
    python sample.py --count 50000 --npz                  samples.npz, as ADM's evaluator reads it
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import data
from metrics import write_npz
from model import KVCache
from teacher import ASSETS, PATHS, advance, load_network, over, solve
from training import (Fault, Progress, autocast, command, gather, machine_flags, make_folder, pick_device, positive,
                      rank, strength, synchronise, wait_for_all, whole, world, writable)


@torch.no_grad()
def few_step(model, about: dict, x_T, y, shuffle: bool = False):
    """A student's trajectory, (b, S + 1, c, h, w): x_T first, its image last. x_T: (b, c, h, w); y: (b,).

    `shuffle` is a control: every step reads its own state, but the *history of another sample* of the batch. A
    student that makes use of its history should get worse. (It runs without the cache, on all the states so far.)"""
    times = torch.tensor(about["times"], device=x_T.device)  # (S + 1,)
    told = torch.tensor(about["told"], device=x_T.device)  # (S,): the times as the network hears them
    states, cache = [x_T], KVCache(about["S"])
    for s in range(about["S"]):
        x = states[-1]
        if shuffle:
            others = [state.roll(1, dims=0) for state in states[:-1]]
            output = model(torch.stack([*others, x], 1), told[: s + 1], y)[:, -1]
        else:
            output = model(x[:, None], told[s : s + 1], y, cache)[:, 0]
        states.append(advance(about, output.float(), x, times[s], times[s + 1]))
    return torch.stack(states, 1)


def seen(about: dict, states, times):
    """What the states of a trajectory (b, s + 1, c, h, w) promise: the clean images x̂_0 (b, s, c, h, w) that each
    Euler step aimed at, from x = α·x̂_0 + σ·ε̂ before and after the step. Shows coarse become fine, which noisy
    states hide."""
    path, t, t_next = PATHS[about["path"]], times[:-1], times[1:]
    α, σ, α_next, σ_next = (over(f(t_), states) for t_ in (t, t_next) for f in (path.alpha, path.sigma))
    return (σ * states[:, 1:] - σ_next * states[:, :-1]) / (σ * α_next - σ_next * α)


# ---- up to four ways from the same noise ----------------------------------------------------------------------------

# Seeds of noise. Trajectories, what students learn from, have the first (0, 1, …); these are for noises never seen.
HELD_OUT = 2**34  # on which students are judged; none is trained or tuned on it
FRESH = 2**35  # from here on, those of this program's --seed


def methods(teacher, student, about: dict, name="student") -> dict:
    """{name: (network calls, (x_T, y) -> states)}: the teacher at its full steps, the teacher at the student's S
    steps, the student and, where it has a history, the control: the student whose history is shuffled across the
    batch. Guidance and steps of the teacher's ODE are those that the student has learned, in its `about`."""
    S, full, twice = about["S"], about["steps"], 1 if about["guidance"] == 1 else 2  # guidance takes two calls a step
    ways = {
        f"teacher, {full} steps": (full * twice, lambda x_T, y: solve(teacher, about, x_T, y, full)[1]),
        f"teacher, {S} steps": (S * twice, lambda x_T, y: solve(teacher, about, x_T, y, S)[1]),
        f"{name}, {S} steps": (S, lambda x_T, y: few_step(student, about, x_T, y)),
    }
    if about["model"]["history_layers"] and about["model"]["history"] != "none" and S > 1:
        ways[f"{name}, history shuffled"] = (S, lambda x_T, y: few_step(student, about, x_T, y, shuffle=True))
    return ways


def compare(teacher, student, about: dict, device, bf16=False, name="student", repeats=3):
    """Run the `methods` from the same held-out noises and labels: 256, or of latents, whose networks are large, 64.
    Returns (rows, states, y): rows {name: {"calls", "error", "ms"}}, the mean squared error to the teacher's full-step
    image and the milliseconds an image, the median of interleaved repeats; states {name: (b, s + 1, c, h, w)}; labels
    (b,)."""
    count = 64 if about["model"]["channels"] == 4 else 256
    x_T, y = data.noise_and_labels(about, HELD_OUT, range(count))
    x_T, y = x_T.to(device), y.to(device)
    ways = methods(teacher, student, about, name)
    states, seconds = {}, {name: [] for name in ways}
    for name in Progress("comparing", list(ways) * repeats, unit="runs"):
        synchronise(device)
        began = time.perf_counter()
        with autocast(device, bf16):
            states[name] = ways[name][1](x_T, y)
        synchronise(device)
        seconds[name].append(time.perf_counter() - began)
    target = next(iter(states.values()))[:, -1]
    rows = {name: dict(calls=calls, error=(states[name][:, -1] - target).square().mean().item(),
                       ms=1000 * statistics.median(seconds[name]) / count) for name, (calls, _) in ways.items()}
    return rows, states, y


def table(rows: dict[str, dict], columns: dict[str, str]) -> str:
    """Rows {name: {column: value}} as text; `columns` gives each column's format. A value that is not there is left
    blank."""
    def text(row, key):
        return format(row[key], columns[key]) if row.get(key) is not None else ""

    width = max(map(len, rows)) + 2
    cell = {key: max(len(key), 9, *(len(text(row, key)) for row in rows.values())) + 2 for key in columns}
    lines = [" " * width + "".join(f"{key:>{cell[key]}}" for key in columns)]
    for name, row in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{text(row, key):>{cell[key]}}" for key in columns))
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------------------

def figure(rows: dict[str, torch.Tensor], out: Path, y):
    """Draw trajectories {name: (b, s + 1, c, h, w)}, all from the same noises and labels y (b,): for each name a row of
    the first 16 final images or, of points, a panel with the first 100 paths in the plane."""
    from matplotlib.figure import Figure  # not pyplot: nothing to choose, nothing to close

    points = next(iter(rows.values())).shape[-1] == 1
    rows = {name: states[: 100 if points else 16] for name, states in rows.items()}
    first = next(iter(rows.values()))
    if points:
        page = Figure((3.4 * len(rows), 3.8), layout="tight")
        axes = page.subplots(1, len(rows), squeeze=False)
        real = data.load("points", 1, count=1500).images[:, :, 0, 0]
        target = rearrange(first[:, -1].cpu(), "b xy 1 1 -> b xy")
        for axis, (name, states) in zip(axes[0], rows.items(), strict=True):
            axis.scatter(*real.T, s=2, color="0.85", zorder=0)
            for path, label, goal in zip(states[..., 0, 0].cpu(), y.tolist(), target, strict=False):
                axis.plot(*path.T, color=f"C{label}", linewidth=0.7, alpha=0.35, marker=".", markersize=2)
                axis.plot(*path[-1], "o", color=f"C{label}", markersize=3.5)
                axis.plot(*torch.stack([path[-1], goal]).T, color="red", linewidth=2, solid_capstyle="butt")
            axis.set(title=name, aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[])
    else:
        page = Figure((10, 10.4 / len(first) * len(rows)), layout="tight")
        axes = page.subplots(len(rows), 1, squeeze=False)
        for axis, (name, states) in zip(axes[:, 0], rows.items(), strict=True):
            axis.imshow(data.grid(states[:, -1], columns=len(states)))
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    page.savefig(writable(out), dpi=110)


# ---- the program ----------------------------------------------------------------------------------------------------

def parse_labels(words: list[str], classes: list[str]) -> list[int]:
    """Class names or numbers to numbers. Raises Fault for what is neither."""
    labels = []
    for word in words:
        label = classes.index(word) if word in classes else int(word) if word.isdecimal() else -1
        if not 0 <= label < len(classes):
            names = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise Fault(f"no class {word!r}: give numbers from 0 to {len(classes) - 1}, or names ({names})")
        labels.append(label)
    return labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=ASSETS / "shapes-student.pt", help="student or teacher (.pt)")
    add("--count", type=positive, default=64, help="images (default: 64)")
    add("--labels", nargs="+", metavar="CLASS", help="names or numbers of classes, in turn (default: random)")
    add("--seed", type=whole, default=0,
        help="same seed, same images, at any --batch; from no noise that a student has learned from (default: 0)")
    add("--steps", type=positive, help="a teacher's Euler steps (default: its own; a student has its fixed number)")
    add("--guidance", type=strength, help="a teacher's guidance (default: its own; a student has it built in)")
    add("--out", type=Path, default=Path("runs/samples"), help="folder for the results (default: runs/samples)")
    add("--png", action="store_true", help="also write every image as a PNG of its own")
    add("--npz", action="store_true", help="also write samples.npz: arr_0, uint8, (count, h, w, c)")
    add("--trajectory", action="store_true", help="also draw the way there, for the first eight images")
    add("--batch", type=positive, default=256, help="images at a time (default: 256)")
    add("--vae", default=data.VAE, help=f"for latents: the autoencoder, a folder or a hub's name (default: {data.VAE})")
    machine_flags(add)
    args = parser.parse_args()

    device, out = pick_device(args.device), make_folder(args.out)
    model, about = load_network(args.checkpoint, ("student", "teacher"), device)
    student, given = about["kind"] == "student", {key: getattr(args, key) for key in ("steps", "guidance")}
    given = {key: value for key, value in given.items() if value is not None}
    if student and given:
        raise Fault("--steps and --guidance are for teachers: a student has both built in")
    if about["model"]["image_size"] == 1:
        raise Fault("points are not pictures: evaluate.py draws them in the plane")
    about |= given
    chosen = parse_labels(args.labels, about["classes"]) if args.labels else None

    vae = data.load_vae(args.vae, device) if model.channels == 4 else None

    def to_pixels(x):
        return vae.decode(x / data.SCALE).sample if vae else x

    def states_of(indices):
        x_T, y = data.noise_and_labels(about, FRESH + args.seed, indices)
        if chosen:
            y = torch.tensor([chosen[i % len(chosen)] for i in indices])
        with autocast(device, args.bf16):
            x_T, label = x_T.to(device), y.to(device)
            return few_step(model, about, x_T, label) if student else solve(model, about, x_T, label)[1], y

    def images_of(indices):
        states, y = states_of(indices)
        images = [data.to_uint8(to_pixels(part)) for part in states[:, -1].split(16)]
        return indices, np.concatenate(images), y.tolist()

    if args.png and rank() == 0:  # an earlier run's would be taken for this one's
        for file in (out / "images").glob("[0-9]*-*.png"):
            file.unlink()
    wait_for_all()
    shown = []

    def batches():  # all the images, on rank 0; on the way, the first hundred are kept and --png is done
        together = args.batch * world()
        for start in Progress("batches", range(0, args.count, together), unit="images", weight=together):
            mine = range(args.count)[start + rank() * args.batch :][: args.batch]
            for indices, images, labels in gather([images_of(mine)] if mine else []):
                shown.extend(images[: 100 - len(shown)])
                for i, image, label in zip(indices, images, labels, strict=True) if args.png else ():
                    file = writable(out / "images" / f"{i:05d}-{about['classes'][label]}.png")
                    Image.fromarray(image.squeeze()).save(file)
                yield images

    if args.npz and rank() == 0:
        write_npz(out / "samples.npz", args.count, batches())
    else:
        for _ in batches():
            pass
    if rank() > 0:
        return
    sheet = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 127.5 - 1
    data.grid(sheet, columns=math.ceil(math.sqrt(len(sheet)))).save(writable(out / "grid.png"))
    print(f"wrote {out / 'grid.png'}: {len(sheet)} of {args.count:,} images")
    if args.png:
        print(f"wrote {args.count:,} images into {out / 'images'}")
    if args.npz:
        print(f"wrote {out / 'samples.npz'}")
    if args.trajectory:
        first, _ = states_of(range(min(8, args.count)))
        rows = [first]
        if not student or about["output"] == "direction":
            times = torch.tensor(about["times"]) if student else PATHS[about["path"]].grid(about["steps"])
            rows.append(seen(about, first, times.to(device)))
        sheet = rearrange(torch.cat(rows, 1), "b s c h w -> (s b) c h w")
        sheet = torch.cat([to_pixels(part).cpu() for part in sheet.split(16)])
        data.grid(sheet, columns=len(first)).save(writable(out / "trajectory.png"))
        print(f"wrote {out / 'trajectory.png'}: a column an image; rows: {first.shape[1]} states, noise first"
              + (f", then the {first.shape[1] - 1} clean images that the steps aimed at" if len(rows) > 1 else ""))


if __name__ == "__main__":
    command(main)
