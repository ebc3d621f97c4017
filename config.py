"""Everything that can be configured, as frozen dataclasses, and the presets, which are instances
of them.

A function takes the configuration that it needs:

    ModelConfig       the arguments of the network                      DiT(config)
    ODE               the teacher's ODE and how it is solved            solve(model, ode, x_T, y)
    Student           what a student's steps are                        few_step(model, student, …)
    Training          how a network is trained                          learning_rate(i, training)

The others say what a user chooses (`DataConfig`, `StudentSettings`, `TrajectorySettings`, `GAN`)
or what a checkpoint holds beside its weights (`TeacherRecord`, `StudentRecord`,
`ClassifierRecord`). A checkpoint stores them with `dataclasses.asdict`; `from_dict` reads them
back. These are the presets:

    textures       16×16 textures: the default. Minutes on a CPU; shows what the history is for
    shapes         16×16 procedural shapes: the preset that copies its teacher best
    shapes64       the same at 64×64: minutes on a GPU
    points         spirals in the plane: whole trajectories can be drawn on paper
    scenes         small pictures with captions: text-to-image in miniature
    cifar10        a folder of images (--data), such as CIFAR-10: a GPU
    imagenet256    the paper's setting: DiT-XL/2 on latents of 256×256 images, public teacher
    pixart256      text-to-image with PixArt-α, a public teacher, on latents of 256×256 images
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Literal

MASKS = ("none", "window", "anchor", "causal")

SIZES = {
    "N": dict(width=64, depth=6, heads=4),  # nano: points in the plane
    "T": dict(width=128, depth=6, heads=4),  # tiny: 16×16 images on a CPU
    "XS": dict(width=160, depth=4, heads=5),  # extra small: scenes, in patches of 7×7 pixels
    "S": dict(width=384, depth=12, heads=6),  # the four public sizes: 33M parameters,
    "B": dict(width=768, depth=12, heads=12),  # 130M,
    "L": dict(width=1024, depth=24, heads=16),  # 458M,
    "XL": dict(width=1152, depth=28, heads=16),  # and 675M
}


# ---- 1. The network --------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of DiT (model.py). Raises ValueError where they contradict one another."""

    image_size: int  # pixels (or latents) a side
    channels: int
    classes: int  # (or prompts); the null class of classifier-free guidance is one more
    patch: int  # pixels a side of a token
    width: int  # features of a token
    depth: int  # transformer layers
    heads: int  # attention heads
    learn_sigma: bool = False  # the public DiT also predicts a variance, in `channels` more outputs
    mask: str = "none"  # which earlier states a state reads: one of MASKS
    history_layers: int = 0  # in how many of the lowest layers: the paper's N
    noise_shortcut: bool = False  # x_T's tokens are added to those of later states (ours)
    output_layers: int = 1  # 1, or one for each of the student's steps
    text_width: int = 0  # features of a word of the text that it reads; 0: it is given a class

    def __post_init__(self):
        sizes = (self.image_size, self.channels, self.patch, self.width, self.heads)
        if min(*sizes, self.depth, self.output_layers) < 1 or self.width % self.heads:
            raise ValueError(f"no network has these sizes: {self}")
        if self.image_size % self.patch:
            raise ValueError(f"{self.image_size} pixels cannot be cut into patches of {self.patch}")
        if self.mask not in MASKS:
            raise ValueError(f"no mask {self.mask!r}: choose from {', '.join(MASKS)}")
        if not 0 <= self.history_layers <= self.depth:
            raise ValueError(
                f"{self.history_layers} history layers: the network has {self.depth} layers"
            )

    @property
    def grid_size(self) -> int:
        """Tokens a side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one state: n."""
        return self.grid_size**2

    @property
    def reads_text(self) -> bool:
        return self.text_width > 0


def sees_history(network, steps: int) -> bool:
    """Whether a student of so many steps reads earlier states, by attention or by the noise
    shortcut. network: ModelConfig or StudentSettings."""
    looks_back = network.mask != "none" and network.history_layers > 0
    return steps > 1 and (looks_back or network.noise_shortcut)


def parse_size(name: str) -> dict:
    """The width, depth, heads and patch of a network that is named like "XL/2". Raises
    ValueError."""
    letters, _, patch = name.removeprefix("DiT-").partition("/")
    if letters not in SIZES or not patch.isdecimal() or int(patch) == 0:
        known = ", ".join(SIZES)
        raise ValueError(f"no model size {name!r}: write SIZE/PATCH, with a size of {known}")
    return SIZES[letters] | dict(patch=int(patch))


# ---- 2. The teacher's ODE and the student's steps ----------------------------------------------


@dataclass(frozen=True)
class ODE:
    """The probability-flow ODE of a teacher, and how it is solved (teacher.py)."""

    noise_path: Literal["flow", "ddpm", "sit", "repa"]  # sit, repa: of public networks
    predicts: Literal["v", "eps"]  # the network: the velocity, or the noise
    euler_steps: int
    guidance_scale: float = 1.0  # classifier-free guidance; 1 is none
    guided_channels: int | None = None  # guide only the first few channels; None: all

    def __post_init__(self):
        if self.euler_steps < 1:
            raise ValueError(f"{self.euler_steps} Euler steps")

    @property
    def calls_per_step(self) -> int:
        """Network evaluations of an Euler step: guidance takes two."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(frozen=True)
class Student:
    """What a student's S steps are: sample.py takes them, distill.py trains them."""

    ode: ODE  # that it has learned
    target_steps: tuple[int, ...]  # Euler steps that the teacher has taken at each of the S targets
    targets: Literal["states", "x0"]  # states x_τ of the ODE, or the teacher's clean predictions
    output: Literal["state", "direction"]  # the next state, or the direction of an Euler step
    timesteps: tuple[float, ...]  # given to the network as the times of the S states that it reads

    def __post_init__(self):
        if len(self.timesteps) != self.steps:
            raise ValueError(f"{len(self.timesteps)} timesteps for {self.steps} steps")
        rising = (0, *self.target_steps, self.ode.euler_steps + 1)
        if not self.target_steps or list(rising) != sorted(set(rising)):
            raise ValueError(f"steps {self.target_steps} of an ODE of {self.ode.euler_steps}")

    @property
    def steps(self) -> int:
        """S, the number of network calls that an image takes."""
        return len(self.target_steps)


# ---- 3. What a user chooses --------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    source: str | None  # "textures", "shapes", "points", "scenes", or a folder of images or latents
    image_size: int
    channels: int
    flip: bool = False  # mirror training images at random


@dataclass(frozen=True)
class Training:
    """What a training's result depends on, beside its data and its first weights. (All trainings
    use AdamW without weight decay, and clip gradients at 1.)"""

    iterations: int
    batch: int
    lr: float  # the highest learning rate
    ema_decay: float  # of the moving average of the weights, which is the result
    schedule: Literal["cosine", "constant"] = "cosine"  # after a linear warm-up; cosine: down to 0
    on_policy: float = 0.0  # the fraction of each batch that reads the student's own history
    logit_mean: float = 0.0  # of a teacher's training times: see FlowMatching.draw_times
    seed: int = 0


@dataclass(frozen=True)
class TrajectorySettings:
    count: int  # trajectories to train on
    kept_steps: tuple[int, ...]  # after how many Euler steps a state is kept; x_T always is
    keep: Literal["states", "x0", "both"] = "both"  # x0: clean predictions


@dataclass(frozen=True)
class StudentSettings:
    """From these, make_student (distill.py) makes a ModelConfig and a Student."""

    steps: int  # S
    targets: str  # see Student
    output: str  # see Student
    history_layers: int  # see ModelConfig
    mask: str = "causal"
    noise_shortcut: bool = False
    output_layer_per_step: bool = False  # the authors' code; the paper speaks of one network
    timesteps: tuple[float, ...] | None = None  # default: those of the states' own times
    extra_layers: int = 0  # that the teacher does not have: a control for the history's cost

    @property
    def reads_history(self) -> bool:
        return sees_history(self, self.steps)


@dataclass(frozen=True)
class GAN:
    """The second stage (gan.py)."""

    discriminator_lr: float
    hidden: int  # width of a discriminator head
    noise_level: float  # images are judged at this fraction of the noise path's time
    weight: float  # a factor of λ, which balances the gradients of both losses; 0: no GAN loss
    warmup: int  # first iterations, in which only the discriminator learns from images


@dataclass(frozen=True)
class Preset:
    data: DataConfig
    size: str  # of the network, such as "T/4"
    ode: ODE
    teacher: Training
    trajectories: TrajectorySettings
    student: StudentSettings
    distillation: Training
    gan: GAN | None = None
    gan_training: Training | None = None
    bf16: bool = True  # multiply in 16 bits, where the machine does it fast
    checkpointing: bool = False


# ---- 4. What a checkpoint holds beside its weights -----------------------------------------------


@dataclass(frozen=True)
class TeacherRecord:
    model: ModelConfig
    ode: ODE
    data: DataConfig
    classes: tuple[str, ...]
    class_weights: tuple[float, ...]  # the fraction of images in each class; (): all alike
    images: int  # that it was trained on
    training: Training
    content: str = ""  # 16 digits that tell these images from others: Dataset.content_key


@dataclass(frozen=True)
class StudentRecord:
    model: ModelConfig
    student: Student
    data: DataConfig
    classes: tuple[str, ...]
    class_weights: tuple[float, ...]
    teacher: str  # fingerprint of its teacher's weights; "" where a public file does not say
    trajectories: int  # that it was trained on
    training: Training
    gan: GAN | None = None  # the second stage, if it had one
    gan_training: Training | None = None  # how the second stage was trained

    @property
    def reads_history(self) -> bool:
        return sees_history(self.model, self.student.steps)


@dataclass(frozen=True)
class ClassifierRecord:
    data: DataConfig
    classes: tuple[str, ...]
    images: int
    training: Training


def from_dict(kind: type, values: dict):
    """Undo `dataclasses.asdict`: make the dataclass `kind` of a dict. Raises AttributeError,
    KeyError, TypeError or ValueError where the values are not such."""
    hints = typing.get_type_hints(kind)
    unknown, missing = sorted(values.keys() - hints.keys()), sorted(hints.keys() - values.keys())
    if unknown:
        raise KeyError(f"no field {unknown[0]!r} in {kind.__name__}")
    if missing:  # a default would not tell
        raise KeyError(f"{kind.__name__} without its field {missing[0]!r}")
    return kind(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint, value):
    if isinstance(hint, types.UnionType):  # X | None
        hint = typing.get_args(hint)[0]
        if value is None:
            return None
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_restore(choices[0], one) for one in value)
    kind = (int, float) if hint is float else origin or hint
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of the type {hint}")
    return value


def override(config, flags):
    """A copy of a dataclass in which flags of the same names that were given (are not None) replace
    its fields. `flags`: the namespace of argparse."""
    names = {field.name for field in dataclasses.fields(config)}
    given = {k: v for k, v in vars(flags).items() if k in names and v is not None}
    return dataclasses.replace(config, **given)


def override_parts(preset: Preset, flags, *parts: str) -> Preset:
    """A copy of a preset with flags put over the fields of its named parts."""
    changed = {part: override(getattr(preset, part), flags) for part in parts}
    return dataclasses.replace(preset, **changed)


# ---- 5. The presets ------------------------------------------------------------------------------


def evenly(euler_steps: int, count: int) -> tuple[int, ...]:
    """`count` numbers of Euler steps, evenly spaced, up to `euler_steps`: evenly(24, 4) is
    (6, 12, 18, 24)."""
    return tuple(euler_steps * (i + 1) // count for i in range(count))


# The ODE of the public DiT (arXiv 2212.09748): 1000-step DDPM that predicts the noise; 25 DDIM
# steps; guidance acts on three of the four latent channels.
PUBLIC_DIT_ODE = ODE(
    noise_path="ddpm", predicts="eps", euler_steps=25, guidance_scale=1.5, guided_channels=3
)
# The student of the authors' code predicts x_0 in four of the 25 steps.
AUTHORS_STUDENT = Student(
    ode=PUBLIC_DIT_ODE,
    target_steps=(10, 15, 20, 25),
    targets="x0",
    output="state",
    timesteps=(999.0, 749.25, 499.5, 249.75),
)

FLOW_24 = ODE(noise_path="flow", predicts="v", euler_steps=24)
# What copies a teacher best: to learn states of the ODE, and predict the direction of a step.
COPY = StudentSettings(steps=4, targets="states", output="direction", history_layers=3)
SMALL_GAN = GAN(discriminator_lr=3e-3, hidden=64, noise_level=0.02, weight=1.0, warmup=200)

PRESETS = {
    "textures": Preset(
        data=DataConfig("textures", image_size=16, channels=3),
        size="T/4",
        ode=FLOW_24,
        teacher=Training(iterations=4000, batch=128, lr=2e-3, ema_decay=0.999),
        trajectories=TrajectorySettings(count=4096, kept_steps=(2, 8, 16, 24), keep="x0"),
        student=StudentSettings(
            steps=4, targets="x0", output="state", history_layers=6, noise_shortcut=True
        ),
        distillation=Training(iterations=1000, batch=16, lr=2e-3, ema_decay=0.99, on_policy=1.0),
    ),
    "shapes": Preset(
        data=DataConfig("shapes", image_size=16, channels=3),
        size="T/4",
        ode=dataclasses.replace(FLOW_24, guidance_scale=1.25),
        teacher=Training(iterations=24000, batch=256, lr=2e-3, ema_decay=0.999),
        trajectories=TrajectorySettings(count=20480, kept_steps=evenly(24, 8)),
        student=dataclasses.replace(COPY, history_layers=1),
        distillation=Training(iterations=1400, batch=64, lr=1e-3, ema_decay=0.99),
        gan=SMALL_GAN,
        gan_training=Training(iterations=1000, batch=64, lr=1e-4, ema_decay=0.99, on_policy=1.0),
    ),
    "shapes64": Preset(
        data=DataConfig("shapes", image_size=64, channels=3),
        size="S/4",
        ode=dataclasses.replace(FLOW_24, guidance_scale=2.0),
        teacher=Training(iterations=20000, batch=256, lr=5e-4, ema_decay=0.999),
        trajectories=TrajectorySettings(count=16384, kept_steps=evenly(24, 8)),
        student=COPY,
        distillation=Training(iterations=5000, batch=64, lr=3e-4, ema_decay=0.999),
        gan=SMALL_GAN,
        gan_training=Training(iterations=2000, batch=64, lr=1e-4, ema_decay=0.999, on_policy=1.0),
    ),
    "points": Preset(
        data=DataConfig("points", image_size=1, channels=2),
        size="N/1",
        ode=FLOW_24,
        teacher=Training(iterations=4000, batch=512, lr=2e-3, ema_decay=0.995),
        trajectories=TrajectorySettings(count=16384, kept_steps=evenly(24, 8)),
        student=StudentSettings(steps=4, targets="x0", output="state", history_layers=6),
        distillation=Training(iterations=2000, batch=256, lr=1e-3, ema_decay=0.995),
        bf16=False,
    ),
    "scenes": Preset(
        data=DataConfig("scenes", image_size=21, channels=3),
        size="XS/7",
        ode=dataclasses.replace(FLOW_24, guidance_scale=2.0),
        # Where objects stand and what they are is decided early, when there is most noise.
        teacher=Training(iterations=20_000, batch=128, lr=2e-3, ema_decay=0.999, logit_mean=1.0),
        trajectories=TrajectorySettings(count=8192, kept_steps=evenly(24, 12)),
        student=dataclasses.replace(COPY, history_layers=2),
        distillation=Training(iterations=1000, batch=32, lr=1e-3, ema_decay=0.99),
    ),
    "cifar10": Preset(
        data=DataConfig(None, image_size=32, channels=3),
        size="S/2",
        ode=dataclasses.replace(FLOW_24, guidance_scale=1.5),
        teacher=Training(iterations=100_000, batch=256, lr=3e-4, ema_decay=0.9995),
        trajectories=TrajectorySettings(count=50_176, kept_steps=evenly(24, 8)),
        student=COPY,
        distillation=Training(iterations=20_000, batch=64, lr=2e-4, ema_decay=0.999),
        gan=dataclasses.replace(SMALL_GAN, hidden=128),
        gan_training=Training(iterations=10_000, batch=64, lr=1e-4, ema_decay=0.999, on_policy=1.0),
    ),
    "imagenet256": Preset(
        data=DataConfig(None, image_size=32, channels=4),
        size="XL/2",
        ode=PUBLIC_DIT_ODE,
        teacher=Training(
            iterations=400_000, batch=256, lr=1e-4, ema_decay=0.9999, schedule="constant"
        ),
        trajectories=TrajectorySettings(
            count=1_280_000, kept_steps=AUTHORS_STUDENT.target_steps, keep="x0"
        ),
        student=StudentSettings(
            steps=4,
            targets="x0",
            output="state",
            history_layers=6,
            output_layer_per_step=True,
            timesteps=AUTHORS_STUDENT.timesteps,
        ),
        distillation=Training(
            iterations=300_000, batch=64, lr=1e-4, ema_decay=0.9999, schedule="constant"
        ),
        gan=GAN(discriminator_lr=1e-3, hidden=256, noise_level=0.02, weight=10.0, warmup=3000),
        gan_training=Training(
            iterations=40_000, batch=64, lr=1e-4, ema_decay=0.9999, schedule="constant",
            on_policy=1.0,
        ),
        checkpointing=True,
    ),
}
# PixArt-α has the ODE of the public DiT, and guides all channels (arXiv 2310.00426).
PRESETS["pixart256"] = dataclasses.replace(
    PRESETS["imagenet256"],
    ode=dataclasses.replace(PUBLIC_DIT_ODE, guidance_scale=4.5, guided_channels=None),
    gan=None,
    gan_training=None,
)
