"""What several tests use: tiny networks, and the records that describe them.

A fresh DiT predicts exactly zero (adaLN-zero), and zero agrees with almost anything. So the weights
of every network here are random.
"""

from dataclasses import asdict, replace

import torch
from PIL import Image

from config import (
    ODE,
    DataConfig,
    ModelConfig,
    StudentSettings,
    TeacherRecord,
    Training,
    parse_size,
)
from files import export
from machine import Runtime
from model import DiT

CPU = Runtime(torch.device("cpu"))
FLOW_8 = ODE(noise_path="flow", predicts="v", euler_steps=8)
CONFIG = ModelConfig(image_size=8, channels=3, classes=5, **parse_size("N/4"))  # 4 tokens a state
TRAINING = Training(iterations=60, batch=8, lr=2e-3, ema_decay=0.9)
TEACHER = TeacherRecord(
    model=CONFIG,
    ode=FLOW_8,
    data=DataConfig("shapes", image_size=8, channels=3),
    classes=("ant", "bee", "cat", "dog", "eel"),
    class_weights=(),
    images=1,
    training=TRAINING,
)
SETTINGS = StudentSettings(steps=4, targets="states", output="direction", history_layers=2)


def random_weights(model: torch.nn.Module, seed=0, std=0.08) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, std, generator=generator)
    return model


def random_dit(seed=0, **changes) -> DiT:
    return random_weights(DiT(replace(CONFIG, **changes)), seed)


class FewTrajectories:
    """Eight random trajectories of 4 steps, with the interface of trajectories.Trajectories."""

    ode, target_steps, seed = FLOW_8, (2, 4, 6, 8), 0

    def __len__(self):
        return 8

    def batch(self, indices):
        x = torch.randn(8, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return x[indices], torch.arange(8)[indices] % 5


def student_of(teacher: DiT, **changes):
    """A student of `teacher`, and its record, with some of the SETTINGS changed."""
    from distill import make_student

    settings = replace(SETTINGS, **changes)
    return make_student(teacher, TEACHER, settings, FewTrajectories(), TRAINING)


def write_teacher(file, seed=1, source="shapes"):
    """A checkpoint of a random teacher that saw the images of `source`. Its ODE takes 24 steps, as
    the presets expect."""
    ode, data = replace(FLOW_8, euler_steps=24), replace(TEACHER.data, source=str(source))
    record = replace(TEACHER, ode=ode, data=data)
    export(file, "teacher", asdict(record), random_dit(seed).state_dict())


def write_images(folder, each: int):
    """A folder of images of those classes, so many `each`."""
    for name in TEACHER.classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = Image.effect_noise((8, 8), 40 + i).convert("RGB")
            noise.save(folder / name / f"{i}.png")
