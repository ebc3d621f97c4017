"""Sampling: images from a student in a few steps, or from a teacher in many.

The student's loop, `few_step`, is one half of the method; the loss in distill.py is the other. It
takes S steps. Each step reads the noise x_T and *all states that the student has made since*, not
only the last one (paper, Sec. 3.2):

    x̂_{τ_{s−1}} = G_θ( x_T, x̂_{τ_{S−1}}, …, x̂_{τ_s}, s, y ),        s = S, …, 1

where y is the label. The network is not given the number s, but the timestep of each state. (In
the shapes below, s is a number of states.)

The keys and values of earlier states are cached, so that each step costs one pass over one state.
The student needs no guidance: where its teacher was guided, the states that it has learned to make
contain the guidance. So an image takes S network evaluations. A teacher of 24 Euler steps takes 24,
or 48 with guidance, which needs two for each step.

In the code, `model` is the student's network, and `student` (config.Student) describes its S steps:
their times, the timesteps that the network is given, and what its output means.

    python sample.py                                 images from the shipped student, in four steps
    python sample.py assets/textures-teacher.pt      images from its teacher, in 24 steps
    python sample.py --labels 0 2 --draw-trajectory  two classes, and how the images came to be
    python sample.py --count 50000 --npz             samples.npz, from which FID is computed
    python sample.py --prompt "a red star left of a blue ring"      the student of scenes
    python sample.py runs/pixart256/student.pt --prompts DIR        prompts that text.py has encoded
"""

import startup  # noqa: F401  before the large packages

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import data
from command_line import (
    add_prompts_flag,
    add_teacher_kind,
    make_parser,
    non_negative,
    non_negative_int,
    positive_int,
    run_program,
)
from config import ODE, Student, StudentRecord, TeacherRecord, override
from files import UserError, output_folder
from latents import VAE, decode, load_vae
from machine import Progress, add_machine_flags, gather, rank, runtime_from, world_size
from model import KVCache
from pixart import use_prompts
from pretrained import ASSETS, load_network
from teacher import NOISE_PATHS, euler_step, mixing_weights, solve
from text import Prompts

SHEET = 100  # images in grid.png, or fewer

# ---- 1. The student's steps ----------------------------------------------------------------------


def student_times(student: Student) -> torch.Tensor:
    """The times on the noise path of x_T and of the S states that are a student's targets,
    (S + 1,). (With targets "x0", clean predictions stand in the places of these states.)
    student.target_steps are the numbers of the teacher's Euler steps after which they stand: with
    6, 12, 18 and 24 of 24 and flow matching, the times are 1, 3/4, 1/2, 1/4 and 0."""
    path = NOISE_PATHS[student.ode.noise_path]
    return path.times(student.ode.euler_steps)[[0, *student.target_steps]]


@lru_cache
def times_on(device: torch.device, student: Student):
    """student_times and the timesteps for the network, (S + 1,) and (S,), on a device. (Cached: in
    training, a CUDA graph is recorded, which may not contain copies from the CPU.)"""
    return student_times(student).to(device), torch.tensor(student.timesteps, device=device)


def next_state(student: Student, output, x, t, t_next):
    """The state that follows from the network's output at (x, t).

    student.output
        "state"         The output is the next state, as in the paper. A student starts from its
                        teacher's weights (distill.make_student). These predict v or ε, which it has
                        to unlearn first.
        "direction"     The output is what a teacher would predict, v or ε, and the next state is
                        the Euler step from t to t_next with it (ours). So at the start of its
                        training, a student without history equals its teacher without guidance, in
                        S Euler steps between the same times. It is allowed only where the student
                        reads states of the ODE (student.targets = "states"). With "x0" it reads
                        clean images instead (see distill.py), and an Euler step needs the noise
                        that a state contains.
    """
    if student.output == "state":
        return output
    return euler_step(student.ode, output, x, t, t_next)


@torch.no_grad()
def few_step(model, student: Student, x_T, y, steps: int | None = None):
    """A student's trajectory: x_T and the S states that it makes, of which the last is its image,
    (b, S + 1, c, h, w). x_T: (b, c, h, w); y: (b,). `steps`: stop after so many of the S."""
    times, timesteps = times_on(x_T.device, student)                        # (S + 1,), (S,)
    states, cache = [x_T], KVCache()
    for i in range(student.steps if steps is None else steps):  # the paper's s is S − i
        x = states[-1]                                                      # (b, c, h, w)
        # The network reads the last state only: the cache holds what it needs of those before.
        output = model(x[:, None], timesteps[i : i + 1], y, cache)[:, 0].float()
        states.append(next_state(student, output, x, times[i], times[i + 1]))
    return torch.stack(states, dim=1)


def predict_all(model, student: Student, states, y):
    """All steps of a student in one pass, which is how it is trained. states: the s ≤ S states that
    it reads, (b, s, c, h, w), x_T first. Returns the next state after each of them, in the same
    shape. Given the first S states that `few_step` returns, it returns the last S, up to
    rounding."""
    s = states.shape[1]
    times, timesteps = times_on(states.device, student)                     # (S + 1,), (S,)
    output = model(states, timesteps[:s], y).float()                        # (b, s, c, h, w)
    return next_state(student, output, states, times[:s], times[1 : s + 1])


def implied_x0(ode: ODE, states, times):
    """The clean image at which each step of a trajectory aimed, (b, s, c, h, w), from s + 1 states
    and their times. An Euler step keeps x̂_0 and ε̂, so that x = α·x̂_0 + σ·ε̂ before it and
    x_next = α_next·x̂_0 + σ_next·ε̂ after it; these are solved for x̂_0. It shows how details
    appear step by step, where the states themselves are noisy. (Where a student puts out states, it
    is the x̂_0 of the Euler step that would make the same move.)"""
    alpha, sigma = mixing_weights(ode, times, states.device)                # (s + 1, 1, 1, 1)
    alpha_next, sigma_next = alpha[1:], sigma[1:]
    alpha, sigma = alpha[:-1], sigma[:-1]
    x, x_next = states[:, :-1], states[:, 1:]
    return (sigma * x_next - sigma_next * x) / (sigma * alpha_next - sigma_next * alpha)


# ---- 2. The program ------------------------------------------------------------------------------


def sample_states(model, record: StudentRecord | TeacherRecord, x_T, y):
    """All states from noise to image, (b, …, c, h, w): S + 1 of a student; of a teacher, one more
    than its Euler steps."""
    if isinstance(record, StudentRecord):
        return few_step(model, record.student, x_T, y)
    states, _ = solve(model, record.ode, x_T, y)
    return states


def parse_labels(words: list[str], classes: tuple[str, ...]) -> list[int]:
    """Names or numbers of classes to numbers. Raises UserError for anything else."""
    labels = []
    for word in words:
        label = int(word) if word.isdecimal() and len(word) < 10 else -1
        if word in classes:
            label = classes.index(word)
        if not 0 <= label < len(classes):
            names = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            last = len(classes) - 1
            raise UserError(f"no class {word!r}: give numbers from 0 to {last}, or names ({names})")
        labels.append(label)
    return labels


def write_png_files(folder: Path, indices, images: np.ndarray, names: list[str]):
    """images: (b, h, w, c), uint8."""
    for i, image, name in zip(indices, images, names, strict=True):
        file = folder / f"{i:05d}-{data.file_name(name)}.png"
        data.save_picture(Image.fromarray(image.squeeze()), file)


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        nargs="?",
        help="a student or a teacher (default: the shipped student of textures, or of scenes where "
        "there is a --prompt)",
    )
    add("--count", type=positive_int, default=64, help="images (default: 64)")
    add("--labels", nargs="+", metavar="CLASS", help="names or numbers of classes, in turn")
    add("--prompt", action="append", help="of scenes: what to draw (may be repeated)")
    add_prompts_flag(parser)
    add("--seed", type=non_negative_int, default=0, help="of the noises (default: 0)")
    add("--out", type=Path, default=Path("runs/samples"), help="folder (default: runs/samples)")
    add("--draw-trajectory", action="store_true", help="also draw the states of eight images")
    add("--png", action="store_true", help="also write each image as a file, into OUT/images")
    add("--npz", action="store_true", help="also write samples.npz: arr_0, uint8, (count, h, w, c)")
    add("--batch", type=positive_int, default=256, help="images at a time (default: 256)")
    add("--vae", default=VAE, help=f"of latents: autoencoder, a folder or name (default: {VAE})")
    group = parser.add_argument_group("a teacher's ODE (a student's is fixed)")
    group.add_argument("--euler-steps", type=positive_int, help="default: its own")
    group.add_argument("--guidance-scale", type=non_negative, help="default: its own; 1 is none")
    add_teacher_kind(group)
    add_machine_flags(parser, can_compile=True)
    return parser.parse_args()


class Sampler:
    """A network, and how its images are made: images(indices) gives those with these indices.
    Image i depends on (seed, i) only, at any batch size and with any number of processes."""

    def __init__(self, flags):
        self.runtime = runtime_from(flags)
        shipped = "scenes" if flags.prompt else "textures"
        self.model, self.record = load_network(
            flags.checkpoint or ASSETS / f"{shipped}-student.pt",
            "student",
            "teacher",
            device=self.runtime.device,
            teacher_kind=flags.teacher_kind,
        )
        self.seed = data.SAMPLING_SEED + flags.seed
        self.record = use_prompts(self.model, self.record, flags.prompts)
        # In a text network, the prompts take the place of classes. Encoded prompts have no names:
        # their indices are used as names.
        if flags.prompts:
            numbers = range(self.record.model.classes)
            self.record = replace(self.record, classes=tuple(map(str, numbers)))
            flags.labels = flags.labels or self.record.classes  # without --labels: all, in turn
        self.labels = parse_labels(flags.labels, self.record.classes) if flags.labels else None
        channels = self.record.model.channels
        if self.record.model.image_size > 1 and channels not in (1, 3, 4):
            raise UserError(f"{channels} channels are neither an image nor latents of DiT's kind")
        self.vae = load_vae(flags.vae, self.runtime.device) if channels == 4 else None
        ode_flags = (flags.euler_steps, flags.guidance_scale)
        if isinstance(self.record, TeacherRecord):
            self.record = replace(self.record, ode=override(self.record.ode, flags))
        elif ode_flags != (None, None):
            raise UserError(
                "--euler-steps and --guidance-scale are for teachers: a student has learned its own"
            )
        if self.record.model.image_size == 1:
            raise UserError("points are not pictures: evaluate.py draws them in the plane")
        if flags.prompt:
            self.read_prompts(flags.prompt)
        self.runtime.prepare(self.model)

    def read_prompts(self, prompts: list[str]):
        """Make images for these prompts in turn, instead of captions from the training set."""
        if not self.record.model.reads_text:
            raise UserError("this network is given classes, not text: use --labels, not --prompt")
        if self.record.data.source != "scenes":
            raise UserError("this network reads text of T5, from --prompts: leave out --prompt")
        self.model.prompts = Prompts(prompts)
        self.record = replace(self.record, classes=tuple(prompts))
        self.labels = list(range(len(prompts)))

    def states(self, indices):
        """What `sample_states` returns for the images with these indices, and labels (b,)."""
        x_T, y = data.noise_and_labels(self.record, self.seed, indices)
        if self.labels:
            y = torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        device = self.runtime.device
        with self.runtime.autocast():
            states = sample_states(self.model, self.record, x_T.to(device), y.to(device))
        if not states.isfinite().all():
            raise UserError("the network gives values that are not finite: train it again")
        return states, y

    def pixels(self, x):
        """Images in [-1, 1] of states (b, c, h, w). Latents are decoded a few at a time, since that
        takes memory."""
        if self.vae is None:
            return x
        return torch.cat([decode(self.vae, few) for few in x.split(16)])

    def images(self, indices):
        """uint8 images (b, h, w, c) and the names of their classes."""
        states, y = self.states(indices)
        names = [self.record.classes[label] for label in y]
        return data.to_uint8(self.pixels(states[:, -1])), names

    def draw_trajectory(self, count: int) -> Image.Image:
        """A column for each image: its states and, unless these are clean predictions already, the
        clean images at which the steps aimed."""
        states, _ = self.states(range(count))
        rows = [states]
        if isinstance(self.record, TeacherRecord):
            ode = self.record.ode
            times = NOISE_PATHS[ode.noise_path].times(ode.euler_steps)
            rows.append(implied_x0(ode, states, times))
        elif self.record.student.targets == "states":
            student = self.record.student
            rows.append(implied_x0(student.ode, states, student_times(student)))
        sheet = rearrange(torch.cat(rows, dim=1), "b s c h w -> (s b) c h w")
        return data.image_grid(self.pixels(sheet), columns=count)


def sample_all(sampler: Sampler, flags, sheet: list):
    """Yields all images on rank 0, batch by batch, (b, h, w, c). The first ones, SHEET of them,
    are also put into `sheet`; with --png, each becomes a file."""
    together = flags.batch * world_size()
    starts = range(0, flags.count, together)
    progress = Progress("sampling", starts, unit="images", size=together, amount=flags.count)
    for start in progress:
        first = start + rank() * flags.batch
        mine = range(first, min(first + flags.batch, flags.count))  # of this process; maybe none
        made = []
        if len(mine) > 0:
            images, names = sampler.images(mine)
            made.append((mine, images, names))
        for indices, images, names in gather(made):  # of all processes, on rank 0
            sheet.extend(images[: SHEET - len(sheet)])
            if flags.png:
                write_png_files(flags.out / "images", indices, images, names)
            yield images


def main():
    flags = parse_flags()
    if flags.prompt and len(flags.prompt) > min(flags.count, SHEET):
        raise UserError(f"give no more prompts than --count, and no more than {SHEET}")
    if flags.prompt and (flags.labels or len(set(flags.prompt)) < len(flags.prompt)):
        raise UserError("give each --prompt once, and no --labels beside it")
    out = output_folder(flags.out, "grid.png", "trajectory.png")
    if flags.png and any((out / "images").glob("*")):
        raise UserError(f"{out / 'images'} holds files: choose another --out, or remove them")
    sampler, sheet = Sampler(flags), []
    batches = sample_all(sampler, flags, sheet)
    if flags.npz and rank() == 0:
        data.write_npz(out / "samples.npz", flags.count, batches)
        print(f"wrote {out / 'samples.npz'}")
    for _ in batches:  # images are made while one iterates; write_npz may have done so already
        pass
    if rank() > 0:
        return
    images = rearrange(torch.from_numpy(np.stack(sheet)), "b h w c -> b c h w") / 127.5 - 1
    file, prompts = out / "grid.png", flags.prompt or [""]  # without prompts: one group of images
    each = len(images) // len(prompts)  # the same number for each prompt: the rest is not shown
    images = images[: each * len(prompts)]
    if len(prompts) > 1:
        rows = {text: images[i :: len(prompts)] for i, text in enumerate(prompts)}
        data.draw_images(rows, file)
    else:
        columns = math.ceil(math.sqrt(len(images)))
        data.save_picture(data.image_grid(images, columns), file)
    print(f"wrote {file}: {len(images)} of {flags.count:,} images")
    if flags.draw_trajectory:
        picture = sampler.draw_trajectory(min(8, flags.count))
        data.save_picture(picture, out / "trajectory.png")
        print(f"wrote {out / 'trajectory.png'}: a column for each image, from noise at the top")


if __name__ == "__main__":
    run_program(main)
