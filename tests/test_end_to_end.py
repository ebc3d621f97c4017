"""What newcomers do: one distils from the shipped teacher and samples; another trains a teacher,
distils and evaluates. Each program is a process of its own, in an empty folder, with one thread,
and the two work at the same time. Trainings and reports are cut very short; the shipped student
shows what a full training gives."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
import shards
shards.SHARD = 64
import evaluate
evaluate.REPORT_IMAGES = 80
evaluate.EXPOSURE_SAMPLES = 16
evaluate.PATHS = 10
evaluate.CLASSIFIER_TRAINING = replace(evaluate.CLASSIFIER_TRAINING, iterations=20)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, commands: tuple[str, ...]) -> list[str]:
    """What each of these commands prints. They run one after the other."""
    printed = []
    for command in commands:
        script, *words = command.split()
        done = subprocess.run(
            [sys.executable, "-c", SMALL_REPORT, ROOT / script, *words, "--device", "cpu"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=170,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed


@pytest.fixture(scope="module")
def newcomers(tmp_path_factory):
    """{name: (its folder, what its commands printed)}."""
    points = "--preset points --iterations 4 --batch 64"  # in the plane: seconds
    commands = {
        "distils": (
            "distill.py --count 64 --iterations 4 --batch 8",
            "sample.py runs/textures/student.pt --count 4",
        ),
        "trains a teacher": (
            f"teacher.py {points}",
            f"distill.py {points} --count 64",
            "evaluate.py runs/points --count 100",
        ),
    }
    folders = [tmp_path_factory.mktemp("newcomer") for _ in commands]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, *job) for job in zip(folders, commands.values(), strict=True)]
    printed = [job.result() for job in jobs]
    return dict(zip(commands, zip(folders, printed, strict=True), strict=True))


def test_distil_and_sample(newcomers):
    folder, [said, _] = newcomers["distils"]
    assert "writing 1 of 1 shards of 64" in said
    out = folder / "runs/textures"
    rows = json.loads((out / "result.json").read_text())["rows"]
    for label, row in rows.items():
        assert label in said and row["error"] >= 0
    assert rows["teacher, 24 steps"]["error"] == 0 < rows["teacher, 4 steps"]["error"]
    calls = {row["calls"] for row in rows.values() if "calls" in row}
    assert calls == {24, 4}  # no guidance in this preset
    assert {"student.pt", "no-history.pt", "samples.png"} <= {f.name for f in out.iterdir()}
    assert (folder / "runs/samples/grid.png").exists()


def test_train_a_teacher_distil_and_evaluate(newcomers):
    folder, [_, _, said] = newcomers["trains a teacher"]
    result = json.loads((folder / "runs/evaluation/evaluation.json").read_text())
    for row in result["rows"]:
        assert row in said
    written = {path.name for path in (folder / "runs/evaluation").iterdir()}
    assert {"exposure.png", "samples.png"} <= written


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
