"""What a newcomer does: distil from the shipped teacher and sample; train a teacher, distil, evaluate. Each as its own
process, in an empty folder. Trainings are cut very short; the shipped student shows what a full one gives."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from sample import compare
from teacher import ASSETS, load_network

ROOT = Path(__file__).parents[1]


def run(folder, script, *words):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words), "--device", "cpu"], cwd=folder, text=True,
                          capture_output=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distil_sample(tmp_path):
    short = ("--count", 256, "--iterations", 12, "--batch", 16)
    said = run(tmp_path, "distill.py", *short)
    assert "writing 1 of 1 shards of 256" in said
    rows = json.loads((tmp_path / "runs/shapes/result.json").read_text())["rows"]
    assert list(rows) == ["teacher, 24 steps", "teacher, 4 steps", "student, 4 steps", "student, history shuffled"]
    assert [row["calls"] for row in rows.values()] == [48, 8, 4, 4]
    assert rows["teacher, 24 steps"]["error"] == 0 < rows["teacher, 4 steps"]["error"]
    assert (tmp_path / "runs/shapes/samples.png").stat().st_size > 10_000

    run(tmp_path, "sample.py", "runs/shapes/student.pt", "--count", 4)
    assert (tmp_path / "runs/samples/grid.png").exists()


def test_train_a_teacher_distil_evaluate(tmp_path):
    """In the plane, where it takes seconds."""
    short = ("--preset", "points", "--iterations", 12)
    run(tmp_path, "teacher.py", *short)
    run(tmp_path, "distill.py", *short, "--count", 256)
    student = (tmp_path / "runs/points/student.pt").read_bytes()
    said = run(tmp_path, "evaluate.py", "runs/points", "--count", 300)
    result = json.loads((tmp_path / "runs/evaluation/evaluation.json").read_text())
    assert set(result["exposure"]) == {"points"}
    for row in result["rows"]:
        assert row in said
    assert {"evaluation.png", "samples.png"} <= {path.name for path in (tmp_path / "runs/evaluation").iterdir()}
    assert (tmp_path / "runs/points/student.pt").read_bytes() == student


def test_the_shipped_student_is_close_to_its_teacher():
    teacher, _ = load_network(ASSETS / "shapes-teacher.pt", "teacher")
    student, about = load_network(ASSETS / "shapes-student.pt", "student")
    rows, states, _ = compare(teacher, student, about, torch.device("cpu"), repeats=1)
    assert states["teacher, 24 steps"][:, -1].std() > 0.3  # pictures, not grey
    assert 2 * rows["student, 4 steps"]["error"] < rows["teacher, 4 steps"]["error"]
    assert sum(path.stat().st_size for path in ASSETS.glob("*.pt")) < 8e6
