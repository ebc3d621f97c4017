"""AutoRegressive Distillation: the student's loss and training (CVPR 2025, arXiv 2504.11295).

The teacher's ODE leads from noise x_T to an image in many small steps. The student makes the same
image in S large steps, between S + 1 of the teacher's states. *Step distillation* trains it to map
each of these states to the next, from that state alone:

    x_{τ_s}  →  x_{τ_{s−1}},        s = S, …, 1

When it samples, however, it reads the states that it has made itself. Each of them is a little
wrong, the next one is computed from it, and the errors add up. This is *exposure bias*. In ARD the
student also reads all states before the current one, its history:

    x̂_{τ_{s−1}} = G_θ( x_{τ_S}, …, x_{τ_s}, s, y )                                (paper, Sec. 3.2)

(A hat marks what a network has made: x̂_τ is a state of the student, and x̂_0 without a τ is the
clean image that is estimated in an Euler step. In training, the inputs x_τ can be the teacher's;
when the student samples, they are its own: see sample.py.)

The history begins with the noise x_T, which is never wrong. And x_T determines the whole
trajectory, since the ODE is deterministic. So a student that has learned to read x_T can correct
the errors that it has made since.

A worked example: S = 4, where the teacher takes 24 Euler steps along the path of flow matching.

    state                      x_T    x_τ3   x_τ2   x_τ1   x_0     in the code
    after Euler steps            0      6     12     18     24     Student.target_steps, but for x_T
    time t                       1    3/4    1/2    1/4      0     student_times
    timestep for the network  1000    750    500    250      –     Student.timesteps
    read in the loss           yes    yes    yes    yes     no     inputs, (b, 4, c, h, w)
    target in the loss          no    yes    yes    yes    yes     targets, (b, 4, c, h, w)

One training pass reads the four states as one sequence, and computes all four next states at once.
In the history layers, the mask of model.py lets each state see itself and earlier ones only. The
states that it reads are the teacher's. As with language models, this is called *teacher forcing*.

Three settings remain to be explained. The setting `targets` (not to be confused with the tensor of
targets in the loss) says what the training sequence consists of. Inputs and targets are one
sequence, one step apart, so this is both what the student reads and what it has to predict. It also
decides whether teacher forcing teaches the student to read x_T.

    targets     "states": the states x_τ of the ODE, as in the figure of the paper. With these,
                teacher forcing hardly teaches the student to read x_T: each state determines all
                later ones, and the current state is always right.
                "x0": in the place of each state after x_T, the clean prediction x̂_0 of the Euler
                step that led to it, as in the authors' code. The early ones look almost like the
                mean image of the class. They no longer show which image x_T leads to, so that the
                student has to read x_T. (We go on calling them "states". Unless a preset says
                otherwise, they keep the timesteps of the states that they replace.)
    output      what the network puts out: see sample.next_state
    on_policy   for this fraction of each batch, the student reads states that it has made itself,
                from the same x_T. The targets stay the teacher's, so that the student must learn
                to correct its own errors, for which it needs x_T. (Ours. DAgger, arXiv 1011.0686,
                is alike, but asks the teacher again at each state that the student visits.)

The default preset, `textures`, is there to show what a history is for. It combines the two settings
that force a student to use its history: clean predictions, and reading its own states only
(on_policy = 1). The predictions are those after 2, 8, 16 and 24 Euler steps: the first is made so
early that it shows little more than the mean image of the class. The student also has the noise
shortcut of model.py, which is ours. The *control* (no-history.pt) is trained in exactly the same
way, but has neither history nor shortcut. The printed tables call it "step distillation", though
with on_policy = 1 it, too, reads its own states in training. The preset `shapes` has targets
"states", output "direction" and on_policy 0. This copies the teacher most exactly, and the history
matters little.

The student needs no guidance, so that each step is a single network evaluation: if the teacher was
guided, its states already contain the guidance.

    python distill.py                    distils the shipped teacher into a student with history and
                                         one without, and compares them, in minutes
    python distill.py --preset shapes    another preset
    python distill.py --help             all that can be changed

Results go into runs/PRESET, or the folder --out: student.pt, no-history.pt, result.json and
pictures. An interrupted run is continued. Where no --teacher is given, the teacher is the first of
these that exists:

    the teacher                                   the folder of its trajectories
    -------------------------------------------   --------------------------------------
    teacher.pt in the folder of the results       trajectories/ in the same folder
    teacher.pt in runs/PRESET                     runs/PRESET/trajectories
    the shipped one, in assets/                   runs/PRESET/trajectories
"""

import startup  # noqa: F401  before the large packages

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import data
from command_line import (
    add_prompts_flag,
    add_teacher_flags,
    add_training_flags,
    fraction,
    make_parser,
    non_negative_int,
    positive_int,
    run_program,
)
from config import (
    MASKS,
    PRESETS,
    Student,
    StudentRecord,
    StudentSettings,
    TeacherRecord,
    Training,
    override_parts,
)
from evaluate import report
from files import UserError, fingerprint, load_weights, output_folder
from machine import Runtime, rank, runtime_from, world_size
from model import DiT
from pixart import use_prompts
from pretrained import find_teacher
from sample import few_step, predict_all
from teacher import NOISE_PATHS
from training import load_training, train
from trajectories import Trajectories, open_trajectories

# ---- 1. The loss ---------------------------------------------------------------------------------


def ard_loss(model, student: Student, trajectory, y, on_policy: float = 0.0):
    """The squared error ‖ x̂_{τ_{s−1}} − x_{τ_{s−1}} ‖², averaged over the S steps (paper, Sec.
    3.2), the samples and the pixels.

    trajectory: (b, S + 1, c, h, w), the teacher's, x_T first, of states or of clean predictions
    (trajectories.py has chosen); y: (b,). The student reads the first
    S entries and its targets are the last S: the same sequence, one step ahead. For a fraction
    `on_policy` of the samples it reads states that it has made itself.

    If the output is a direction v̂ of flow matching, the error of a step is (t_next − t)·(v̂ − v*),
    where v* = (target − x) / (t_next − t) is the direction that leads from x exactly to the target.
    So the loss weights the error of a direction by (t_next − t)², which is the same for all steps
    if they are equally long."""
    inputs, targets = trajectory[:, :-1], trajectory[:, 1:]                 # (b, S, c, h, w) each
    count = round(on_policy * len(trajectory))
    if count:
        own = own_inputs(model, student, inputs[:count, 0], y[:count])
        inputs = torch.cat([own, inputs[count:]])
    predictions = predict_all(model, student, inputs, y)
    return (predictions - targets).square().mean()


def own_inputs(model, student: Student, x_T, y):
    """x_T and the first S − 1 states that the student makes of it, (b, S, c, h, w): what it reads
    when it samples. No gradient flows through them."""
    return few_step(model, student, x_T, y, steps=student.steps - 1)


# ---- 2. The student ------------------------------------------------------------------------------


def make_student(
    teacher: DiT,
    teacher_record: TeacherRecord,
    settings: StudentSettings,
    trajectories: Trajectories,
    training: Training,
) -> tuple[DiT, StudentRecord]:
    """A student that starts from its teacher's weights, and the record that its checkpoint will
    hold. The ODE, its number of Euler steps and its guidance are those of the trajectories, since a
    student learns what these contain. (`settings` are what the user chose; a Student is what
    sampling needs; a StudentRecord is all that the checkpoint stores.) Raises UserError for
    settings that contradict one another."""
    config = student_config(teacher_record, settings)
    ode = trajectories.ode
    path = NOISE_PATHS[ode.noise_path]
    times = path.times(ode.euler_steps)[[0, *trajectories.target_steps]]
    timesteps = settings.timesteps or tuple(path.timestep(times[:-1]).tolist())
    record = StudentRecord(
        model=config,
        student=Student(
            ode=ode,
            target_steps=trajectories.target_steps,
            targets=settings.targets,
            output=settings.output,
            timesteps=timesteps,
        ),
        data=teacher_record.data,
        classes=teacher_record.classes,
        class_weights=teacher_record.class_weights,
        teacher=fingerprint(teacher.state_dict()),
        trajectories=len(trajectories),
        training=training,
    )
    model = DiT(config)
    model.prompts = teacher.prompts
    load_weights(model, initial_weights(model, teacher), "the teacher")
    return model, record


def student_config(teacher_record: TeacherRecord, settings: StudentSettings):
    """The ModelConfig of a student. Raises UserError for settings that contradict one another."""
    if settings.output == "direction" and settings.targets == "x0":
        raise UserError(
            "x0 predictions are not states of the ODE, so no Euler step leads from one to the "
            "next: use --output state, or --targets states"
        )
    if settings.timesteps and len(settings.timesteps) != settings.steps:
        raise UserError(f"{len(settings.timesteps)} timesteps are given for {settings.steps} steps")
    try:
        return replace(
            teacher_record.model,
            mask=settings.mask,
            history_layers=settings.history_layers,
            noise_shortcut=settings.noise_shortcut,
            output_layers=settings.steps if settings.output_layer_per_step else 1,
            depth=teacher_record.model.depth + settings.extra_layers,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def initial_weights(model: DiT, teacher: DiT) -> dict:
    """The teacher's weights under the student's names: each output layer is a copy of the
    teacher's, and what the teacher does not have (the noise shortcut; the layers of an ablation
    with a deeper student) keeps its initial weights, with which it adds nothing."""
    weights = teacher.state_dict()
    for layer in model.output_layer_names[1:]:
        for name, value in teacher.final_layer.state_dict().items():
            weights[f"{layer}.{name}"] = value
    return model.state_dict() | weights


def distill(
    model: DiT, record: StudentRecord, trajectories: Trajectories, file: Path, runtime: Runtime
):
    """Train a student into the checkpoint `file`. If it exists, its training is continued. Returns
    (the EMA of the student, losses)."""
    training = record.training
    samples = training.batch // (world_size() * runtime.accumulate)  # in a micro-batch
    if training.on_policy and round(training.on_policy * samples) == 0:
        raise UserError(
            f"--on-policy {training.on_policy:g} of a micro-batch of {samples} is less than one "
            "sample: choose a larger --batch, or a smaller --accumulate"
        )
    model.to(runtime.device)

    def batch_at(iteration: int):
        rng = data.stream(training.seed, iteration)
        return trajectories.batch(rng.integers(len(trajectories), size=training.batch))

    def loss_of(network, trajectory, y):
        return ard_loss(network, record.student, trajectory, y, training.on_policy)

    config = record.model
    shortcut = " and the noise shortcut" if config.noise_shortcut else ""
    print(
        f"distilling into {record.student.steps} steps with history in {config.history_layers} of "
        f"{config.depth} layers (mask: {config.mask}){shortcut}: {training.iterations:,} "
        f"iterations of {training.batch} on {runtime.device} in {runtime.precision}, into {file}"
    )
    return train("student", model, loss_of, batch_at, file, record, runtime)


# ---- 3. The program ------------------------------------------------------------------------------


def add_student_flags(parser):
    """What a student is, and what it learns from."""
    group = parser.add_argument_group("the student")
    add = group.add_argument
    add("--steps", type=positive_int, help="S, the student's steps")
    add("--history-layers", type=non_negative_int, help="N, the layers with history")
    add("--mask", choices=MASKS, help="which earlier states a state reads in the history layers")
    add(
        "--noise-shortcut",
        action=argparse.BooleanOptionalAction,
        help="add x_T's tokens to those of later states, through a linear map",
    )
    add("--targets", choices=("states", "x0"), help="learn states, or x0 predictions")
    add("--output", choices=("direction", "state"), help="predict a direction, or the state itself")
    add(
        "--output-layer-per-step",
        action=argparse.BooleanOptionalAction,
        help="an output layer for each step instead of one for all",
    )
    add("--on-policy", type=fraction, help="fraction of samples that read the student's states")
    add("--count", type=positive_int, help="trajectories to train on")


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="textures", help="sets everything (default: textures)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET)")
    add_teacher_flags(parser)
    add_prompts_flag(parser)
    add("--trajectories", dest="folder", type=Path, metavar="DIR", help="read or written there")
    add("--no-control", action="store_true", help="do not train a student without history as well")
    add_student_flags(parser)
    add_training_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    preset = override_parts(PRESETS[flags.preset], flags, "trajectories", "student", "distillation")
    settings, training = preset.student, preset.distillation
    runtime = runtime_from(flags, preset.bf16, preset.checkpointing)
    runs = Path("runs") / flags.preset
    out = output_folder(flags.out or runs, "result.json", "samples.png")
    teacher, teacher_record = find_teacher(
        flags.teacher_file, flags.preset, out, runtime.device, flags.teacher_kind
    )
    teacher_record = use_prompts(teacher, teacher_record, flags.prompts)
    # A preset may set timesteps, as the authors' code does. They are right for its own number of
    # steps and its own noise path. Otherwise, make_student derives them from the states' times.
    unchanged = PRESETS[flags.preset]
    same_path = teacher_record.ode.noise_path == unchanged.ode.noise_path
    if settings.steps != unchanged.student.steps or not same_path:
        settings = replace(settings, timesteps=None)
    student_config(teacher_record, settings)  # raises, before trajectories are made
    home = out if (out / "teacher.pt").exists() else runs
    trajectories = open_trajectories(
        teacher,
        teacher_record,
        preset.trajectories,
        settings,
        flags.folder or home / "trajectories",
        runtime,
    )
    students = {"student.pt": settings}
    if settings.reads_history and not flags.no_control:  # in layers, or through the shortcut
        students["no-history.pt"] = replace(settings, history_layers=0, noise_shortcut=False)
    made = {}
    for file, chosen in students.items():
        made[file] = make_student(teacher, teacher_record, chosen, trajectories, training)
        load_training(out / file, "student", made[file][1])  # raises where it is another training
    trained, losses = {}, {}
    for file, (model, record) in made.items():
        name = "ARD" if record.reads_history else "step distillation"
        ema, losses[name] = distill(model, record, trajectories, out / file, runtime)
        trained[name] = (ema, record)
    if rank() > 0:
        return
    report(teacher, trained, losses, out, runtime)


if __name__ == "__main__":
    run_program(main)
