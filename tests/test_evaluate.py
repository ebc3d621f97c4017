"""Exposure bias and attention against their definitions; the judge; the paper's count of what history costs."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import Dataset
from evaluate import Classifier, Judge, attention, costs_of, exposure_bias, features, load_runs, train_classifier
from sample import few_step
from teacher import ASSETS, load_network, solve
from test_distill import ABOUT, random_dit, student_of
from training import Fault, fingerprint


def test_exposure_bias_starts_at_nothing():
    teacher, (student, about) = random_dit(), student_of(random_dit(seed=1))
    about |= dict(marks=[2, 4, 6, 8])
    x_T, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    _, every, clean = solve(teacher, ABOUT, x_T, y, 8)
    errors = exposure_bias(student, about, every, few_step(student, about, x_T, y), y)
    assert len(errors["forced"]) == len(errors["own"]) == 4
    assert errors["forced"][0] == pytest.approx(errors["own"][0], rel=1e-4)  # the first step reads x_T either way
    assert abs(errors["forced"][3] - errors["own"][3]) > 1e-3

    truth, own = every[:, ::2], few_step(student, about, x_T, y)
    assert errors["own"][3] == pytest.approx(((own[:, 4] - truth[:, 4]) ** 2).mean().item(), rel=1e-5)
    with torch.no_grad():
        last = student(truth[:, :4], torch.tensor(about["told"]), y)[:, 3]
    wrong = (truth[:, 3] - 0.25 * last - truth[:, 4]).square().mean().item()
    assert errors["forced"][3] == pytest.approx(wrong, rel=1e-5)

    about |= dict(trajectory="clean", output="state")  # the student learns x̂_0 instead
    errors = exposure_bias(student, about, every, few_step(student, about, x_T, y), y)
    with torch.no_grad():
        last = student(torch.cat([x_T[:, None], clean[:, 1:6:2]], 1), torch.tensor(about["told"]), y)[:, 3]
    assert errors["forced"][3] == pytest.approx((last - clean[:, 7]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("history", ["window", "anchor", "causal"])
def test_attention_is_that_of_a_masked_softmax(history):
    """The first layer's shares, from its queries and keys and a mask of all by all."""
    student, about = student_of(random_dit(), history=history)
    states, y, told = torch.randn(3, 4, 3, 8, 8), torch.tensor([0, 4, 2]), torch.tensor(about["told"])
    inputs = {}
    hook = student.blocks[0].attn.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0]))
    shares = attention(student, states, y, told)
    hook.remove()
    assert len(shares) == 2  # history layers

    with torch.no_grad():
        q, k, _ = student.blocks[0].attn.qkv(inputs["x"]).view(3, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)  # 4 heads of 16
    i = torch.arange(16) // 4  # four tokens a state
    seen = {"window": i[:, None] - i <= 1, "anchor": (i == 0) | (i == i[:, None]), "causal": True}[history]
    visible = (i <= i[:, None]) & seen
    weights = (q @ k.mT / math.sqrt(16)).masked_fill(~visible, -math.inf).softmax(-1)
    expected = weights.view(3, 4, 4, 4, 4, 4).sum(-1).mean((0, 1, 3))  # (b, h, s n, s n) -> (s, s)
    assert 0.05 < expected[3, 3] < 0.95
    torch.testing.assert_close(torch.tensor(shares[0]), expected, rtol=1e-4, atol=1e-5)


def test_judge(tmp_path, monkeypatch, few_shapes):
    """It takes the teacher's images for what they are, notices one that is not finite, and asks for enough."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/classifiers").mkdir(parents=True)
    teacher, about = load_network(ASSETS / "shapes-teacher.pt", "teacher")
    monkeypatch.setattr("evaluate.train_classifier", lambda *args: Classifier(3, 16, 10))
    judge = Judge(teacher, about | dict(steps=2), 300, torch.device("cpu"))
    row = judge(lambda x_T, y: solve(teacher, about, x_T, y, 2)[1], "the same")
    assert row == judge.best and row["error"] == row["above"] == 0
    worse = judge(lambda x_T, y: solve(teacher, about, x_T, y, 2)[1] + 0.5, "brighter")
    assert worse["error"] == pytest.approx(0.25, rel=1e-5) and worse["above"] > 0
    with pytest.raises(Fault, match="not finite"):
        judge(lambda x_T, y: x_T[:, None] / 0, "broken")
    with pytest.raises(Fault, match="at least 200"):
        Judge(teacher, about, 100, torch.device("cpu"))

    cache = tmp_path / "cache.pt"  # of the teacher's images
    Judge(teacher, about | dict(steps=2), 300, torch.device("cpu"), cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:1000])
    for _ in range(2):  # made again, and then no more
        again = Judge(teacher, about | dict(steps=2), 300, torch.device("cpu"), cache=cache)
        assert torch.equal(again.target, judge.target) and len(cache.read_bytes()) == len(whole)
        monkeypatch.setattr("evaluate.solve", None)


def test_one_class_has_no_features(tmp_path):
    images = Dataset(np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64), ["face"])
    with pytest.raises(Fault, match="of one class"):
        train_classifier(images, dict(data="faces"), tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("image_size, channels", [(16, 3), (32, 1), (1, 2), (20, 3)])
def test_features(image_size, channels):
    torch.manual_seed(0)
    images = torch.rand(7, channels, image_size, image_size) * 2 - 1
    classifier = Classifier(channels, image_size, classes=4)
    found, predicted = features(classifier, images, batch=3)
    assert found.shape == (7, 64) and found.dtype == torch.float64 and predicted.shape == (7,)
    one, _ = features(classifier, images[4:5])
    torch.testing.assert_close(found[4:5], one, rtol=1e-4, atol=1e-5)


def test_the_papers_cost_of_history():
    rows = costs_of("DiT-XL/2", image_size=32, channels=4, S=4, history_layers=6)
    assert rows["none history"]["gmacs"] == pytest.approx(474.6, abs=0.2)
    assert rows["causal history"]["gmacs"] == pytest.approx(479.9, abs=0.2)
    assert rows["causal history"]["percent"] == pytest.approx(1.1, abs=0.05)
    assert rows["window history"]["percent"] == rows["anchor history"]["percent"] == pytest.approx(1.1 / 2, abs=0.03)


def test_several_runs_share_one_teacher(tmp_path, monkeypatch):
    for name in ("a", "b", "c/a"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(ASSETS / "shapes-student.pt", tmp_path / name / "student.pt")
    students, teacher = load_runs([tmp_path / "a", tmp_path / "b"], None, torch.device("cpu"))
    assert list(students) == ["a", "b"]
    assert {about["teacher"] for _, about in students.values()} == {fingerprint(teacher.state_dict())}
    (tmp_path / "b/teacher.pt").write_text("This is text.")  # may be another's: the search goes on
    assert list(load_runs([tmp_path / "b/student.pt"], None, torch.device("cpu"))[0]) == ["b"]
    shutil.copy(ASSETS / "shapes-teacher.pt", tmp_path / "b/teacher.pt")
    monkeypatch.setattr("evaluate.ASSETS", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "b")
    for run in (tmp_path / "b/student.pt", tmp_path / "b", Path("."), Path("student.pt")):
        assert list(load_runs([run], None, torch.device("cpu"))[0]) == ["b"]
    with pytest.raises(Fault, match="two runs are called a"):
        load_runs([tmp_path / "a", tmp_path / "c/a"], None, torch.device("cpu"))
    checkpoint = torch.load(ASSETS / "shapes-student.pt", weights_only=True)
    torch.save(checkpoint | dict(about=checkpoint["about"] | dict(guidance=3.0)), tmp_path / "other.pt")
    with pytest.raises(Fault, match="different teachers, or trajectories of different guidance"):
        load_runs([tmp_path / "a", tmp_path / "other.pt"], None, torch.device("cpu"))
