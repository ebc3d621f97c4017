"""The ARD loss is one pass over a whole trajectory. Here it is spelled out step by step, with the Euler step of flow
matching written by hand, x + (t' − t)·v, and a student's start is compared with what its teacher would do."""

import pytest
import torch

from distill import ard_loss, distill, make_student
from model import HISTORIES, DiT, size
from presets import COMMON
from sample import few_step
from teacher import solve
from training import Fault

CONFIG = dict(image_size=8, channels=3, classes=5, **size("N/4"))
ABOUT = dict(kind="teacher", model=CONFIG, path="flow", predicts="v", guidance=1.0, steps=8, data="shapes")
SETTINGS = COMMON | dict(
    steps=4, history="causal", history_layers=2, trajectory="states", output="direction", step_heads=False, told=None,
    iterations=60, batch=8, lr=2e-3, decay=0.9, bf16=False)
TIMES = dict(times=[1.0, 0.75, 0.5, 0.25, 0.0], told=[1000.0, 750.0, 500.0, 250.0])


def random_dit(seed=0, **changes):
    """A DiT whose weights are all random: a fresh one puts out zeros, and zeros agree with anything."""
    torch.manual_seed(seed)
    model = DiT(**CONFIG, **changes)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.08)
    return model


def student_of(teacher, **changes):
    student, about = make_student(teacher, ABOUT, SETTINGS | changes)
    return student, about | TIMES


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("output", ["direction", "state"])
def test_one_pass_is_s_steps(history, output):
    student, about = student_of(random_dit(), history=history, output=output)
    x, y = torch.randn(3, 5, 3, 8, 8), torch.tensor([0, 4, 2])
    expected = 0
    for s in range(4):  # the student has seen s + 1 states and is asked for the next
        out = student(x[:, : s + 1], torch.tensor(about["told"][: s + 1]), y)[:, s]
        step = x[:, s] + (about["times"][s + 1] - about["times"][s]) * out if output == "direction" else out
        expected = expected + ((step - x[:, s + 1]) ** 2).mean() / 4
    loss = ard_loss(student, about, x, y)
    assert loss > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_own_history():
    """The first half of the batch is fed what few_step makes of its noise, and is asked for the teacher's states."""
    student, about = student_of(random_dit())
    x, y = torch.randn(4, 5, 3, 8, 8), torch.tensor([0, 4, 2, 1])
    own = few_step(student, about, x[:, 0], y)
    mixed = ((own[:2, 1:] - x[:2, 1:]).square().mean() + ard_loss(student, about, x[2:], y[2:])) / 2
    torch.testing.assert_close(ard_loss(student, about, x, y, own=0.5), mixed, rtol=1e-4, atol=1e-5)
    assert abs(ard_loss(student, about, x, y) - mixed) > 1e-3
    ard_loss(student, about, x, y, own=1.0).backward()  # through the last pass alone, not through the history
    assert student.final_layer.linear.weight.grad.abs().sum() > 0


def test_the_teachers_own_steps_cost_nothing():
    x, y = torch.randn(2, 5, 3, 8, 8), torch.tensor([1, 3])
    perfect = {"direction": (x[:, 1:] - x[:, :-1]) / -0.25, "state": x[:, 1:]}  # v = Δx / Δt
    for output, answer in perfect.items():
        about = ABOUT | TIMES | dict(output=output)
        assert ard_loss(lambda x, t, y, answer=answer: answer, about, x, y) < 1e-10
        assert ard_loss(lambda x, t, y, answer=answer: answer + 1, about, x, y) > 0.05


def test_without_history_a_student_starts_as_the_teacher_in_few_steps():
    teacher = random_dit()
    student, about = student_of(teacher, history_layers=0)
    x_T, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    times, states, _ = solve(teacher, ABOUT, x_T, y, steps=4)
    assert times.tolist() == about["times"]
    assert (states[:, -1] - x_T).abs().mean() > 0.1
    torch.testing.assert_close(few_step(student, about, x_T, y), states, rtol=1e-5, atol=1e-5)


def test_step_heads_start_as_copies_and_learn_apart():
    student, about = student_of(random_dit(), step_heads=True)
    assert len(student.head_names) == 4 == about["model"]["step_heads"]
    x, y = torch.randn(2, 5, 3, 8, 8), torch.tensor([1, 3])
    shared, _ = student_of(random_dit())
    torch.testing.assert_close(ard_loss(student, about, x, y), ard_loss(shared, about, x, y))
    ard_loss(student, about, x, y).backward()
    gradients = [getattr(student, name).linear.weight.grad for name in student.head_names]
    assert all(g.abs().sum() > 0 for g in gradients) and not torch.equal(gradients[0], gradients[3])


@pytest.mark.parametrize("history", HISTORIES)
def test_gradients_reach_every_weight(history):
    student, about = student_of(random_dit(), history=history)
    ard_loss(student, about, torch.randn(2, 5, 3, 8, 8), torch.arange(2)).backward()
    still = [name for name, w in student.named_parameters() if w.requires_grad and not w.grad.abs().sum() > 0]
    assert still == []


class FewTrajectories:
    """Eight random trajectories, as data.Trajectories gives them."""
    meta = dict(teacher="-", guidance=1.0, guided_channels=None, steps=8, marks=[1, 2, 3, 4, 5, 6, 7, 8], seed=0)
    marks, times = [2, 4, 6, 8], TIMES["times"]

    def __len__(self):
        return 8

    def batch(self, indices):
        x = torch.randn(8, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return x[indices], torch.arange(8)[indices] % 5


def test_training_learns(tmp_path):
    student, about = make_student(random_dit(), ABOUT, SETTINGS)
    out, cpu = tmp_path / "student.pt", torch.device("cpu")
    _, about, losses = distill(student, about, FewTrajectories(), SETTINGS, out, cpu)
    assert about["times"] == TIMES["times"] and about["told"] == TIMES["told"] and about["marks"] == [2, 4, 6, 8]
    x, y = FewTrajectories().batch(list(range(8)))
    trained = ard_loss(student, about, x, y)  # `student` itself was trained
    fresh, _ = student_of(random_dit())
    assert trained < 0.7 * ard_loss(fresh, about, x, y)


def test_history_that_opens_late(tmp_path):
    """A layer that opens after 50 of 60 steps: what comes before is step distillation, bit for bit."""
    def run(**changes):
        student, about = make_student(random_dit(), ABOUT, SETTINGS | changes)
        out = tmp_path / f"{changes}.pt"
        return distill(student, about, FewTrajectories(), SETTINGS | changes, out, torch.device("cpu"))

    student, _, late = run(history_layers=1, opens=50 / 60)
    _, _, blind = run(history_layers=0)
    _, _, always = run(history_layers=1)
    assert student.history_layers == 1  # the average, which is what one samples from
    assert late[0] == blind[0] != always[0]  # the mean loss of the first 50 steps
    assert late[1] != blind[1]


def test_compiled_or_not(tmp_path, monkeypatch):
    """Compiled layers compute the same, in a step's one pass and in the student's own sampling with the cache."""
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend="aot_eager"))
    losses = []
    for compile in (False, True):
        settings = SETTINGS | dict(compile=compile, iterations=4, own=0.5)
        student, about = make_student(random_dit(), ABOUT, settings)
        out = tmp_path / f"{compile}.pt"
        losses.append(distill(student, about, FewTrajectories(), settings, out, torch.device("cpu"))[2])
    assert torch.tensor(losses[1]).allclose(torch.tensor(losses[0]), rtol=1e-4)


def test_settings_that_cannot_be():
    teacher = random_dit()
    for wrong in (dict(trajectory="clean"), dict(told=[1.0]), dict(opens=1.0), dict(history_layers=7),
                  dict(history="future")):
        with pytest.raises(Fault):
            make_student(teacher, ABOUT, SETTINGS | wrong)
