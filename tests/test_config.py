"""Configurations go to disk and come back, contradictions are refused, and every preset holds
together."""

import json
from argparse import Namespace
from dataclasses import asdict, replace

import pytest

from config import (
    AUTHORS_STUDENT,
    GAN,
    ODE,
    PRESETS,
    SIZES,
    ClassifierRecord,
    ModelConfig,
    Preset,
    Student,
    StudentRecord,
    TeacherRecord,
    Training,
    evenly,
    from_dict,
    override,
    override_parts,
    parse_size,
    sees_history,
)
from distill import make_student
from model import DiT
from teacher import NOISE_PATHS, check_ode
from tiny import TEACHER

MODEL = TEACHER.model


def records(preset: Preset):
    """A record of each kind, made of a preset's parts."""
    pictures = dict(image_size=preset.data.image_size, channels=preset.data.channels)
    model = ModelConfig(classes=2, **pictures, **parse_size(preset.size))
    common = dict(data=preset.data, classes=("a", "b"))
    weights = (0.25, 0.75)
    student = Student(preset.ode, (1, 2), "states", "state", (999.0, 1.5))
    yield TeacherRecord(
        model=model,
        ode=preset.ode,
        class_weights=weights,
        images=7,
        training=preset.teacher,
        **common,
    )
    yield StudentRecord(
        model=model,
        student=student,
        class_weights=weights,
        teacher="0123456789abcdef",
        trajectories=8,
        training=preset.distillation,
        gan=preset.gan,
        gan_training=preset.gan_training,
        **common,
    )
    yield ClassifierRecord(images=9, training=preset.teacher, **common)


@pytest.mark.parametrize("name", PRESETS)
def test_from_dict_undoes_asdict(name):
    for config in (PRESETS[name], *records(PRESETS[name])):
        assert from_dict(type(config), asdict(config)) == config
        through_json = json.loads(json.dumps(asdict(config)))  # where tuples become lists
        assert from_dict(type(config), through_json) == config


@pytest.mark.parametrize(
    "values, error",
    [
        (asdict(MODEL) | dict(colour="red"), KeyError),  # unknown
        ({k: v for k, v in asdict(MODEL).items() if k != "width"}, KeyError),  # missing
        ({k: v for k, v in asdict(MODEL).items() if k != "mask"}, KeyError),  # though optional
        (asdict(MODEL) | dict(patch=3), ValueError),  # a contradiction
    ],
)
def test_from_dict_refuses_what_is_no_such_configuration(values, error):
    with pytest.raises(error):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(predicts="x0"), "'x0' is none of v, eps"),
        (dict(noise_path="cosine"), "'cosine' is none of flow, ddpm"),
        (dict(euler_steps="24"), "'24' is not of the type <class 'int'>"),
        (dict(euler_steps=None), "None is not of the type"),
        (dict(guidance_scale=[1]), r".1. is not of the type"),
        (dict(predicts=["v"]), r".'v'. is none of"),
    ],
)
def test_words_and_types_are_checked(change, says):
    """A hand-edited file would be misread without a word."""
    values = asdict(TEACHER.ode)
    assert from_dict(ODE, values | dict(guidance_scale=2)).guidance_scale == 2
    with pytest.raises((TypeError, ValueError), match=says):
        from_dict(ODE, values | change)


@pytest.mark.parametrize(
    "change", [dict(target_steps=(2, 99)), dict(target_steps=()), dict(timesteps=(1.0,))]
)
def test_a_student_s_steps_are_those_of_its_ode(change):
    student = Student(TEACHER.ode, (4, 8), "states", "state", (999.0, 500.0))
    with pytest.raises(ValueError, match="steps"):
        from_dict(Student, asdict(student) | change)
    for wrong in ("ab", [4, "8"], 4):
        with pytest.raises(TypeError, match="is not of the type"):
            from_dict(Student, asdict(student) | dict(target_steps=wrong))


def test_flags_that_were_given_replace_fields():
    training = Training(iterations=10, batch=4, lr=0.1, ema_decay=0.9, on_policy=0.5)
    flags = Namespace(iterations=None, batch=8, on_policy=0.0, another_flag=1)
    assert override(training, flags) == replace(training, batch=8, on_policy=0.0)
    preset = PRESETS["points"]
    changed = override_parts(preset, flags, "distillation")
    assert changed == replace(preset, distillation=override(preset.distillation, flags))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(mask="diagonal"), "no mask 'diagonal': choose from none, window"),
        (dict(history_layers=7), "7 history layers: the network has 6"),
        (dict(history_layers=-1), "-1 history layers"),
        (dict(image_size=9), "9 pixels cannot be cut into patches of 4"),
    ],
)
def test_contradictory_networks_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(MODEL, **wrong)


@pytest.mark.parametrize("name", ["DiT-Q/2", "XL", "XL/", "XL/0", "XL/00", "XL/two", ""])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(ValueError, match="no model size"):
        parse_size(name)


def test_sizes():
    assert parse_size("DiT-XL/2") == parse_size("XL/2") == SIZES["XL"] | dict(patch=2)
    latents = ModelConfig(image_size=32, channels=4, classes=1000, **parse_size("XL/2"))
    assert (latents.grid_size, latents.tokens) == (16, 256)


@pytest.mark.parametrize(
    "mask, layers, shortcut, reads",
    [
        ("causal", 1, False, True),
        ("causal", 0, False, False),  # N = 0: step distillation
        ("none", 6, False, False),  # M1: the same
        ("none", 0, True, True),
    ],
)
def test_which_students_read_history(mask, layers, shortcut, reads):
    changes = dict(mask=mask, history_layers=layers, noise_shortcut=shortcut)
    settings = replace(PRESETS["textures"].student, **changes)
    assert settings.reads_history == sees_history(replace(MODEL, **changes), 4) == reads
    assert not replace(settings, steps=1).reads_history  # a single step has no history


def test_guidance_takes_two_calls_a_step():
    ode = ODE("flow", "v", euler_steps=24)
    assert ode.calls_per_step == 1 and replace(ode, guidance_scale=1.25).calls_per_step == 2


# ---- the presets ---------------------------------------------------------------------------------


def test_evenly():
    assert evenly(24, 4) == (6, 12, 18, 24) and evenly(24, 8)[:3] == (3, 6, 9)


class Chosen:
    """What make_student needs of trajectories."""

    def __init__(self, preset):
        self.ode = preset.ode
        kept = preset.trajectories.kept_steps
        every = len(kept) // preset.student.steps
        self.target_steps = kept[every - 1 :: every]

    def __len__(self):
        return 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_together(name):
    preset = PRESETS[name]
    check_ode(preset.ode)
    assert preset.ode.noise_path in NOISE_PATHS
    assert preset.trajectories.kept_steps[-1] == preset.ode.euler_steps
    assert preset.trajectories.keep in ("both", preset.student.targets)
    assert (preset.gan is None) == (preset.gan_training is None)
    assert preset.gan is None or isinstance(preset.gan, GAN)

    depth = SIZES[preset.size.partition("/")[0]]["depth"]
    teacher = DiT(replace(MODEL, width=4, heads=1, depth=depth))  # as deep, and thin
    record = replace(TEACHER, model=teacher.config)
    settings, training = preset.student, preset.distillation
    _, student = make_student(teacher, record, settings, Chosen(preset), training)
    assert student.student.steps == len(student.student.timesteps) == preset.student.steps


def test_imagenet256_is_the_recipe_of_the_authors_code():
    preset = PRESETS["imagenet256"]
    ode = ODE("ddpm", "eps", euler_steps=25, guidance_scale=1.5, guided_channels=3)
    assert (preset.size, preset.ode) == ("XL/2", ode)
    assert preset.trajectories.kept_steps == AUTHORS_STUDENT.target_steps == (10, 15, 20, 25)
    student = preset.student
    assert (student.steps, student.mask, student.history_layers) == (4, "causal", 6)
    assert (student.targets, student.output) == ("x0", "state")
    assert student.output_layer_per_step
    assert student.timesteps == tuple(999 * share for share in (1, 3 / 4, 1 / 2, 1 / 4))
    training = preset.distillation
    assert (training.batch, training.lr, training.ema_decay) == (64, 1e-4, 0.9999)
    assert (training.iterations, training.schedule) == (300_000, "constant")
