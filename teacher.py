"""The teacher: a diffusion model, the ODE that it defines, and how it is trained.

A *noise path* mixes an image x_0 with Gaussian noise ε,

    x_t = α(t)·x_0 + σ(t)·ε                                                          (noise path)

from the image itself (α = 1, σ = 0) to noise x_T, pure or almost so. A network is given x_t, a
class label and t. Its output, v or ε, implies an estimate of the image and the noise that were
mixed, (x̂_0, ε̂), such that x_t = α(t)·x̂_0 + σ(t)·ε̂ (see `estimate`). These estimates define the
*probability-flow ODE*

    dx/dt = dα/dt · x̂_0(x, t) + dσ/dt · ε̂(x, t)                                             (ODE)

whose solution carries each noise x_T to one image. An Euler step from the time t to the time t_next
keeps the estimates of time t and moves along the noise path:

    x_next = α(t_next)·x̂_0 + σ(t_next)·ε̂                                             (Euler step)

Why is it an Euler step? Where α > 0, divide by α, and write z = x/α and r = σ/α. Then the noise
path is z = x̂_0 + r·ε̂, the ODE is dz/dr = ε̂, and the step is z_next = z + (r_next − r)·ε̂, which
is Euler's method in r. This one formula serves every teacher, since only α and σ differ. For flow
matching it equals x + (t_next − t)·v with the velocity v = ε̂ − x̂_0, also at t = 1, where α = 0.
For DDPM it *is* the DDIM step (arXiv 2010.02502).

Two words to keep apart: a *time* t is a place on the noise path; a *timestep* is the number that
stands for t in the network's input. For flow matching, t runs from 1 to 0 and the timestep is
1000·t, since the sinusoids that embed it are made for the range 0 … 1000.

    python teacher.py --preset points              trains a teacher, into runs/points/teacher.pt
    python teacher.py --preset cifar10 --data DIR  the same on your own images, DIR/<class>/*.png
"""

import startup  # noqa: F401  before the large packages

import argparse
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

import data
from command_line import add_training_flags, make_parser, non_negative, positive_int, run_program
from config import ODE, PRESETS, ModelConfig, Preset, TeacherRecord, override_parts, parse_size
from files import UserError, output_file
from machine import Runtime, rank, runtime_from
from model import DiT
from training import train

LABEL_DROPOUT = 0.1  # fraction of labels replaced by the null class in training, for guidance

# ---- 1. Noise paths ------------------------------------------------------------------------------


class FlowMatching:
    """Straight lines from image to noise (arXiv 2210.02747, 2209.03003): α = 1 − t, σ = t, so that
    v = dx/dt = ε − x_0."""

    t_noise, t_image = 1.0, 0.0  # the two ends of the path

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def timestep(self, t):
        """The timestep that the network is given for the time t."""
        return 1000 * t

    def times(self, euler_steps: int) -> torch.Tensor:
        """The times from noise to image, (euler_steps + 1,). Each Euler step leads from one to the
        next."""
        return torch.linspace(self.t_noise, self.t_image, euler_steps + 1)

    def draw_times(self, count: int, rng: np.random.Generator, logit_mean: float) -> torch.Tensor:
        """Training times, logit-normal: most of them in the middle, where the task is hardest
        (Stable Diffusion 3, arXiv 2403.03206). A mean above 0 moves them towards noise."""
        normal = torch.from_numpy(rng.standard_normal(count, dtype=np.float32))
        return torch.sigmoid(normal + logit_mean)


class DDPM:
    """1000 steps with a linear β from 1e-4 to 0.02 (arXiv 2006.11239), as in the public DiT:
    α = √ᾱ, σ = √(1 − ᾱ). Times are the integers 0 … 999, and timesteps are the same numbers. A
    state at time 0 has a little noise; the image itself, x_0, has the time −1, where ᾱ = 1."""

    t_noise, t_image = 999, -1

    @staticmethod
    @lru_cache
    def tables(device: torch.device):
        """α and σ at t = −1, 0, …, 999. (Cached for each device: in training, a CUDA graph is
        recorded, which may not contain copies from the CPU.)"""
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        of_image = torch.ones(1, dtype=torch.float64)
        alpha_bar = torch.cat([of_image, torch.cumprod(1 - beta, dim=0)])
        return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)

    def alpha(self, t):
        t = torch.as_tensor(t)
        alpha, _ = self.tables(t.device)
        return alpha.take(t.long() + 1)

    def sigma(self, t):
        t = torch.as_tensor(t)
        _, sigma = self.tables(t.device)
        return sigma.take(t.long() + 1)

    def timestep(self, t):
        return t

    def times(self, euler_steps: int) -> torch.Tensor:
        """The times of the public code: evenly spaced numbers from 999 to 0, rounded to integers
        (halves to even ones), then −1."""
        integers = torch.linspace(self.t_noise, 0, euler_steps, dtype=torch.float64).round()
        return torch.cat([integers, torch.tensor([self.t_image])]).float()

    def draw_times(self, count: int, rng: np.random.Generator, logit_mean: float) -> torch.Tensor:
        """Training times, uniform. (`logit_mean` is for flow matching.)"""
        return torch.from_numpy(rng.integers(0, 1000, count).astype(np.float32))


class SiT(FlowMatching):
    """Flow matching as in the public SiT: its network is given 1 − t, 0 for noise, 1 for images."""

    def timestep(self, t):
        return 1 - t


class REPA(FlowMatching):
    """Flow matching as in the public REPA: its network is given t itself."""

    def timestep(self, t):
        return t


NOISE_PATHS = {"flow": FlowMatching(), "ddpm": DDPM(), "sit": SiT(), "repa": REPA()}


def mixing_weights(ode: ODE, t, device):
    """α(t) and σ(t) of an ODE's noise path, with three axes added so that they multiply images,
    (…, c, h, w)."""
    path = NOISE_PATHS[ode.noise_path]
    t = torch.as_tensor(t, device=device)
    alpha = rearrange(path.alpha(t), "... -> ... 1 1 1")
    sigma = rearrange(path.sigma(t), "... -> ... 1 1 1")
    return alpha, sigma


def add_noise(ode: ODE, images, noise, t):
    """x_t = α(t)·x_0 + σ(t)·ε. images and noise: (…, c, h, w); t: a time for each, or for all."""
    alpha, sigma = mixing_weights(ode, t, images.device)
    return alpha * images + sigma * noise


# ---- 2. From a network's output to the next state ------------------------------------------------


def estimate(ode: ODE, output, x, t):
    """The image and the noise, (x̂_0, ε̂), that the network's output at (x, t) implies. They solve
    two equations. The first is x = α·x_0 + σ·ε, and the second says what the network predicts:

        predicts = "v":      output = ε − x_0, the velocity of flow matching. (Other papers write v
                             for α·ε − σ·x_0.)
        predicts = "eps":    output = ε

    x and output: (…, c, h, w); t: a time for each, or one for all."""
    alpha, sigma = mixing_weights(ode, t, x.device)
    if ode.predicts == "v":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    return (x - sigma * output) / alpha, output


def euler_step(ode: ODE, output, x, t, t_next):
    """x_next = α(t_next)·x̂_0 + σ(t_next)·ε̂: one Euler step of the ODE. x: (…, c, h, w)."""
    x0, eps = estimate(ode, output, x, t)
    return add_noise(ode, x0, eps, t_next)


def guided_output(model, ode: ODE, x, timestep, y):
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale·(cond − uncond). Unless the
    scale is 1, it evaluates the network twice for each sample, as one batch of double size.
    x: (b, c, h, w); timestep: (); y: (b,). The public DiT guides three of four channels only
    (ode.guided_channels)."""
    def run(x, y):
        output = model(rearrange(x, "b c h w -> b 1 c h w"), timestep[None], y)
        return rearrange(output, "b 1 c h w -> b c h w").float()

    if ode.guidance_scale == 1:
        return run(x, y)
    null = torch.full_like(y, model.null_class)
    cond, uncond = run(torch.cat([x, x]), torch.cat([y, null])).chunk(2)
    guided = uncond + ode.guidance_scale * (cond - uncond)
    if ode.guided_channels is None:
        return guided
    return torch.cat([guided[:, : ode.guided_channels], cond[:, ode.guided_channels :]], dim=1)


@torch.no_grad()
def solve(model, ode: ODE, x_T, y, keep=None):
    """Solve the ODE from noise to image. x_T: (b, c, h, w); y: (b,).

    `keep`: the Euler steps, counted from 1, after which a state is kept (default: all). If these
    are m steps, it returns

        states    (b, m + 1, c, h, w)   x_T, then the state after each of these steps
        x0        (b, m, c, h, w)       the clean prediction x̂_0 from which each was computed

    After the last step α = 1 and σ = 0, so that state and prediction are the same image."""
    path = NOISE_PATHS[ode.noise_path]
    times = path.times(ode.euler_steps).to(x_T.device)
    keep = range(1, ode.euler_steps + 1) if keep is None else keep
    x, states, predictions = x_T, [x_T], []
    for k in range(ode.euler_steps):
        output = guided_output(model, ode, x, path.timestep(times[k]), y)
        x0, eps = estimate(ode, output, x, times[k])
        x = add_noise(ode, x0, eps, times[k + 1])                           # the Euler step
        if k + 1 in keep:
            states.append(x)
            predictions.append(x0)
    return torch.stack(states, dim=1), torch.stack(predictions, dim=1)


# ---- 3. Training ---------------------------------------------------------------------------------


def teacher_loss(model, ode: ODE, images, y, t, noise):
    """‖ output − target ‖², where the target is v = ε − x_0 or ε. images and noise: (b, c, h, w);
    y: (b,) labels; t: (b,) times of the noise path."""
    x = add_noise(ode, images, noise, t)
    target = noise - images if ode.predicts == "v" else noise
    timesteps = NOISE_PATHS[ode.noise_path].timestep(t)
    output = model(x[:, None], timesteps[:, None], y)[:, 0]                 # one state each
    return (output.float() - target).square().mean()


def check_ode(ode: ODE):
    """Raises UserError for a prediction that cannot work on its noise path."""
    path = NOISE_PATHS[ode.noise_path]
    if ode.predicts == "eps" and path.alpha(path.t_noise) == 0:
        raise UserError(
            "on this noise path x_T is noise alone, so a prediction of ε says nothing of the "
            "image: use --predicts v, or --noise-path ddpm"
        )


def make_teacher(preset: Preset, dataset: data.Dataset) -> tuple[DiT, TeacherRecord]:
    """A fresh network for a data set, and the record that its checkpoint will hold."""
    check_ode(preset.ode)
    torch.manual_seed(preset.teacher.seed)
    try:
        config = ModelConfig(
            image_size=preset.data.image_size,
            channels=preset.data.channels,
            classes=len(dataset.classes),
            text_width=dataset.prompts.width if dataset.prompts else 0,
            **parse_size(preset.size),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    record = TeacherRecord(
        model=config,
        ode=preset.ode,
        data=preset.data,
        classes=tuple(dataset.classes),
        class_weights=dataset.class_weights,
        images=len(dataset),
        training=preset.teacher,
        content=dataset.content_key(),
    )
    model = DiT(config)
    model.prompts = dataset.prompts
    return model, record


def train_teacher(preset: Preset, file: Path, runtime: Runtime):
    """Train the teacher that a preset describes, into the checkpoint `file`. If it exists, its
    training is continued. Returns (the EMA of the teacher, its record)."""
    dataset = data.load(preset.data)
    model, record = make_teacher(preset, dataset)
    model.to(runtime.device)
    training, ode = record.training, record.ode

    def batch_at(iteration: int):
        rng = data.stream(training.seed, iteration)
        images, y = dataset.draw(training.batch, rng)
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        t = NOISE_PATHS[ode.noise_path].draw_times(len(y), rng, training.logit_mean)
        without_label = torch.from_numpy(rng.random(len(y)) < LABEL_DROPOUT)
        y = torch.where(without_label, model.null_class, y)
        return images, y, t, noise

    def loss_of(network, *batch):
        return teacher_loss(network, ode, *batch)

    def preview(ema, iteration: int):
        draw_samples(ema, record, file.with_suffix(".png"), runtime)

    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"training a teacher of {parameters / 1e6:.1f}M parameters: {training.iterations:,} "
        f"iterations of {training.batch} on {runtime.device} in {runtime.precision}, into {file}"
    )
    ema, _ = train("teacher", model, loss_of, batch_at, file, record, runtime, preview)
    return ema, record


def draw_samples(model, record: TeacherRecord, file: Path, runtime: Runtime):
    """Write a sheet of 80 of the teacher's images. With up to 80 classes they show ten of them in
    turn, or all, if there are fewer; with more, one image each of 80 classes. Nothing is written
    for latents and points, which are not pictures."""
    if record.model.channels not in (1, 3):
        return
    count, classes = 80, record.model.classes
    shown = min(classes, 10) if classes <= count else count
    spacing = classes // shown
    y = spacing * (torch.arange(count) % shown)
    x_T, _ = data.noise_and_labels(record, record.training.seed, range(count))
    with runtime.autocast():
        x_T, y = x_T.to(runtime.device), y.to(runtime.device)
        states, _ = solve(model, record.ode, x_T, y, keep=[record.ode.euler_steps])
    data.save_picture(data.image_grid(states[:, -1], columns=10), file)


# ---- 4. The program ------------------------------------------------------------------------------


def model_size(text: str) -> str:
    """For argparse: a name that config.parse_size knows."""
    try:
        parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="textures", help="sets everything (default: textures)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET)")
    add(
        "--data",
        dest="source",
        type=data.data_source,
        help="textures, shapes, points, scenes, or a folder: DIR/<class>/*.png, or DIR/*.png",
    )
    group = parser.add_argument_group("data and network")
    add = group.add_argument
    add("--image-size", type=positive_int, help="pixels a side; less where images are smaller")
    add("--channels", type=int, choices=(1, 3), help="1 for grey images, 3 for colour")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror training images at random (default: no)",
    )
    add(
        "--size",
        type=model_size,
        help="network, as SIZE/PATCH with a size of N, T, XS, S, B, L or XL, such as T/4",
    )
    group = parser.add_argument_group("ODE")
    add = group.add_argument
    add("--noise-path", choices=("flow", "ddpm"), help="flow matching, or DDPM")
    add("--predicts", choices=("v", "eps"), help="what the network predicts")
    add("--guidance-scale", type=non_negative, help="of classifier-free guidance; 1 is none")
    add("--euler-steps", type=positive_int, help="of the ODE solver")
    add_training_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    preset = override_parts(PRESETS[flags.preset], flags, "data", "ode", "teacher")
    preset = replace(preset, size=flags.size or preset.size)
    preset = data.fit_to_images(preset, flags)
    runtime = runtime_from(flags, preset.bf16, preset.checkpointing)
    folder = flags.out or Path("runs") / flags.preset
    file = output_file(folder / "teacher.pt")
    ema, record = train_teacher(preset, file, runtime)
    if rank() > 0:
        return
    print(f"wrote {file}")
    draw_samples(ema, record, file.with_suffix(".png"), runtime)


if __name__ == "__main__":
    run_program(main)
