"""The ablation: every row has its control, nothing is trained twice, and the tables say what was
found. The teacher has random weights, and trainings have four steps."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny import CPU, random_weights

import config
from config import GAN, ODE, PRESETS, DataConfig, ModelConfig, TeacherRecord, parse_size
from experiments import ablation
from experiments.ablation import (
    Ablation,
    change,
    factors,
    markdown,
    name_of,
    pair,
    ratio,
    spread,
    table_lines,
)
from files import UserError, export
from model import DiT

RESULTS = Path(ablation.__file__).parent / "results"
FLOW_8 = ODE(noise_path="flow", predicts="v", euler_steps=8)


def first_stage(name: str):
    return replace(PRESETS[name], gan=None)


def test_a_row_and_its_control():
    preset, baseline = PRESETS["shapes"], first_stage("shapes")
    for changes, names in (
        (dict(steps=8), ("steps=8,history_layers=0", "steps=8")),
        (dict(mask="window"), ("history_layers=0", "mask=window")),
        (dict(history_layers=3), ("history_layers=0", "history_layers=3")),
        (dict(noise_shortcut=True), ("history_layers=0", "noise_shortcut=True")),
        (dict(output_layer_per_step=False), ("history_layers=0", "preset")),  # the baseline itself
        (dict(mask="none"), ("history_layers=0",) * 2),
        (dict(steps=1), ("steps=1,history_layers=0",) * 2),  # one step has no history
        (dict(gan=True), ("gan_weight=0", "gan_weight=1")),
    ):
        students = pair(preset, baseline, changes)
        assert tuple(name_of(baseline, student) for student in students) == names
    moved = change(baseline, dict(mask="anchor", targets="x0"))
    names = [name_of(baseline, student) for student in pair(preset, moved, {})]
    assert names == ["targets=x0,history_layers=0", "targets=x0,mask=anchor"]


@pytest.mark.parametrize("name", ["points", "shapes", "textures"])
def test_every_factor_has_the_baseline_in_it(name):
    preset = PRESETS[name]
    rows = factors(first_stage(name), depth=6)
    del rows["gan"]
    for factor, values in rows.items():
        students = [pair(preset, first_stage(name), changes)[1] for changes in values]
        assert "preset" in [name_of(first_stage(name), student) for student in students], factor


def test_spread():
    assert spread([2.0], ".1f") == "2.0"
    assert spread([1.0, 2.0, 4.0], ".2f") == "2.33 ± 1.50"


def test_ratio():
    def of(control, student):
        sides = []
        for values in (control, student):
            sides.append([dict(seed=seed, above=value) for seed, value in values.items()])
        return ratio(*sides, "above")

    assert of({0: 6.0}, {0: 2.0}) == "3.00"
    assert of({0: 6.0, 1: 8.0}, {1: 3.0, 0: 2.0}) == "2.83 ± 0.17"  # seed by seed
    assert of({0: 6.0}, {0: 2.0, 1: 3.0}) == "3.00"
    # 0.5 is no further from 0 than from 2: a bound.
    assert of({0: 6.0, 1: 8.0}, {0: 0.5, 1: 2.0}) == "> 3.0"
    for control, student in (({0: 6.0}, {0: -1.0}), ({0: -6.0}, {0: 1.0}), ({0: 6.0}, {1: 1.0})):
        assert of(control, student) == ""


def test_the_committed_results_can_be_shown(tmp_path):
    files = sorted(RESULTS.glob("ablation-*.json"))
    assert len(files) >= 7
    for file in files:
        content = json.loads(file.read_text())
        lines = table_lines(content)
        assert "teacher, 24 steps" in lines and any(name.endswith("N = 0") for name in lines)
        rendered = markdown(lines).splitlines()
        assert len(rendered) == len(lines) + 2
        assert len({len(line) for line in rendered}) == 1  # aligned
    ablation.draw(content, tmp_path / "figure.png")
    lines = table_lines(json.loads((RESULTS / "ablation-points.json").read_text()))
    assert lines["baseline"]["error"] == "0.000192 ± 0.000005"
    assert lines["baseline"]["above ratio"] == "> 8.1"


def make_teacher(name: str, source: str, classes: tuple[str, ...]):
    preset = PRESETS[name]
    image = replace(preset.data, image_size=1 if source == "points" else 8)
    model = ModelConfig(
        image_size=image.image_size,
        channels=image.channels,
        classes=len(classes),
        **parse_size("N/1" if source == "points" else "N/4"),
    )
    record = TeacherRecord(
        model=model,
        ode=FLOW_8,
        data=DataConfig(source, image.image_size, image.channels),
        classes=classes,
        class_weights=(),
        images=1,
        training=replace(preset.teacher, iterations=1),
    )
    return random_weights(DiT(model)), record


class NoEvaluator:
    """In place of evaluate.Evaluator, which trains a classifier."""

    has_captions = False

    def __init__(self, teacher, record, ode, *_, **__):
        self.record, self.teacher_row = record, dict(error=0.0, above=0.0)

    def noise(self, indices):
        count, config = len(indices), self.record.model
        x_T = torch.randn(count, config.channels, config.image_size, config.image_size)
        return x_T, torch.arange(count) % config.classes

    def __call__(self, run, title):
        images = run(*self.noise(range(2)))
        return dict(error=images.square().mean().item(), above=1.0)


def test_the_second_stage_starts_from_the_first(tmp_path, monkeypatch, few_shapes):
    """Both students of a row start from the same one of the first stage, which is trained once."""
    import data

    monkeypatch.setattr(ablation, "Evaluator", NoEvaluator)
    monkeypatch.chdir(tmp_path)
    teacher, record = make_teacher("shapes", "shapes", tuple(data.SHAPES))
    preset = PRESETS["shapes"]
    short = dict(iterations=2, batch=8)
    preset = replace(
        preset,
        trajectories=replace(preset.trajectories, count=8),
        distillation=replace(preset.distillation, **short),
        gan=GAN(discriminator_lr=1e-3, hidden=8, noise_level=0.02, weight=1.0, warmup=1),
        gan_training=replace(preset.gan_training, **short),
    )
    bench = Ablation(preset, teacher.eval().requires_grad_(False), record, Path("out"), 4, CPU)
    baseline = replace(bench.preset, gan=None)
    for student in pair(bench.preset, baseline, dict(gan=True)):
        bench.run(student, seed=0)
    first = torch.load("out/preset/0.pt", weights_only=True)
    assert first["record"]["gan"] is None
    for name, weight in (("gan_weight=0", 0.0), ("gan_weight=1", 1.0)):
        student = torch.load(f"out/{name}/0.pt", weights_only=True)
        assert student["record"]["gan"]["weight"] == weight
        assert student["record"]["training"] == first["record"]["training"]
    assert len(list(Path("out").glob("*/0.json"))) == 2  # the first stage is another row


def run(monkeypatch, capsys, *words):
    usual = ["ablation.py", "--preset", "points", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*usual, *words])
    ablation.main()
    return capsys.readouterr().out


@pytest.fixture
def tiny_points(tmp_path, monkeypatch):
    """The preset points, tiny, with a teacher in runs/points/teacher.pt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "Evaluator", NoEvaluator)
    preset = PRESETS["points"]
    preset = replace(
        preset,
        trajectories=replace(preset.trajectories, count=64),
        distillation=replace(preset.distillation, iterations=4, batch=8),
    )
    monkeypatch.setitem(config.PRESETS, "points", preset)
    teacher, record = make_teacher("points", "points", ("arm 0", "arm 1", "arm 2"))
    export(tmp_path / "runs/points/teacher.pt", "teacher", asdict(record), teacher.state_dict())
    return tmp_path / "runs/ablation/points"


def test_the_program(tiny_points, monkeypatch, capsys):
    folder = tiny_points
    printed = run(monkeypatch, capsys, "--factors", "baseline", "--worker", "1/2")
    assert (folder / "history_layers=0/0.json").exists()  # the control
    assert "| baseline" not in printed  # a row is shown when both of its students are there
    run(monkeypatch, capsys, "--factors", "steps", "--worker", "1/2")
    printed = run(monkeypatch, capsys, "--factors", "steps", "--seeds", "2")
    students = {str(file.relative_to(folder)) for file in folder.glob("*/[01].json")}
    controls = [f"steps={S},history_layers=0" for S in (1, 2, 8)]
    names = ["preset", "history_layers=0", "steps=2", "steps=8", *controls]
    assert students == {f"{name}/{seed}.json" for name in names for seed in (0, 1)}
    content = json.loads((folder / "ablation.json").read_text())
    assert markdown(table_lines(content)) in printed
    assert table_lines(content)["steps = 2"]["seeds"] == "2"
    assert "| steps = 1, N = 0 " in printed
    assert (folder / "ablation.png").stat().st_size > 10_000

    files = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")}
    again = run(monkeypatch, capsys, "--factors", "steps", "--seeds", "2")
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*.*")} == files
    assert "distilling" not in again
    run(monkeypatch, capsys, "--factors", "baseline", "--on-policy", "0.5")
    assert (folder / "ablation,on_policy=0.5.json").exists()


def test_what_the_user_can_put_right(tiny_points, monkeypatch, capsys):
    run(monkeypatch, capsys, "--factors", "baseline")
    file = tiny_points / "preset/0.json"
    whole = file.read_text()
    file.write_text(whole[:100])
    with pytest.raises(UserError, match="preset/0.json is damaged: remove it"):
        run(monkeypatch, capsys, "--factors", "baseline")
    file.write_text(whole)
    with pytest.raises(UserError, match="no factor 'width': choose from baseline, kind"):
        run(monkeypatch, capsys, "--factors", "width")
    with pytest.raises(UserError, match="another ablation: images is 5000 there and 250 here"):
        run(monkeypatch, capsys, "--factors", "baseline", "--images", "250")
