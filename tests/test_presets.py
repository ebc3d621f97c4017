"""Every preset holds together: teacher and student can be built, and the trajectories have the marks of the steps."""

from argparse import Namespace

import pytest
import torch

from data import choose_marks
from distill import make_student
from model import DiT, size
from presets import STUDENTS, TEACHERS, choose
from teacher import MARKS, PATHS


@pytest.mark.parametrize("name", TEACHERS)
def test_a_preset_holds_together(name):
    assert name in STUDENTS
    given = Namespace(preset=name, lr=0.5, batch=None)
    teacher, student = choose(TEACHERS, given), choose(STUDENTS, given)
    assert teacher["lr"] == student["lr"] == 0.5 and student["batch"] == STUDENTS[name]["batch"]
    marks = teacher["marks"] or range(MARKS)
    assert len(choose_marks(len(marks), student["steps"])) == student["steps"]
    assert teacher["marks"] or teacher["steps"] % MARKS == 0
    assert teacher["keep"] in ("both", student["trajectory"])
    assert teacher["predicts"] != "eps" or PATHS[teacher["path"]].alpha(PATHS[teacher["path"]].T) > 0
    with torch.device("meta"):
        config = {key: teacher[key] for key in ("image_size", "channels")} | dict(classes=10, **size(teacher["size"]))
        model, about = make_student(DiT(**config), dict(model=config), student)
    assert model.history_layers == student["history_layers"] and about["S"] == student["steps"]


def test_imagenet256_is_the_recipe_of_the_authors_code():
    teacher, student = (choose(table, Namespace(preset="imagenet256")) for table in (TEACHERS, STUDENTS))
    expected = dict(size="XL/2", path="ddpm", predicts="eps", guidance=1.5, guided_channels=3, steps=25,
                    marks=[10, 15, 20, 25])
    assert {key: teacher[key] for key in expected} == expected
    expected = dict(steps=4, history="causal", history_layers=6, batch=64, lr=1e-4, decay=0.9999, bf16=True,
                    schedule="constant", told=[999 * share for share in (1, 3 / 4, 1 / 2, 1 / 4)])
    assert {key: student[key] for key in expected} == expected
