"""Few-step sampling against its definition, x̂_{τ_{s-1}} = G(x_T, …, x̂_{τ_s}), computed without a cache; and the
files that sample.py writes, read back with numpy and Pillow."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from model import HISTORIES
from sample import HELD_OUT, few_step, parse_labels, seen, table
from teacher import load_network
from test_distill import random_dit, student_of
from training import Fault, export


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("heads", [False, True])
def test_the_cache_changes_nothing(history, heads):
    student, about = student_of(random_dit(), history=history, step_heads=heads)
    x_T, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    states = [x_T]
    with torch.no_grad():
        for s in range(4):
            out = student(torch.stack(states, 1), torch.tensor(about["told"][: s + 1]), y)[:, -1]
            states.append(states[-1] - 0.25 * out)
    assert (states[-1] - x_T).abs().mean() > 0.1
    torch.testing.assert_close(few_step(student, about, x_T, y), torch.stack(states, 1), rtol=1e-5, atol=1e-5)


def test_shuffled_history_is_another_samples_history():
    x_T, y = torch.randn(3, 3, 8, 8), torch.tensor([1, 1, 1])
    student, about = student_of(random_dit(), history_layers=0)  # no history, nothing to shuffle
    torch.testing.assert_close(few_step(student, about, x_T, y, shuffle=True), few_step(student, about, x_T, y))

    student, about = student_of(random_dit())
    own, other = few_step(student, about, x_T, y), few_step(student, about, x_T, y, shuffle=True)
    torch.testing.assert_close(own[:, 1], other[:, 1])  # the first step has no history yet
    assert (own[:, -1] - other[:, -1]).abs().mean() > 1e-3
    same = x_T[:1].expand(3, -1, -1, -1)  # three times the same sample: its neighbour's history is its own
    torch.testing.assert_close(few_step(student, about, same, y, shuffle=True), few_step(student, about, same, y))


@pytest.mark.parametrize("path, times", [("flow", [1.0, 0.75, 0.5, 0.25, 0.0]), ("ddpm", [999, 749, 500, 250, -1])])
def test_seen_finds_the_image_behind_the_states(path, times):
    image, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor(times)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept = torch.tensor([1.0 if i < 0 else alpha_bar[int(i)] for i in times])
    alpha, sigma = (1 - t, t) if path == "flow" else (kept.sqrt(), (1 - kept).sqrt())
    states = torch.stack([a * image + s * noise for a, s in zip(alpha, sigma, strict=True)], 1)
    found = seen(dict(path=path), states, t)
    assert found.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(found, image[:, None].expand_as(found), atol=1e-3, rtol=1e-3)


@pytest.fixture
def student_file(tmp_path):
    student, about = student_of(random_dit())
    about |= dict(classes=["ant", "bee", "cat", "dog", "eel"], training=dict(iterations=1))
    export(tmp_path / "student.pt", about, student.state_dict())
    return tmp_path / "student.pt"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words), "--device", "cpu"])
    sample.main()


def test_files(student_file, tmp_path, monkeypatch):
    run(monkeypatch, student_file, "--count", 6, "--labels", "dog", 0, "--npz", "--png", "--trajectory", "--out",
        tmp_path / "a")
    images = np.load(tmp_path / "a/samples.npz")["arr_0"]
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8 and images.std() > 10
    singles = sorted((tmp_path / "a/images").iterdir())
    run(monkeypatch, student_file, "--count", 2, "--labels", "eel", "--png", "--out", tmp_path / "b")
    run(monkeypatch, student_file, "--count", 1, "--labels", "ant", "--png", "--out", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b/images").iterdir()] == ["00000-ant.png"]  # none of the run before
    assert [path.name for path in singles] == [f"{i:05d}-{'dog' if i % 2 == 0 else 'ant'}.png" for i in range(6)]
    assert np.array_equal(np.asarray(Image.open(singles[3])), images[3])
    sheet = np.asarray(Image.open(tmp_path / "a/grid.png"))  # 3 × 2 tiles of 8 pixels, eight times enlarged
    assert sheet.shape[:2] == (2 * 68 + 4, 3 * 68 + 4)
    assert np.array_equal(sheet[4:68:8, 4:68:8], images[0])
    assert Image.open(tmp_path / "a/trajectory.png").height == (5 + 4) * 68 + 4  # the states, then what they aimed at


def test_same_seed_same_images_at_any_batch_size(student_file, tmp_path, monkeypatch):
    for name, more in (("a", ("--batch", 5)), ("b", ("--batch", 2)), ("c", ("--seed", 1))):
        run(monkeypatch, student_file, "--count", 5, "--npz", "--out", tmp_path / name, *more)
    a, b, c = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "abc")
    assert abs(a - b).max() <= 1  # to rounding
    assert abs(a - c).mean() > 5


def test_no_image_is_made_from_a_noise_that_students_learn_from(student_file, tmp_path, monkeypatch):
    run(monkeypatch, student_file, "--count", 5, "--npz", "--out", tmp_path / "a")
    student, about = load_network(student_file, "student")
    made = {}
    for seed in (0, HELD_OUT):  # as trajectories have, and as evaluate.py
        made[seed] = data.to_uint8(few_step(student, about, *data.noise_and_labels(about, seed, range(5)))[:, -1])
    images = np.load(tmp_path / "a/samples.npz")["arr_0"]
    assert all(abs(images.astype(int) - other).mean() > 5 for other in made.values())


def test_labels():
    classes = ["ant", "bee", "10"]
    assert parse_labels(["bee", "0", "10"], classes) == [1, 0, 2]
    for wrong in ("wasp", "3", "-1"):
        with pytest.raises(Fault, match="from 0 to 2"):
            parse_labels([wrong], classes)


def test_a_student_takes_no_teachers_flags(student_file, tmp_path, monkeypatch):
    with pytest.raises(Fault, match="teachers"):
        run(monkeypatch, student_file, "--steps", 8, "--out", tmp_path / "a")


def test_table_leaves_blanks():
    lines = table({"one": dict(a=1, b=0.5), "two": dict(a=2)}, {"a": "d", "b": ".2f"}).splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["one", "1", "0.50"], ["two", "2"]]
