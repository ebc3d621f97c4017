"""What a newcomer does: distil from the shipped teacher and sample; train a teacher, distil,
evaluate. Each program is a process of its own, in an empty folder. Trainings and reports are cut
very short; the shipped student shows what a full training gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
from config import PRESETS
from pretrained import ASSETS, load_network
from sample import few_step
from teacher import solve

ROOT = Path(data.__file__).resolve().parent
SMALL_REPORT = """
import runpy, sys
from dataclasses import replace
import evaluate
evaluate.REPORT_IMAGES = 80
evaluate.PATHS = 10
evaluate.CLASSIFIER_TRAINING = replace(evaluate.CLASSIFIER_TRAINING, iterations=20)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder, script, *words):
    command = [sys.executable, "-c", SMALL_REPORT, ROOT / script, *words, "--device", "cpu"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distil_and_sample(tmp_path):
    said = run(tmp_path, "distill.py", "--count", 256, "--iterations", 4, "--batch", 8)
    assert "writing 1 of 1 shards of 256" in said
    out = tmp_path / "runs/textures"
    rows = json.loads((out / "result.json").read_text())["rows"]
    for label, row in rows.items():
        assert label in said and row["error"] >= 0
    assert rows["teacher, 24 steps"]["error"] == 0 < rows["teacher, 4 steps"]["error"]
    calls = {row["calls"] for row in rows.values() if "calls" in row}
    assert calls == {24, 4}  # no guidance in this preset
    assert {"student.pt", "no-history.pt", "samples.png"} <= {f.name for f in out.iterdir()}

    run(tmp_path, "sample.py", out / "student.pt", "--count", 4)
    assert (tmp_path / "runs/samples/grid.png").exists()


def test_train_a_teacher_distil_and_evaluate(tmp_path):
    """In the plane, where it takes seconds."""
    short = ("--preset", "points", "--iterations", 4, "--batch", 64)
    run(tmp_path, "teacher.py", *short)
    run(tmp_path, "distill.py", *short, "--count", 256)
    student = (tmp_path / "runs/points/student.pt").read_bytes()
    said = run(tmp_path, "evaluate.py", "runs/points", "--count", 100)
    result = json.loads((tmp_path / "runs/evaluation/evaluation.json").read_text())
    for row in result["rows"]:
        assert row in said
    written = {path.name for path in (tmp_path / "runs/evaluation").iterdir()}
    assert {"exposure.png", "samples.png"} <= written
    assert (tmp_path / "runs/points/student.pt").read_bytes() == student


@pytest.mark.parametrize("name", sorted(path.stem for path in ASSETS.glob("*-student.pt")))
def test_a_shipped_student_makes_its_teachers_images(name):
    preset = name.removesuffix("-student")
    teacher, teacher_record = load_network(ASSETS / f"{preset}-teacher.pt", "teacher", device="cpu")
    model, record = load_network(ASSETS / f"{name}.pt", "student", device="cpu")
    assert teacher_record.training == PRESETS[preset].teacher
    assert record.training == PRESETS[preset].distillation
    x_T, y = data.noise_and_labels(record, data.EVALUATION_SEED, range(64))
    states, _ = solve(teacher, record.student.ode, x_T, y)
    full, student = states[:, -1], few_step(model, record.student, x_T, y)[:, -1]
    assert full.std() > 0.2  # pictures, not grey
    error = (student - full).square().mean()
    others = (student.roll(1, dims=0) - full).square().mean()  # images of other noises
    assert error < 0.03 and error < others / 5


def test_what_is_shipped_is_small():
    assert 0 < sum(path.stat().st_size for path in ASSETS.rglob("*.pt")) < 20e6
