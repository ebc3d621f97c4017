"""The ablation: every row has its control, nothing is trained twice, and the table says what the files say. With a
teacher of random weights and trainings of four steps."""

import json
import sys

import pytest

import ablation
from ablation import both, factors, name_of, ratio, spread
from model import DiT, size
from presets import COMMON, STUDENTS, TEACHERS
from training import Fault, export


def test_a_row_and_its_control():
    centre = dict(history="causal", history_layers=1, steps=4, count=100)
    assert both(dict(steps=8), centre) == (dict(steps=8, history_layers=0), dict(steps=8))
    assert both(dict(history="window"), centre) == (dict(history_layers=0), dict(history="window"))
    assert both(dict(history_layers=3), centre) == (dict(history_layers=0), dict(history_layers=3))
    assert both(dict(count=100), centre) == (dict(history_layers=0), {})  # the centre itself
    assert both(dict(steps=1), centre) == (dict(steps=1, history_layers=0),) * 2  # one step has no history
    assert name_of({}) == "centre" and name_of(dict(steps=8, history_layers=0)) == "steps=8,history_layers=0"


@pytest.mark.parametrize("preset", ["points", "shapes"])
def test_every_factor_has_the_centre_in_it(preset):
    centre = COMMON | STUDENTS[preset] | {key: TEACHERS[preset][key] for key in ("count", "guidance")}
    for factor, changes in factors(preset, depth=6).items():
        assert all(key in centre for change in changes for key in change), factor
        assert {} in [both(change, centre)[1] for change in changes], factor


def test_means_and_ratios():
    assert spread([2.0], ".1f") == "2.0" and spread([1.0, 2.0, 4.0], ".2f") == "2.33 ± 1.50"
    assert ratio([6.0], [2.0]) == "3.00"
    assert ratio([6.0, 8.0], [2.0, 3.0]) == "2.83 ± 0.17"
    assert ratio([6.0, 8.0], [0.5, 2.0]) == "> 3.5"  # 0.5 is no further from 0 than from 2: a bound
    assert ratio([6.0, 8.0], [-2.0, -1.0]) == ""


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDENTS, "points", STUDENTS["points"] | dict(iterations=4, batch=8))
    monkeypatch.setitem(TEACHERS, "points", TEACHERS["points"] | dict(count=256))
    config = dict(image_size=1, channels=2, classes=3, **size("N/1"))
    about = dict(kind="teacher", model=config, path="flow", predicts="v", guidance=1.0, steps=8, data="points",
                 classes=list("abc"), training=dict(iterations=1))
    export(tmp_path / "runs/points/teacher.pt", about, DiT(**config).state_dict())

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--preset", "points", "--count", "300", *words,
                                          "--device", "cpu"])
        ablation.main()
        return capsys.readouterr().out

    run("--factors", "steps", "--part", "1/2")
    out = run("--factors", "steps", "--seeds", "2")
    folder = tmp_path / "runs/ablation/points"
    students = {str(file.relative_to(folder)) for file in folder.glob("*/*.json")}
    names = ("centre", "history_layers=0", "steps=1,history_layers=0", "steps=2", "steps=2,history_layers=0", "steps=8",
             "steps=8,history_layers=0")
    assert students == {f"{name}/{seed}.json" for name in names for seed in (0, 1)}
    one = json.loads((folder / "steps=2/1.json").read_text())
    assert one["change"] == dict(steps=2) and one["seed"] == 1 and len(one["exposure"]["own"]) == 2
    other = json.loads((folder / "steps=2/0.json").read_text())
    assert f"{(one['error'] + other['error']) / 2:.6f} ±" in next(
        line for line in out.splitlines() if line.startswith("steps 2 "))
    assert json.loads((folder / "ablation.json").read_text())["lines"]["steps 2"]["seeds"] == 2
    assert (folder / "ablation.png").stat().st_size > 10_000

    files = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")}
    again = run("--factors", "steps", "--seeds", "2")
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")} == files
    assert "distilling" not in again and again.splitlines()[-4:] == out.splitlines()[-4:]
    with pytest.raises(Fault, match="no factor 'width'"):
        run("--factors", "width")
