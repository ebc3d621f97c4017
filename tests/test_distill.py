"""The ARD loss is one pass over a whole trajectory. Here it is spelled out step by step, with the
Euler step of flow matching written by hand, x + (t' − t)·v; and a student's start is compared with
what its teacher does."""

import re
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch

import distill
import training
from config import MASKS
from distill import ard_loss, make_student, own_inputs
from files import UserError, fingerprint, load_checkpoint
from machine import Runtime
from sample import few_step, student_times
from shards import read_meta
from teacher import solve
from tiny import (
    CPU,
    FLOW_8,
    SETTINGS,
    TEACHER,
    TRAINING,
    FewTrajectories,
    random_dit,
    student_of,
    write_teacher,
)

TIMESTEPS = torch.tensor([1000.0, 750.0, 500.0, 250.0])


def trajectory(count=3):
    torch.manual_seed(0)
    return torch.randn(count, 5, 3, 8, 8), torch.tensor([0, 4, 2, 1])[:count]


# ---- the worked example --------------------------------------------------------------------------


def docstring_row(title):
    """The numbers that stand behind a title in the docstring's table."""
    [line] = [line for line in distill.__doc__.splitlines() if title in line]
    words = re.findall(r"\d+(?:/\d+)?", line.partition(title)[2])
    return [float(Fraction(word)) for word in words]


def test_the_worked_example_of_the_docstring():
    """S = 4, where the teacher takes 24 Euler steps with flow matching."""

    class Trajectories(FewTrajectories):
        ode, target_steps = replace(FLOW_8, euler_steps=24), (6, 12, 18, 24)

    _, record = make_student(random_dit(), TEACHER, SETTINGS, Trajectories(), TRAINING)
    student = record.student
    assert docstring_row("after Euler steps") == [0, *student.target_steps] == [0, 6, 12, 18, 24]
    times = student_times(student).tolist()
    assert docstring_row("time t") == times == [1, 0.75, 0.5, 0.25, 0]
    timesteps = list(student.timesteps)
    assert docstring_row("timestep for the network") == timesteps == [1000, 750, 500, 250]


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("output", ["direction", "state"])
def test_one_pass_is_s_steps(mask, output):
    model, record = student_of(random_dit(), mask=mask, output=output)
    x, y = trajectory()
    expected = 0
    for s in range(4):  # the student reads s + 1 of the teacher's states and predicts the next
        out = model(x[:, : s + 1], TIMESTEPS[: s + 1], y)[:, s]
        prediction = out if output == "state" else x[:, s] - 0.25 * out
        expected = expected + ((prediction - x[:, s + 1]) ** 2).mean() / 4
    loss = ard_loss(model, record.student, x, y)
    assert loss > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_teachers_own_steps_cost_nothing():
    x, y = trajectory()
    perfect = {"direction": (x[:, 1:] - x[:, :-1]) / -0.25, "state": x[:, 1:]}  # v = Δx / Δt
    for output, prediction in perfect.items():
        _, record = student_of(random_dit(), output=output)
        for error, low, high in ((0, 0, 1e-10), (1, 0.05, 2)):
            loss = ard_loss(lambda *_, p=prediction, e=error: p + e, record.student, x, y)
            assert low <= loss < high


def test_a_direction_weighs_its_error_with_the_square_of_the_step():
    """x̂_{t'} − x_{t'} = (t' − t)·(v̂ − v)."""
    _, record = student_of(random_dit())
    student = replace(record.student, target_steps=(4, 5, 7, 8))
    x, y = trajectory()
    lengths = torch.tensor([1 / 2, 1 / 8, 1 / 4, 1 / 8]).view(4, 1, 1, 1)
    v = (x[:, 1:] - x[:, :-1]) / -lengths
    loss = ard_loss(lambda *_: v + 3, student, x, y)
    torch.testing.assert_close(loss, 9 * lengths.square().mean())


def test_a_fraction_of_the_batch_reads_its_own_history():
    """Its targets remain the teacher's states."""
    model, record = student_of(random_dit())
    student, (x, y) = record.student, trajectory(4)
    own = few_step(model, student, x[:, 0], y)
    on_policy = (own[:2, 1:] - x[:2, 1:]).square().mean()
    mixed = (on_policy + ard_loss(model, student, x[2:], y[2:])) / 2
    found = ard_loss(model, student, x, y, on_policy=0.5)
    torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-5)
    assert abs(ard_loss(model, student, x, y) - mixed) > 1e-3


def test_no_gradient_flows_through_the_students_own_history():
    model, record = student_of(random_dit())
    student, (x, y) = record.student, trajectory(4)
    own = own_inputs(model, student, x[:, 0], y)
    assert own.shape == (4, 4, 3, 8, 8) and not own.requires_grad
    assert torch.equal(own, few_step(model, student, x[:, 0], y)[:, :4])

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    as_data = torch.cat([own, x[:, 4:]], dim=1)  # own states as history, and the last target
    loss = ard_loss(model, student, x, y, on_policy=1.0)
    targets = (distill.predict_all(model, student, as_data[:, :4], y) - x[:, 1:]).square().mean()
    torch.testing.assert_close(loss, targets)
    gradients = [torch.autograd.grad(one, weights) for one in (loss, targets)]
    for found, expected in zip(*gradients, strict=True):
        assert found.abs().sum() > 0
        torch.testing.assert_close(found, expected)


# ---- the student ---------------------------------------------------------------------------------


def test_without_history_a_student_starts_as_the_teacher_in_few_steps():
    teacher = random_dit()
    model, record = student_of(teacher, history_layers=0)
    x, y = trajectory()
    states, _ = solve(teacher, replace(FLOW_8, euler_steps=4), x[:, 0], y)
    assert (states[:, -1] - x[:, 0]).abs().mean() > 0.1
    found = few_step(model, record.student, x[:, 0], y)
    torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)


def test_the_noise_shortcut_changes_nothing_at_the_start_and_learns():
    x, y = trajectory()
    without, record = student_of(random_dit())
    model, _ = student_of(random_dit(), noise_shortcut=True)
    loss = ard_loss(model, record.student, x, y)
    assert torch.equal(loss, ard_loss(without, record.student, x, y))
    loss.backward()
    assert model.noise_shortcut.weight.grad.abs().sum() > 0


def test_extra_layers_change_nothing_at_the_start_and_learn():
    x, y = trajectory()
    usual, record = student_of(random_dit())
    model, _ = student_of(random_dit(), extra_layers=1)
    assert len(model.blocks) == len(usual.blocks) + 1
    loss = ard_loss(model, record.student, x, y)
    assert torch.equal(loss, ard_loss(usual, record.student, x, y))
    loss.backward()
    assert model.blocks[-1].adaLN_modulation[-1].weight.grad.abs().sum() > 0


def test_output_layers_start_as_copies_and_learn_apart():
    model, record = student_of(random_dit(), output_layer_per_step=True)
    assert len(model.output_layer_names) == 4 == record.model.output_layers
    x, y = trajectory()
    shared, _ = student_of(random_dit())
    loss = ard_loss(model, record.student, x, y)
    torch.testing.assert_close(loss, ard_loss(shared, record.student, x, y))
    loss.backward()
    layers = [getattr(model, name).linear for name in model.output_layer_names]
    gradients = [layer.weight.grad for layer in layers]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert not torch.equal(gradients[0], gradients[3])


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_reach_every_weight(mask, shortcut):
    model, record = student_of(random_dit(), mask=mask, noise_shortcut=shortcut)
    ard_loss(model, record.student, *trajectory()).backward()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    assert [name for name, w in trained.items() if not w.grad.abs().sum() > 0] == []


def test_the_record_says_where_a_student_comes_from():
    teacher = random_dit()
    _, record = student_of(teacher)
    assert record.teacher == fingerprint(teacher.state_dict())
    assert (record.data, record.classes, record.trajectories) == (TEACHER.data, TEACHER.classes, 8)
    assert (record.student.ode, record.training) == (FLOW_8, TRAINING)
    other = replace(FLOW_8, guidance_scale=3.0)  # trajectories may have been made with another ODE

    class Trajectories(FewTrajectories):
        ode = other

    _, record = make_student(teacher, TEACHER, SETTINGS, Trajectories(), TRAINING)
    assert record.student.ode == other


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(targets="x0"), "use --output state, or --targets states"),
        (dict(timesteps=(1.0,)), "1 timesteps are given for 4 steps"),
        (dict(history_layers=7), "7 history layers: the network has 6"),
        (dict(mask="future"), "no mask 'future'"),
    ],
)
def test_settings_that_contradict_one_another(wrong, says):
    with pytest.raises(UserError, match=says):
        student_of(random_dit(), **wrong)


# ---- training ------------------------------------------------------------------------------------


def train(file, runtime=CPU, record_changes=None, **settings):
    model, record = student_of(random_dit(), **settings)
    record = replace(record, **(record_changes or {}))
    ema, losses = distill.distill(model, record, FewTrajectories(), file, runtime)
    return model, record, losses


def test_training_learns(tmp_path):
    model, record, _ = train(tmp_path / "student.pt")
    fresh, _ = student_of(random_dit())
    x, y = FewTrajectories().batch(list(range(8)))
    trained = ard_loss(model, record.student, x, y)  # `model` itself was trained
    assert trained < 0.7 * ard_loss(fresh, record.student, x, y)


def test_a_micro_batch_must_hold_a_sample_that_reads_its_own_history(tmp_path):
    changes = dict(training=replace(TRAINING, on_policy=0.2))  # of 4: one; of 2: none
    with pytest.raises(UserError, match="--on-policy 0.2 of a micro-batch of 2 is less than one"):
        train(tmp_path / "a.pt", replace(CPU, accumulate=4), changes)


def test_compiled_layers_compute_the_same(tmp_path, monkeypatch):
    """In a training pass, and in the student's own sampling with the cache."""
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    changes = dict(training=replace(TRAINING, iterations=4, on_policy=0.5))
    losses = []
    for use in (False, True):
        runtime = replace(CPU, compile=use)
        losses.append(train(tmp_path / f"{use}.pt", runtime, changes, noise_shortcut=True)[2])
    assert torch.tensor(losses[1]).allclose(torch.tensor(losses[0]), rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("accumulate, path", [(1, "flow"), (2, "ddpm")])
def test_a_recorded_pass_computes_the_same(accumulate, path, tmp_path, monkeypatch):
    """On CUDA, training passes are recorded after the third iteration. The student's direction and
    its own history need all that a noise path looks up."""
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    monkeypatch.setattr(FewTrajectories, "ode", replace(FewTrajectories.ode, noise_path=path))
    changes = dict(training=replace(TRAINING, iterations=12, on_policy=0.5))
    losses = []
    for recorded in (False, True):
        monkeypatch.setattr(Runtime, "can_record", recorded)
        runtime = Runtime(torch.device("cuda"), accumulate=accumulate)
        losses.append(train(tmp_path / f"{recorded}.pt", runtime, changes, noise_shortcut=True)[2])
    assert len({loss for _, loss in losses[0]}) == 12
    assert torch.tensor(losses[1]).allclose(torch.tensor(losses[0]), rtol=1e-3)


# ---- the program ---------------------------------------------------------------------------------


def test_both_students_are_checked_before_one_is_trained(tmp_path, monkeypatch):
    """student.pt was removed, and no-history.pt is that of another training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "report", lambda *given: None)
    write_teacher("teacher.pt")
    words = "--preset shapes --teacher teacher.pt --count 8 --batch 4 --device cpu --out run"
    for iterations in ("1", "2"):
        monkeypatch.setattr(
            sys, "argv", ["distill.py", *words.split(), "--iterations", iterations]
        )
        if iterations == "1":
            distill.main()
            Path("run/student.pt").unlink()
    with pytest.raises(UserError, match="run/no-history.pt holds another training: iterations"):
        distill.main()
    assert not Path("run/student.pt").exists()


def test_a_teacher_in_the_folder_of_a_run_is_taken_with_its_trajectories(tmp_path, monkeypatch):
    """python teacher.py --out X, then python distill.py --out X."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "report", lambda *given: None)
    write_teacher("X/teacher.pt", seed=5)
    write_teacher("other.pt", seed=6)
    words = "--preset shapes --count 8 --iterations 1 --batch 4 --no-control --device cpu"
    for more in ("--out X", "--out Y --teacher other.pt"):
        monkeypatch.setattr(sys, "argv", ["distill.py", *words.split(), *more.split()])
        distill.main()
    taken = [load_checkpoint(f"{run}/student.pt", "student")["record"].teacher for run in "XY"]
    assert taken == [fingerprint(random_dit(seed).half().float().state_dict()) for seed in (5, 6)]
    for folder, teacher in zip(("X", "runs/shapes"), taken, strict=True):
        assert read_meta(f"{folder}/trajectories")["teacher"] == teacher
