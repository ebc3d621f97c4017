"""The ablation: every row has its control, nothing is trained twice, and the table says what the files say. With a
teacher of random weights and trainings of four steps."""

import json
import sys
from pathlib import Path

import pytest
import torch

import ablation
import data
from ablation import SECOND, Bench, factors, ratio, spread
from model import DiT, size
from presets import COMMON, REFINERS, STUDENTS, TEACHERS
from training import Fault, export, fingerprint

CONFIG = dict(image_size=1, channels=2, classes=3, **size("N/1"))


def bench_of(preset, **moved):
    settings = COMMON | STUDENTS[preset] | {key: TEACHERS[preset][key] for key in ("count", "guidance")}
    return Bench(settings, settings | moved, DiT(**CONFIG), {}, Path("-"), Path("-"), "cpu", 300)


def test_a_row_and_its_control():
    bench = bench_of("shapes")
    for change, names in ((dict(steps=8), ("steps=8,history_layers=0", "steps=8")),
                          (dict(history="window"), ("history_layers=0", "history=window")),
                          (dict(history_layers=3), ("history_layers=0", "history_layers=3")),
                          (dict(opens=0.5), ("history_layers=0", "opens=0.5")),  # without history nothing opens
                          (dict(step_heads=False), ("history_layers=0", "preset")),  # the centre itself
                          (dict(history="none"), ("history_layers=0",) * 2),
                          (dict(steps=1), ("steps=1,history_layers=0",) * 2),  # one step has no history
                          (dict(refine={}), ("refined,strength=0.0", "refined")),  # the second stage without a judge
                          (dict(refine=dict(level=0.2)), ("refined,strength=0.0", "refined,level=0.2"))):
        assert tuple(map(bench.name, bench.both(change))) == names
    told = bench_of("shapes", told=[900, 700, 500, 300])
    assert [told.both(dict(steps=S))[1]["told"] for S in (2, 4)] == [None, [900, 700, 500, 300]]
    moved = bench_of("shapes", history="anchor", trajectory="clean")
    assert tuple(map(moved.name, moved.both({}))) == ("history_layers=0,trajectory=clean",
                                                      "history=anchor,trajectory=clean")


@pytest.mark.parametrize("preset", ["points", "shapes"])
def test_every_factor_has_the_centre_in_it(preset):
    bench = bench_of(preset)
    rows = factors(bench.centre, depth=6)
    second = [change["refine"] for factor in SECOND for change in rows.pop(factor)]
    assert {key for change in second for key in change} < REFINERS["shapes"].keys()
    for factor, changes in rows.items():
        assert all(key in bench.centre for change in changes for key in change), factor
        assert "preset" in [bench.name(bench.both(change)[1]) for change in changes], factor


def test_means():
    assert spread([2.0], ".1f") == "2.0" and spread([1.0, 2.0, 4.0], ".2f") == "2.33 ± 1.50"


def test_ratio():
    def of(without, with_history):
        sides = [[dict(seed=seed, above=value) for seed, value in side.items()] for side in (without, with_history)]
        return ratio(*sides, "above")

    assert of({0: 6.0}, {0: 2.0}) == "3.00"
    assert of({0: 6.0, 1: 8.0}, {1: 3.0, 0: 2.0}) == "2.83 ± 0.17"  # seed by seed
    assert of({0: 6.0}, {0: 2.0, 1: 3.0}) == "3.00"
    assert of({0: 6.0, 1: 8.0}, {0: 0.5, 1: 2.0}) == "> 3.0"  # 0.5 is no further from 0 than from 2: a bound
    assert of({0: 6.0}, {0: -1.0}) == of({0: -6.0}, {0: 1.0}) == of({0: 6.0}, {1: 1.0}) == ""


def test_the_second_stage_starts_from_the_first(tmp_path, monkeypatch, few_shapes):
    """Both students of a row, from the same one of the first stage, which is trained once."""
    class Indifferent:
        def __init__(self, *_, **__):
            pass

        def __call__(self, run, title):
            return dict(error=0.0, above=0.0)

    monkeypatch.setattr(ablation, "Judge", Indifferent)
    monkeypatch.chdir(tmp_path)
    config = dict(image_size=8, channels=3, classes=10, **size("N/4"))
    about = dict(kind="teacher", model=config, path="flow", predicts="v", guidance=1.0, steps=8, data="shapes",
                 classes=list(data.SHAPES), training=dict(iterations=1))
    preset = COMMON | STUDENTS["shapes"] | dict(count=8, iterations=2, batch=4, bf16=False, guidance=1.0)
    game = COMMON | REFINERS["shapes"] | dict(iterations=2, batch=8, alone=1, hidden=8, flip=False)
    bench = Bench(preset, preset, DiT(**config), about, Path("t"), Path("out"), torch.device("cpu"), 300, game)
    for row in bench.both(dict(refine={})):
        bench.train(row, seed=0)
    names = "refined,strength=0.0", "refined"
    students = [torch.load(f"out/{name}/0.pt", weights_only=True) for name in names]
    first = torch.load("out/preset/0.pt", weights_only=True)
    assert {one["about"]["refined"]["start"] for one in students} == {fingerprint(first["ema"])}
    assert [one["about"]["refined"]["strength"] for one in students] == [0.0, 1.0]
    assert len(list(Path("out").rglob("*.json"))) == 2  # the first stage's student is another row


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDENTS, "points", STUDENTS["points"] | dict(iterations=4, batch=8))
    monkeypatch.setitem(TEACHERS, "points", TEACHERS["points"] | dict(count=256))
    about = dict(kind="teacher", model=CONFIG, path="flow", predicts="v", guidance=1.0, steps=8, data="points",
                 classes=["arm 0", "arm 1", "arm 2"], training=dict(iterations=1))
    export(tmp_path / "runs/points/teacher.pt", about, DiT(**CONFIG).state_dict())

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--preset", "points", "--images", "300", *words,
                                          "--device", "cpu"])
        ablation.main()
        return capsys.readouterr().out

    run("--factors", "centre", "--part", "1/2")  # the control alone: no row is complete
    run("--factors", "steps", "--part", "1/2")
    out = run("--factors", "steps", "--seeds", "2")
    folder = tmp_path / "runs/ablation/points"
    students = {str(file.relative_to(folder)) for file in folder.glob("*/*.json")}
    names = ("preset", "history_layers=0", "steps=1,history_layers=0", "steps=2", "steps=2,history_layers=0", "steps=8",
             "steps=8,history_layers=0")
    assert students == {f"{name}/{seed}.json" for name in names for seed in (0, 1)}
    one = json.loads((folder / "steps=2/1.json").read_text())
    assert one["name"] == "steps=2" and one["seed"] == 1 and len(one["exposure"]["own"]) == 2
    other = json.loads((folder / "steps=2/0.json").read_text())
    assert f"{(one['error'] + other['error']) / 2:.6f} ±" in next(
        line for line in out.splitlines() if line.startswith("steps 2 "))
    assert json.loads((folder / "ablation.json").read_text())["lines"]["steps 2"]["seeds"] == 2
    assert (folder / "ablation.png").stat().st_size > 10_000

    files = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")}
    again = run("--factors", "steps", "--seeds", "2")
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")} == files
    assert "distilling" not in again and again.splitlines()[-4:] == out.splitlines()[-4:]
    whole = (folder / "steps=2/1.json").read_bytes()
    (folder / "steps=2/1.json").write_bytes(whole[:100])
    with pytest.raises(Fault, match="steps=2/1.json is damaged: remove it"):
        run("--factors", "steps")
    (folder / "steps=2/1.json").write_text("{}")
    with pytest.raises(Fault, match="another basis: teacher is nothing there"):
        run("--factors", "steps")
    (folder / "steps=2/1.json").write_bytes(whole)
    with pytest.raises(Fault, match="no factor 'width'"):
        run("--factors", "width")
    with pytest.raises(Fault, match="another basis: images is 300 there, not 250"):
        run("--factors", "steps", "--images", "250")
