"""The settings of every preset in one place: `--preset NAME` sets them all, flags override them.

    points         2-D spirals: a minute or two; whole trajectories can be drawn
    shapes         16×16 procedural shapes: the default, minutes on a CPU
    shapes64       the same at 64×64: minutes on a GPU
    cifar10        a folder of 32×32 images (--data), such as CIFAR-10: a GPU
    imagenet256    the paper's: DiT-XL/2 on the latents of 256×256 images; the teacher is the public one (--teacher)

From them comes a network's `about`, the dict that stands in its checkpoint and is passed along with it:

    kind, model                          "teacher" or "student"; the arguments of DiT
    path, predicts                       the noise path, and what the teacher predicts
    guidance, guided_channels, steps     the teacher's ODE: its guidance, of which channels, and its Euler steps
    data, classes, training              what it learned from, and how
    teacher                              of a student: the fingerprint of its teacher's weights
    S, output, trajectory                its own steps (called `steps` in STUDENTS and by --steps), and what it learned
    marks, times, told                   the teacher's steps done at each of its S later states; the path times of all
                                         its S + 1 states; the times that it is told at the first S
    refined                              the second stage, if it had one
"""

import public

# What presets have in common unless they say otherwise. First how a training runs, which has no bearing on its result
# but for rounding; then the learning rate's schedule, the share of each batch that is fed the student's own history,
# and the share of the training over which the history layers open; then what the ODE of the public DiT has of its own,
# and what is kept of trajectories.
COMMON = dict(bf16=True, checkpointing="auto", accumulate=1, compile=False,
              schedule="cosine", own=0.0, opens=0.0, guided_channels=None, marks=None, keep="both")

# A teacher: its data and network, its noise path and what the network predicts, how it is trained, and how its ODE is
# solved: `steps` Euler steps with this guidance, from `count` noises.
TEACHERS = {
    "points": dict(
        data="points", image_size=1, channels=2, flip=False, size="N/1", path="flow", predicts="v",
        iterations=4000, batch=512, lr=2e-3, decay=0.995, bf16=False, guidance=1.0, steps=24, count=16384),
    "shapes": dict(
        data="shapes", image_size=16, channels=3, flip=False, size="T/4", path="flow", predicts="v",
        iterations=24000, batch=256, lr=2e-3, decay=0.999, guidance=1.25, steps=24, count=20480),
    "shapes64": dict(
        data="shapes", image_size=64, channels=3, flip=False, size="S/4", path="flow", predicts="v",
        iterations=20000, batch=256, lr=5e-4, decay=0.999, guidance=2.0, steps=24, count=16384),
    "cifar10": dict(
        data=None, image_size=32, channels=3, flip=True, size="S/2", path="flow", predicts="v",
        iterations=100000, batch=256, lr=3e-4, decay=0.9995, guidance=1.5, steps=24, count=50176),
    "imagenet256": dict(
        data=None, image_size=32, channels=4, flip=False, size="XL/2",
        iterations=400000, batch=256, lr=1e-4, decay=0.9999, schedule="constant",
        **public.ODE, marks=public.MARKS, keep="clean", count=1280000),
}

# A student: its S steps, its history, what it learns from and what it puts out, and how it is trained.
STUDENTS = {
    "points": dict(
        steps=4, history="causal", history_layers=6, trajectory="clean", output="state", step_heads=False, told=None,
        iterations=2000, batch=256, lr=1e-3, decay=0.995, bf16=False),
    "shapes": dict(
        steps=4, history="causal", history_layers=1, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=1400, batch=64, lr=1e-3, decay=0.99),
    "shapes64": dict(
        steps=4, history="causal", history_layers=3, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=5000, batch=64, lr=3e-4, decay=0.999),
    "cifar10": dict(
        steps=4, history="causal", history_layers=3, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=20000, batch=64, lr=2e-4, decay=0.999),
    "imagenet256": dict(
        steps=4, history="causal", history_layers=6, trajectory="clean", output="state", step_heads=True,
        told=public.TOLD, iterations=300000, batch=64, lr=1e-4, decay=0.9999, schedule="constant"),
}

# The second stage of a student (points have none): how its images are judged, and how it and the heads are trained.
# `alone`: first steps without the judge; `strength`: the factor of λ.
GAME = dict(judged="own", level=0.02, strength=1.0, alone=200, heads_lr=3e-3, hidden=64)
REFINERS = {
    "shapes": GAME | dict(iterations=1000, batch=64, lr=1e-4, decay=0.99),
    "shapes64": GAME | dict(iterations=2000, batch=64, lr=1e-4, decay=0.999),
    "cifar10": GAME | dict(iterations=10000, batch=64, lr=1e-4, decay=0.999, hidden=128),
    "imagenet256": GAME | dict(iterations=40000, batch=64, lr=1e-4, decay=0.9999, schedule="constant", alone=3000,
                               heads_lr=1e-3, strength=10.0, hidden=256),
}


def flips(about: dict, preset: str) -> bool:
    """Whether the teacher that `about` describes has seen mirrored images; a public one, as its preset has it."""
    return about["training"].get("flip", TEACHERS[preset]["flip"])


def choose(table: dict, args) -> dict:
    """The settings of args.preset with the flags that were given (those not None) put over them."""
    preset = COMMON | table[args.preset]
    return preset | {key: value for key, value in vars(args).items() if key in preset and value is not None}
