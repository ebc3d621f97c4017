"""Trajectories, which a student learns from: the teacher's ODE, solved from many noises.

A student reads each trajectory several times, and solving takes long. So trajectories are written
to disk once, into shards (shards.py). If m states of each are kept, a shard holds of a trajectory

    label     ()                 the class
    x_T       (c, h, w)          the noise
    states    (m, c, h, w)       the states x_τ after the kept numbers of Euler steps; the last: x_0
    x0        (m, c, h, w)       the clean predictions x̂_0 of the Euler steps that lead to them

in float16, and only the states or only the x0 where one is enough. A student of S steps uses every
(m / S)-th of the kept states: 8 of them serve for 1, 2, 4 or 8 steps. Trajectory i depends on
(seed, i) only, so that more can be added later.

distill.py writes the trajectories that it needs. This program writes them beforehand, on several
machines if you like:

    python trajectories.py                                  those of the default preset, textures
    python trajectories.py --preset cifar10 --worker 2/8    the second of eight parts of the work
"""

import startup  # noqa: F401  before the large packages

import copy
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from command_line import (
    add_prompts_flag,
    add_teacher_flags,
    add_worker_flag,
    make_parser,
    non_negative,
    non_negative_int,
    positive_int,
    run_program,
)
from config import (
    ODE,
    PRESETS,
    Student,
    StudentSettings,
    TeacherRecord,
    TrajectorySettings,
    from_dict,
    override,
)
from data import noise_and_labels
from files import UserError, fingerprint
from machine import Progress, Runtime, add_machine_flags, runtime_from, wait_for_all
from pixart import use_prompts
from pretrained import find_teacher
from shards import SHARD, Shards, read_meta, start_shards, write_shard
from teacher import solve

# ---- 1. What the trajectories of a folder are ----------------------------------------------------


@dataclass(frozen=True)
class TrajectoryRecord:
    """What the trajectories of a folder depend on, and what is kept of them: its meta.json."""

    teacher: str  # fingerprint of its weights, and of the prompts where it was given some
    ode: ODE
    kept_steps: tuple[int, ...]
    keep: Literal["states", "x0", "both"]
    shape: tuple[int, ...]  # (c, h, w)
    class_weights: tuple[float, ...]
    seed: int

    def __post_init__(self):
        if not self.kept_steps or self.seed < 0:
            raise ValueError(f"steps {self.kept_steps} and seed {self.seed}")

    @property
    def dtype(self) -> np.dtype:
        """What a shard holds of one trajectory."""
        fields = [("label", "<i4"), ("x_T", "<f2", self.shape)]
        for name in ("states", "x0"):
            if self.keep in (name, "both"):
                fields.append((name, "<f2", (len(self.kept_steps), *self.shape)))
        return np.dtype(fields)


def describe(
    teacher,
    teacher_record: TeacherRecord,
    settings: TrajectorySettings,
    seed: int = 0,
) -> TrajectoryRecord:
    """The record of the trajectories that these settings ask for. Raises UserError where the kept
    steps do not rise, or do not end with the ODE's last step."""
    config, ode = teacher_record.model, teacher_record.ode
    kept = tuple(settings.kept_steps)
    is_rising = list(kept) == sorted(set(kept))
    if not is_rising or kept[0] < 1 or kept[-1] != ode.euler_steps:
        raise UserError(
            f"the kept steps (trajectories.py --kept-steps) must rise and end with "
            f"{ode.euler_steps}, the ODE's last, but they are {' '.join(map(str, kept))}"
        )
    identity = fingerprint(teacher.state_dict())
    if hasattr(teacher.prompts, "fingerprint"):  # text.EncodedPrompts
        identity += f" with the prompts {teacher.prompts.fingerprint}"
    return TrajectoryRecord(
        teacher=identity,
        ode=ode,
        kept_steps=kept,
        keep=settings.keep,
        shape=(config.channels, config.image_size, config.image_size),
        class_weights=teacher_record.class_weights,
        seed=seed,
    )


def read_record(folder: Path) -> TrajectoryRecord | None:
    """The record of the trajectories in a folder, None where there are none. Raises UserError where
    the folder holds something else."""
    meta = read_meta(folder)
    if meta is None:
        return None
    try:
        return from_dict(TrajectoryRecord, meta)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder}/meta.json describes no trajectories: choose another folder, or remove it"
        ) from None


# ---- 2. Which of the kept states a student learns ------------------------------------------------


def choose_targets(
    record: TrajectoryRecord, student: StudentSettings | Student
) -> tuple[int, ...]:
    """The kept steps that are a student's targets: every second one, for example. Raises UserError
    where the number of kept steps is no multiple of the student's steps, and where what it learns
    is not kept."""
    if record.keep not in (student.targets, "both"):
        raise UserError(
            f"of these trajectories only the {record.keep} are kept: use --targets "
            f"{record.keep}, or write others, trajectories.py --keep both"
        )
    kept = len(record.kept_steps)
    if kept % student.steps:
        divisors = [str(s) for s in range(1, kept + 1) if kept % s == 0]
        raise UserError(
            f"trajectories of {kept} kept states cannot be learned in {student.steps} steps: "
            f"choose --steps from {', '.join(divisors)}"
        )
    every = kept // student.steps
    return record.kept_steps[every - 1 :: every]


class Trajectories:
    """The first `count` trajectories of a folder, as a student learns them.

    ode             the ODE that was solved
    target_steps    numbers of Euler steps after which the student's targets lie, (S,)
    seed            of noises and labels

    Raises UserError where some are missing, or are not what the student learns."""

    def __init__(
        self,
        folder: Path,
        record: TrajectoryRecord,
        student: StudentSettings | Student,
        count: int,
    ):
        self.ode = record.ode
        self.target_steps = choose_targets(record, student)
        self.seed = record.seed
        self.count = count
        self.kind = student.targets  # "states" or "x0"
        self.rows = [record.kept_steps.index(step) for step in self.target_steps]
        self.shards = Shards(folder, record.dtype, ceil(count / SHARD))

    def __len__(self):
        return self.count

    def batch(self, indices):
        """Trajectories (b, S + 1, c, h, w), x_T first and the image last, and their labels (b,).
        Raises UserError where a shard is damaged."""
        x, y = [], []
        for i in indices:
            x_T = self.shards.value("x_T", i)
            targets = self.shards.value(self.kind, i)[self.rows]            # (S, c, h, w)
            x.append(np.concatenate([x_T[None], targets]))
            y.append(int(self.shards.value("label", i)))
        return torch.from_numpy(np.stack(x)).float(), torch.tensor(y)


# ---- 3. Writing trajectories ---------------------------------------------------------------------


def write_trajectories(
    teacher,
    teacher_record: TeacherRecord,
    record: TrajectoryRecord,
    folder: Path,
    count: int,
    runtime: Runtime,
    worker: tuple[int, int] = (0, 1),
):
    """Write the first `count` trajectories, rounded up to whole shards. Shards that are there are
    kept. `worker`: see start_shards. Raises UserError where the folder holds something else."""
    shards = ceil(count / SHARD)
    missing = start_shards(folder, asdict(record), record.dtype, shards, worker)
    solver = copy.deepcopy(teacher)  # prepare() rounds its weights; students need the exact ones
    runtime.prepare(solver)
    for number in Progress("shards of trajectories", missing, unit="trajectories", size=SHARD):
        indices = range(number * SHARD, (number + 1) * SHARD)
        x_T, y = noise_and_labels(teacher_record, record.seed, indices)
        states, x0 = solve_in_batches(solver, record, x_T, y, runtime)
        if not (states.isfinite().all() and x0.isfinite().all()):
            raise UserError(
                "the teacher's ODE leads to infinite values: was its training cut short, or is the "
                "guidance scale too large?"
            )
        write_shard(
            folder,
            number,
            record.dtype,
            label=y,
            x_T=x_T,
            states=states[:, 1:],  # without x_T
            x0=x0,
        )
    wait_for_all()


def solve_in_batches(teacher, record: TrajectoryRecord, x_T, y, runtime: Runtime):
    """`solve`, of as many samples at a time as suits the device. Returns states and clean
    predictions in float16, on the CPU."""
    states, x0 = [], []
    size = runtime.samples_at_once
    for noise, labels in zip(x_T.split(size), y.split(size), strict=True):
        noise, labels = noise.to(runtime.device), labels.to(runtime.device)
        with runtime.autocast():
            solved = solve(teacher, record.ode, noise, labels, record.kept_steps)
        states.append(solved[0].half().cpu())
        x0.append(solved[1].half().cpu())
    return torch.cat(states), torch.cat(x0)


def scale_steps(kept_steps: tuple[int, ...], euler_steps: int) -> tuple[int, ...]:
    """The same fractions of the way, for another number of Euler steps: a preset's (6, 12, 18, 24)
    become (2, 4, 6, 8) for a teacher of 8."""
    return tuple(round(step * euler_steps / kept_steps[-1]) for step in kept_steps)


def open_trajectories(
    teacher,
    teacher_record: TeacherRecord,
    settings: TrajectorySettings,
    student: StudentSettings | Student,
    folder: Path,
    runtime: Runtime,
) -> Trajectories:
    """The trajectories in a folder, for a student to learn; those that are missing are written. If
    the folder holds some already, their ODE, kept steps, seed, and which of states and x0 they keep
    are taken instead of those asked for.

    Raises UserError, before the work, where they are another teacher's or not what the student
    learns."""
    existing = read_record(folder)
    seed = 0
    if existing is None:
        kept_steps = scale_steps(settings.kept_steps, teacher_record.ode.euler_steps)
        settings = replace(settings, kept_steps=kept_steps)
    else:
        seed = existing.seed
        teacher_record = replace(teacher_record, ode=existing.ode)
        settings = replace(settings, kept_steps=existing.kept_steps, keep=existing.keep)
    record = describe(teacher, teacher_record, settings, seed)
    choose_targets(record, student)  # raises before the long work begins
    count = settings.count
    write_trajectories(teacher, teacher_record, record, folder, count, runtime)
    print(
        f"learning from {count:,} trajectories in {folder}: {record.ode.euler_steps} Euler steps, "
        f"guidance scale {record.ode.guidance_scale:g}"
    )
    return Trajectories(folder, record, student, count)


# ---- 4. The program ------------------------------------------------------------------------------


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="textures", help="sets everything (default: textures)")
    add_teacher_flags(parser)
    add_prompts_flag(parser)
    add("--folder", type=Path, metavar="DIR", help="default: runs/PRESET/trajectories")
    add("--count", type=positive_int, help="trajectories")
    add("--seed", type=non_negative_int, default=0, help="of noises and labels (default: 0)")
    add_worker_flag(parser)
    group = parser.add_argument_group("what is kept")
    add = group.add_argument
    add(
        "--kept-steps",
        type=positive_int,
        nargs="+",
        metavar="K",
        help="numbers of Euler steps after which a state is kept",
    )
    add("--keep", choices=("states", "x0", "both"), help="states, x0 predictions, or both")
    group = parser.add_argument_group("ODE (default: the teacher's own)")
    group.add_argument("--guidance-scale", type=non_negative, help="1 is none")
    group.add_argument("--euler-steps", type=positive_int)
    add_machine_flags(parser, can_compile=True)
    return parser.parse_args()


def main():
    flags = parse_flags()
    preset = PRESETS[flags.preset]
    runtime = runtime_from(flags, preset.bf16)
    runs = Path("runs") / flags.preset
    teacher, teacher_record = find_teacher(
        flags.teacher_file, flags.preset, runs, runtime.device, flags.teacher_kind
    )
    teacher_record = use_prompts(teacher, teacher_record, flags.prompts)
    teacher_record = replace(teacher_record, ode=override(teacher_record.ode, flags))
    settings = override(preset.trajectories, flags)
    write_trajectories(
        teacher,
        teacher_record,
        describe(teacher, teacher_record, settings, flags.seed),
        flags.folder or runs / "trajectories",
        settings.count,
        runtime,
        flags.worker,
    )


if __name__ == "__main__":
    run_program(main)
