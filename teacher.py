"""The teacher: a diffusion model, the ODE it defines, and the trajectories that a student will learn.

A *noise path* mixes an image with noise, x_t = α(t)·x_0 + σ(t)·ε, from a clean image to (almost) pure noise x_T. A
network that has seen x_t, t and a label estimates the pair (x̂_0, ε̂) behind it. Moving a little towards less noise,

    x_{t'} = α(t')·x̂_0 + σ(t')·ε̂                                                                          (Euler)

is one Euler step of the probability-flow ODE, whatever the path. In the coordinates x/α against σ/α it is Euler's
method to the letter (wherever α > 0); on the flow-matching path it equals x + (t' − t)·v; on DDPM's path it is the
DDIM step. So one solver serves all.

    python teacher.py --preset points                 trains a teacher, into runs/points/teacher.pt
    python teacher.py trajectories --preset shapes    solves its ODE from thousands of noises (distill.py does it too)
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import data
import public
from model import DiT, size
from presets import TEACHERS, choose
from training import (Fault, Progress, at_once, autocast, command, export, fingerprint, load_checkpoint, load_weights,
                      part_flag, pick_device, positive, precision, rank, recompute, strength, train, training_flags,
                      wait_for_all, writable)

MARKS = 8  # states kept of a trajectory, besides x_T: of 24 steps every third
ASSETS = Path(__file__).parent / "assets"


# ---- 1. Noise paths -------------------------------------------------------------------------------------------------
# A path is α and σ as functions of its time, and that time's ends: T (noise) and `clean`.
class FlowMatching:
    """Straight lines from image to noise (2210.02747; rectified flow, 2209.03003): α = 1 − t, σ = t."""
    T, clean = 1.0, 0.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def told(self, t):
        """The time as the network hears it: 0 … 1000, where its sinusoids tell times apart."""
        return 1000 * t

    def grid(self, steps: int) -> torch.Tensor:
        """(steps + 1,) times from T to clean."""
        return torch.linspace(self.T, self.clean, steps + 1)

    def draw(self, count: int, rng: np.random.Generator) -> torch.Tensor:
        """Training times, logit-normal: most of them in the middle, where the task is hardest (SD3, 2403.03206)."""
        return torch.sigmoid(torch.from_numpy(rng.standard_normal(count, dtype=np.float32)))


class DDPM:
    """1000 steps of linear β, 1e-4 … 0.02 (Ho et al. 2006.11239), as in the public DiT: α = √ᾱ, σ = √(1 − ᾱ).
    t is the integer 0 … 999; `clean` is t = −1, before the first noise, where ᾱ = 1."""
    T, clean = 999, -1

    def __init__(self):
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), kept])  # ᾱ of t = −1, 0, …, 999

    def _at(self, table, t):
        t = torch.as_tensor(t)
        return torch.take(table.float().to(t.device), t.long() + 1)

    def alpha(self, t):
        return self._at(self.alpha_bar.sqrt(), t)

    def sigma(self, t):
        return self._at((1 - self.alpha_bar).sqrt(), t)

    def told(self, t):
        return t

    def grid(self, steps: int) -> torch.Tensor:
        """(steps + 1,): `steps` integers evenly over 999 … 0, halves to even as in the public code, then `clean`."""
        steps = torch.linspace(self.T, 0, steps, dtype=torch.float64).round()
        return torch.cat([steps, torch.tensor([self.clean])]).float()

    def draw(self, count, rng):
        return torch.from_numpy(rng.integers(0, 1000, count).astype(np.float32))


PATHS = {"flow": FlowMatching(), "ddpm": DDPM()}


# ---- 2. From a network's output to the next state -------------------------------------------------------------------

def over(t, x):
    """Values for times (), (b,), (s,) or (b, s) with three axes added, to go with images (…, c, h, w)."""
    return torch.as_tensor(t, device=x.device)[..., None, None, None]


def estimate(path, predicts: str, output, x, t):
    """What the network's output at (x, t) says of the image and the noise: (x̂_0, ε̂), from x = α·x_0 + σ·ε and

        "v": v = ε − x_0, flow matching's velocity    "eps": ε    "x0": x_0
    """
    alpha, sigma = over(path.alpha(t), x), over(path.sigma(t), x)
    if predicts == "v":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    if predicts == "eps":
        return (x - sigma * output) / alpha, output
    return output, (x - alpha * output) / sigma


def euler(path, x0, eps, t_next):
    """x_{t'} = α(t')·x̂_0 + σ(t')·ε̂: one Euler step of the probability-flow ODE."""
    return over(path.alpha(t_next), x0) * x0 + over(path.sigma(t_next), x0) * eps


def advance(about: dict, output, x, t, t_next):
    """A student's output as its next state. about["output"] says what the student puts out:

        "state"      the next state itself, as in the paper
        "direction"  what its teacher predicts (v, say), with which it takes the Euler step from t to t_next. With the
                     teacher's weights and no history, it starts as the unguided teacher taking few steps.
    """
    if about["output"] == "state":
        return output
    path = PATHS[about["path"]]
    return euler(path, *estimate(path, about["predicts"], output, x, t), t_next)


def guided(model, x, t, y, guidance: float, channels: int | None = None):
    """Classifier-free guidance (2207.12598): uncond + s·(cond − uncond), in one batch. x (b, c, h, w), t (), y (b,).
    The public DiT guides the first three latent `channels` only."""
    if guidance == 1:
        return model(x[:, None], t[None], y)[:, 0]
    null = torch.full_like(y, model.null_class)
    cond, uncond = model(torch.cat([x, x])[:, None], t[None], torch.cat([y, null]))[:, 0].chunk(2)
    mixed = uncond + guidance * (cond - uncond)
    return mixed if channels is None else torch.cat([mixed[:, :channels], cond[:, channels:]], dim=1)


@torch.no_grad()
def solve(model, about: dict, x_T, y, steps: int | None = None, marks=None):
    """The ODE from noise to image, in Euler steps with guidance: `steps` of them (default: the teacher's own number).

    x_T: (b, c, h, w); y: (b,). Returns what is seen at x_T and at the m `marks` (numbers of steps done; default: all):
    times (m + 1,); states (b, m + 1, c, h, w), x_T first and the image last; clean (b, m, c, h, w), the prediction x̂_0
    from which the step that ends at the mark was taken. At the last mark, state and x̂_0 are equal."""
    path, steps = PATHS[about["path"]], steps or about["steps"]
    grid = path.grid(steps).to(x_T.device)
    marks = range(1, steps + 1) if marks is None else marks
    x, states, clean = x_T, [x_T], []
    for k in range(steps):
        output = guided(model, x, path.told(grid[k]), y, about["guidance"], about.get("guided_channels")).float()
        x0, eps = estimate(path, about["predicts"], output, x, grid[k])
        x = euler(path, x0, eps, grid[k + 1])
        if k + 1 in marks:
            states.append(x)
            clean.append(x0)
    return grid[[0, *marks]], torch.stack(states, 1), torch.stack(clean, 1)


# ---- 3. Training a teacher ------------------------------------------------------------------------------------------

def teacher_loss(model, about, images, y, t, noise, dropped):
    """The network learns what produced a noisy image: || output − target ||², with the target v, ε or x_0. Where
    `dropped` is true the label is replaced by the null class, which is what guidance subtracts later. t: (b,)."""
    path = PATHS[about["path"]]
    x = over(path.alpha(t), images) * images + over(path.sigma(t), images) * noise
    target = {"v": noise - images, "eps": noise, "x0": images}[about["predicts"]]
    y = torch.where(dropped, about["model"]["classes"], y)
    output = model(x[:, None], path.told(t)[:, None], y)[:, 0]
    return (output.float() - target).square().mean()


def train_teacher(preset: dict, out: Path, device, seed=0):
    """Train the teacher that a preset describes; returns (model, about). Continues what is at `out`."""
    path, source = PATHS[preset["path"]], preset["data"]
    if preset["predicts"] == "eps" and path.alpha(path.T) == 0:
        raise Fault("x_T is noise alone on this path, and ε̂ cannot tell x_0 from it: use --predicts v, or --path ddpm")
    if source is None:
        raise Fault("this preset needs images: --data ROOT, a folder with ROOT/<class>/*.png (or jpg, jpeg, webp)")
    dataset = data.load(source, preset["image_size"], preset["channels"], preset["flip"])
    channels, image_size, _ = dataset.shape
    if (channels, image_size) != (preset["channels"], preset["image_size"]):
        raise Fault(f"{source} has images of {channels} channels and {image_size} pixels: choose another preset")
    torch.manual_seed(seed)
    try:
        config = dict(image_size=image_size, channels=channels, classes=len(dataset.classes), **size(preset["size"]))
        model = DiT(**config)
    except ValueError as error:
        raise Fault(str(error)) from None
    fit = {key: preset[key] for key in ("iterations", "batch", "lr", "decay")}
    how = {key: preset[key] for key in ("bf16", "accumulate", "compile", "schedule")}
    solver = {key: preset[key] for key in ("path", "predicts", "guidance", "guided_channels", "steps")}
    about = dict(kind="teacher", model=config, **solver, data=str(Path(source)), classes=dataset.classes,
                 training=dict(**fit, flip=dataset.flip, images=len(dataset), seed=seed))
    model.to(device)
    model.checkpointing = recompute(preset, model, 1, device)

    def batch_of(step):
        rng = data.stream(seed, step)
        images, y = dataset.draw(fit["batch"], rng)
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        return images, y, path.draw(len(y), rng), noise, torch.from_numpy(rng.random(len(y)) < 0.1)

    print(f"training a teacher on {source}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
          f"{fit['iterations']:,} iterations of {fit['batch']} on {device} in "
          f"{precision(device, preset['bf16'])}, into {out}")
    average, _ = train("teacher", model, batch_of, lambda model, *batch: teacher_loss(model, about, *batch),
                       out, about, **fit, warmup=fit["iterations"] // 20, **how)
    return average, about


def load_network(path, kind, device="cpu"):
    """The averaged model of a checkpoint, ready to use, and its `about`. Raises Fault (see load_checkpoint)."""
    path = Path(path)
    if (path / "config.json").exists() or (path / "transformer").is_dir():
        if kind == "student":
            raise Fault(f"{path} holds a teacher, and a student is needed")
        checkpoint = public.adapt(public.from_diffusers(path), path)
    else:
        checkpoint = load_checkpoint(path, kind, foreign=public.adapt)
    about = checkpoint["about"]
    try:
        model, end = DiT(**about["model"]), about.get("refined", about["training"])["iterations"]
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"{path} describes no network that is known here: {error}") from None
    if checkpoint.get("step", end) < end:
        print(f"note: the training of {path} is not finished (step {checkpoint['step']:,} of {end:,})")
    load_weights(model, checkpoint["ema"], path)
    return model.float().to(device).eval().requires_grad_(False), about


# ---- 4. Trajectories for a student ----------------------------------------------------------------------------------

def write_trajectories(model, about: dict, folder: Path, count: int, device, bf16=False, seed=0,
                       marks=None, keep="both", part=(0, 1)):
    """Solve the teacher's ODE from `count` noises (rounded up to whole shards) and keep what is seen at the `marks`,
    numbers of steps done (default: MARKS evenly): "states", "clean" predictions or "both" (`keep`). Shards that are
    there already are kept; `part` (i, k): only every k-th from the i-th on. Raises Fault when the folder holds other
    trajectories or other files."""
    steps = about["steps"]
    if not marks and steps % MARKS:
        raise Fault(f"{MARKS} states of a trajectory are kept: the teacher's --steps must be a multiple of {MARKS}, "
                    f"which {steps} is not (teacher.py trajectories)")
    if marks and (sorted(set(marks)) != list(marks) or marks[0] < 1 or marks[-1] != steps):
        raise Fault(f"marks are rising numbers of the teacher's steps, the last of them {steps}, which "
                    f"{' '.join(map(str, marks))} are not: give others, teacher.py trajectories --marks")
    marks = marks or [steps * (j + 1) // MARKS for j in range(MARKS)]
    times = PATHS[about["path"]].grid(steps)[[0, *marks]].tolist()
    meta = dict(teacher=fingerprint(model.state_dict()), steps=steps, marks=list(marks), times=times,
                path=about["path"], guidance=about["guidance"], guided_channels=about.get("guided_channels"),
                keep=keep, shape=data.image_shape(about), seed=seed)
    todo = data.start_shards(folder, meta, count, part)
    for i in Progress("shards of trajectories", todo, unit="trajectories", weight=data.SHARD):
        x_T, y = data.noise_and_labels(about, seed, range(i * data.SHARD, (i + 1) * data.SHARD))
        parts = zip(*(tensor.to(device).split(at_once(device)) for tensor in (x_T, y)), strict=True)
        with autocast(device, bf16):
            _, states, clean = zip(*[solve(model, about, *part, marks=marks) for part in parts], strict=True)
        columns = dict(states=torch.cat(states), clean=torch.cat(clean))
        kept = {name: x[:, :data.record(meta)[name].shape[0]].half() for name, x in columns.items()}
        data.write_shard(folder, meta, i, label=y, **kept)
    wait_for_all()


# ---- The program ----------------------------------------------------------------------------------------------------

def find_teacher(path: Path | None, preset: str, run: Path, device):
    """The teacher at `path`, or else the one trained into the folder `run`, or else the one that ships with the
    repository; (model, about). Raises Fault when there is none."""
    shipped = ASSETS / f"{preset}-teacher.pt"
    path = path or (run / "teacher.pt" if (run / "teacher.pt").exists() or not shipped.exists() else shipped)
    if not path.exists():
        raise Fault(f"no teacher at {path}: name one with --teacher, or train it: python teacher.py --preset {preset}")
    model, about = load_network(path, "teacher", device)
    print(f"teacher: {path}")
    return model, about


# Flags that one of the two jobs alone has a use for.
TRAINING = ("data", "size", "image_size", "channels", "flip", "path", "predicts", "iterations", "batch", "lr",
            "checkpointing", "accumulate", "compile", "export")
WRITING = ("marks", "keep", "teacher", "count", "part")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("job", nargs="?", choices=("train", "trajectories"), default="train", help="what to do (default: train)")
    add("--preset", choices=TEACHERS, default="shapes", help="sets everything; flags override it (default: shapes)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET)")
    add("--data", help="shapes, points, or a folder of images ROOT/<class>/*.png")
    add("--size", help="network, as SIZE/PATCH: N, T, S, B, L or XL, such as T/4")
    add("--image-size", type=positive, help="pixels of an image's side")
    add("--channels", type=int, choices=(1, 3), help="1 for grey images, 3 for colour")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror training images at random")
    add("--path", choices=PATHS, help="noise path")
    add("--predicts", choices=("v", "eps", "x0"), help="what the network predicts")
    add("--guidance", type=strength, help="strength of classifier-free guidance in the ODE; 1 is none")
    add("--guided-channels", type=positive, metavar="K", help="guide the first K channels only (default: all)")
    add("--steps", type=positive, help="Euler steps of the ODE")
    add("--marks", type=positive, nargs="+", help="trajectories: steps after which a state is kept (default: 8 times)")
    add("--keep", choices=("both", "states", "clean"), help="trajectories: what to keep of them (default: both)")
    add("--teacher", type=Path, help="trajectories: whose (default: the run's own teacher, or the shipped one)")
    add("--count", type=positive, help="trajectories: how many")
    part_flag(add)
    training_flags(add)
    args = parser.parse_args()
    for flag in WRITING if args.job == "train" else TRAINING:
        if getattr(args, flag) != parser.get_default(flag):
            raise Fault(f"--{flag.replace('_', '-')} has no meaning for this job, which is `teacher.py {args.job}`")
    device, run, preset = pick_device(args.device), args.out or Path("runs") / args.preset, choose(TEACHERS, args)
    if args.job == "trajectories":
        model, about = find_teacher(args.teacher, args.preset, run, device)
        given = {key: getattr(args, key) for key in ("guidance", "guided_channels", "steps")}
        about |= {key: value for key, value in given.items() if value is not None}
        write_trajectories(model, about, run / "trajectories", preset["count"], device, preset["bf16"], args.seed,
                           preset["marks"], preset["keep"], args.part)
        return
    out = writable(run / "teacher.pt")
    model, about = train_teacher(preset, out, device, args.seed)
    if rank() > 0:
        return
    if args.export:
        export(args.export, about, model.state_dict())
    if model.channels in (1, 3):
        y = torch.arange(80, device=device) % min(10, len(about["classes"]))
        x_T, _ = data.noise_and_labels(about, args.seed, range(80))
        _, states, _ = solve(model, about, x_T.to(device), y)
        data.grid(states[:, -1], columns=10).save(writable(run / "teacher.png"))
        print(f"wrote {run / 'teacher.png'}: its images of the first classes")


if __name__ == "__main__":
    command(main)
