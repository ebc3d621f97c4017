"""The training loop against what it promises. A training that was stopped (by a crash, by a real
signal to a real process) and started again ends with the very bits of one that was not. Optimizer,
schedule and EMA agree with a plain loop that is written here. Whatever is in the way is left as it
was.
"""

import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import teacher
import training
from config import Training
from figures import draw_losses
from files import UserError, export, load_checkpoint
from machine import Runtime
from test_files import RECORD
from training import learning_rate, micro_batches, train

ROOT = Path(training.__file__).resolve().parent
CPU = Runtime(torch.device("cpu"))
ALL_SAVED = {  # what a checkpoint holds
    "kind",
    "record",
    "ema",
    "model",
    "optimizer",
    "scaler",
    "iteration",
    "losses",
    "loss_sum",
}


@pytest.fixture(autouse=True)
def log_often(monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 7)


def toy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def toy_loss(model, iteration):
    """A regression whose batch is a function of the iteration."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(iteration))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def toy_train(file, loss=toy_loss, record=RECORD, runtime=CPU, **more):
    """A training of 30 iterations whose batches hold nothing but the number of the iteration."""

    def batch_at(iteration):
        return (torch.full((4,), iteration),)

    def loss_of(model, iterations):
        return loss(model, int(iterations[0]))

    return train("classifier", toy_model(), loss_of, batch_at, file, record, runtime, **more)


def same(a, b) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def at_iteration(k, action):
    """toy_loss that first does something at iteration k."""

    def loss(model, iteration):
        if iteration == k:
            action()
        return toy_loss(model, iteration)

    return loss


def crash():
    raise RuntimeError("the power went")


def crashed(file, k, **more):
    """A training that saves after each iteration, and ends in the middle of iteration k."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.SaveClock, "due", lambda clock: True)
        with pytest.raises(RuntimeError, match="the power went"):
            toy_train(file, at_iteration(k, crash), **more)


# ---- stopped and continued -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 17, 29])  # right at an entry of the log, and between two
def test_a_training_that_crashed_continues_to_the_very_same_end(tmp_path, k):
    whole, losses = toy_train(tmp_path / "whole.pt")
    crashed(tmp_path / "cut.pt", k)
    assert read(tmp_path / "cut.pt")["iteration"] == k
    done = []

    def loss(model, iteration):
        done.append(iteration)
        return toy_loss(model, iteration)

    continued, same_losses = toy_train(tmp_path / "cut.pt", loss)
    assert done == list(range(k, 30))
    assert same(read(tmp_path / "cut.pt"), read(tmp_path / "whole.pt"))
    assert same(continued.state_dict(), whole.state_dict()) and losses == same_losses
    assert losses[-1][1] < losses[0][1] and read(tmp_path / "whole.pt").keys() == ALL_SAVED


@pytest.fixture
def handlers():
    """A signal that nobody catches fails a test here, instead of ending pytest."""

    def uncaught(number, frame):
        raise AssertionError(f"signal {number} was not caught")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, uncaught) for number in numbers}
    yield dict.fromkeys(numbers, uncaught)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_saves_and_stops(tmp_path, handlers, number):
    press = partial(signal.raise_signal, number)
    with pytest.raises(KeyboardInterrupt, match="holds 12 of 30 iterations"):
        toy_train(tmp_path / "cut.pt", at_iteration(11, press))
    assert {n: signal.getsignal(n) for n in handlers} == handlers  # as they were before
    assert read(tmp_path / "cut.pt")["iteration"] == 12
    toy_train(tmp_path / "cut.pt")
    toy_train(tmp_path / "whole.pt")
    assert same(read(tmp_path / "cut.pt"), read(tmp_path / "whole.pt"))


def test_a_second_signal_stops_at_once(tmp_path, handlers):
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path / "cut.pt", at_iteration(11, press_twice))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SLOW_TEACHER = """
import runpy, sys, time, data
draw = data.Dataset.draw
def slow_draw(*words):
    print("a batch", flush=True)
    time.sleep(0.05)
    return draw(*words)
data.Dataset.draw = slow_draw
sys.argv[0] = "teacher.py"
runpy.run_path("teacher.py", run_name="__main__")
"""


def test_ctrl_c_to_a_real_process(tmp_path, monkeypatch, one_thread):
    """teacher.py is slowed down, so that the signal falls in the middle on any machine. Then the
    same training is continued in this process, with as many threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    flags = "--preset points --iterations 60 --batch 16 --device cpu --out".split()
    slow = [sys.executable, "-c", SLOW_TEACHER, *flags, tmp_path / "cut"]
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, **options)
    try:
        batches = 0
        while batches < 10 and (line := process.stdout.readline()):
            batches += line == "a batch\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("stopped") and "Traceback" not in errors
    cut, whole = tmp_path / "cut" / "teacher.pt", tmp_path / "whole" / "teacher.pt"
    done = read(cut)["iteration"]
    assert 0 < done < 60 and f"{cut} holds {done} of 60 iterations" in errors

    monkeypatch.setattr(training, "LOG_EVERY", 50)  # as in the process
    for file in (cut, whole):
        monkeypatch.setattr(sys, "argv", ["teacher.py", *flags, str(file.parent)])
        teacher.main()
    continued, expected = read(cut), read(whole)
    assert expected["iteration"] == 60 and expected["losses"] and expected["optimizer"]["state"]
    assert not same(expected["model"], expected["ema"])
    assert continued.keys() == expected.keys() == ALL_SAVED
    for part in expected:
        assert same(continued[part], expected[part]), part


def test_a_finished_training_is_not_run_again(tmp_path):
    whole, losses = toy_train(tmp_path / "out.pt")
    before = (tmp_path / "out.pt").read_bytes()
    again, same_losses = toy_train(tmp_path / "out.pt", at_iteration(0, crash))
    assert same(again.state_dict(), whole.state_dict()) and losses == same_losses
    assert (tmp_path / "out.pt").read_bytes() == before


# ---- what an iteration does ----------------------------------------------------------------------


def plain_loop(iterations=30, lr=0.1, ema_decay=0.7, limit=1.0):
    """Adam; the learning rate, clipping and EMA by hand. Returns the weights, their EMA (lists of
    floats), the losses, and how often a gradient was clipped."""
    model, losses, clipped = toy_model(), [], 0
    ema = nn.utils.parameters_to_vector(model.parameters()).tolist()
    adam = torch.optim.Adam(model.parameters())
    for i in range(iterations):
        warmup = min(1, (i + 1) / max(1, iterations // 20))
        adam.param_groups[0]["lr"] = lr * warmup * (1 + math.cos(math.pi * i / iterations)) / 2
        loss = toy_loss(model, i)
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(w.grad.square().sum().item() for w in model.parameters()))
        for w in model.parameters():
            w.grad *= min(1, limit / norm)
        clipped += norm > limit
        adam.step()
        decay = min(ema_decay, (1 + i) / (10 + i))  # below ema_decay until iteration 20
        weights = nn.utils.parameters_to_vector(model.parameters()).tolist()
        ema = [decay * a + (1 - decay) * w for a, w in zip(ema, weights, strict=True)]
        losses.append(loss.item())
    return weights, ema, losses, clipped


def test_training_is_adam_with_warm_up_cosine_clipping_and_an_ema(tmp_path):
    weights, ema, losses, clipped = plain_loop()
    assert 0 < clipped < 30
    returned, logged = toy_train(tmp_path / "out.pt")
    trained = toy_model()
    trained.load_state_dict(read(tmp_path / "out.pt")["model"])
    expected = {trained: weights, returned: ema}
    for model, values in expected.items():
        found = nn.utils.parameters_to_vector(model.parameters())
        assert torch.allclose(found, torch.tensor(values), atol=1e-5)
    gap = torch.tensor(weights) - torch.tensor(ema)
    assert gap.abs().max() > 1e-3  # the two are not the same
    means = [(end, sum(losses[end - 7 : end]) / 7) for end in (7, 14, 21, 28)]
    means.append((30, sum(losses[28:]) / 2))
    assert torch.allclose(torch.tensor(logged), torch.tensor(means), rtol=1e-3)


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    constant = Training(200, 4, lr=2.0, ema_decay=0.9, schedule="constant")
    rates = [learning_rate(i, constant) for i in range(200)]
    assert rates == pytest.approx([0.2 * k for k in range(1, 11)] + [2.0] * 190)
    cosine = replace(constant, schedule="cosine")
    rates = [learning_rate(i, cosine) for i in range(200)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    half = math.sqrt(0.5)
    assert [rates[i] for i in (50, 100, 150)] == pytest.approx([1 + half, 1, 1 - half])
    assert 0 < rates[199] < 0.001
    assert learning_rate(0, replace(constant, iterations=10)) == 2.0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_micro_batches_are_the_batch_in_order(accumulate):
    x, y = torch.arange(24.0).view(8, 3), torch.arange(8)
    batches = micro_batches((x, y), replace(CPU, accumulate=accumulate))
    assert len(batches) == accumulate
    for found, whole in zip(map(torch.cat, zip(*batches, strict=True)), (x, y), strict=True):
        assert torch.equal(found, whole)
    with pytest.raises(UserError, match="a batch of 8 cannot be split evenly"):
        micro_batches((x, y), replace(CPU, accumulate=3))


def test_micro_batches_change_no_weight_but_by_rounding(tmp_path):
    def batch_at(iteration):
        return (torch.randn(8, 3, generator=torch.Generator().manual_seed(iteration)),)

    def loss_of(model, x):
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    emas, logs = [], []
    for accumulate in (1, 4):
        runtime, file = replace(CPU, accumulate=accumulate), tmp_path / f"{accumulate}.pt"
        ema, log = train("classifier", toy_model(), loss_of, batch_at, file, RECORD, runtime)
        emas.append(ema.state_dict())
        logs.append(torch.tensor(log))
    torch.testing.assert_close(emas[0], emas[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-4, atol=1e-5)


def test_a_preview_sees_the_ema_ten_times(tmp_path):
    seen = []
    ema, _ = toy_train(tmp_path / "a.pt", preview=lambda ema, i: seen.append((ema, i)))
    assert [i for _, i in seen] == list(range(3, 31, 3)) and all(one is ema for one, _ in seen)


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    clock = training.SaveClock()

    def pass_time(seconds):
        now[0] += seconds

    for duration, pause in ((0.1, 60), (30, 600), (0.1, 60)):
        pass_time(601)
        assert clock.due()
        clock.timed(lambda duration=duration: pass_time(duration))
        pass_time(pause - 1)
        assert not clock.due()
        pass_time(2)
        assert clock.due()


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path):
    file = tmp_path / "out.pt"
    crashed(file, 10)
    before = file.read_bytes()
    for bad, k in ((math.nan, 15), (math.inf, 15), (math.inf, 29)):

        def loss(model, iteration, bad=bad, k=k):
            return toy_loss(model, iteration) * (bad if iteration == k else 1)

        with pytest.raises(UserError, match="not finite at iteration"):
            toy_train(file, loss)
        assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]

    def infinite_slope_at_the_end(model, iteration):  # of a loss that is finite, 0
        return (0 * model[0].bias).sum().sqrt() if iteration == 29 else toy_loss(model, iteration)

    with pytest.raises(UserError, match="not finite at iteration 30"):
        toy_train(file, infinite_slope_at_the_end)
    assert read(file)["iteration"] == 10
    assert all(weight.isfinite().all() for weight in read(file)["model"].values())


# ---- float16 -------------------------------------------------------------------------------------

FLOAT16 = Runtime(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_small_gradients_survive_in_float16_because_they_are_scaled(with_scaler):
    """Float16 holds nothing between 0 and 6e-8."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    scaler = training.make_scaler(FLOAT16) if with_scaler else None

    def loss_of(network, x):
        return 1e-9 * network(x).float().sum()

    gradients = []
    for runtime, chosen in ((CPU, None), (FLOAT16, scaler)):
        layer.zero_grad()
        training.accumulate_gradients(layer, loss_of, [(x,)], runtime, chosen)
        gradients.append(layer.weight.grad.clone())
    exact, short = gradients
    if with_scaler:
        torch.testing.assert_close(short / scaler.get_scale(), exact, rtol=1e-2, atol=0)
    else:
        assert exact.all() and not short.any()


def test_a_training_in_float16_learns_and_continues_to_the_bit(tmp_path):
    whole, losses = toy_train(tmp_path / "whole.pt", runtime=FLOAT16)
    assert losses[-1][1] < losses[0][1] / 2
    crashed(tmp_path / "cut.pt", 17, runtime=FLOAT16)
    assert read(tmp_path / "cut.pt")["scaler"]["_growth_tracker"] > 0
    continued, _ = toy_train(tmp_path / "cut.pt", runtime=FLOAT16)
    assert same(continued.state_dict(), whole.state_dict())
    assert same(read(tmp_path / "cut.pt"), read(tmp_path / "whole.pt"))


def test_a_step_with_an_infinite_gradient_is_left_out(tmp_path):
    """The gradient is scaled by 65,536 at first. Where that is infinite in float16, the next is
    scaled half as much."""
    def loss(model, iteration):
        return toy_loss(model, iteration) * (1e6 if iteration == 20 else 1)

    taken = {}
    for name, chosen in (("plain", toy_loss), ("spike", loss)):
        toy_train(tmp_path / f"{name}.pt", chosen, runtime=FLOAT16)
        saved = read(tmp_path / f"{name}.pt")
        left_out = math.log2(65536 / saved["scaler"]["scale"])
        taken[name] = saved["optimizer"]["state"][0]["step"]
        assert taken[name] == 30 - left_out
    assert taken["spike"] == taken["plain"] - 1


def test_a_gradient_that_is_infinite_at_any_scale_ends_the_training(tmp_path):
    def loss(model, iteration):
        return (0 * model[0].bias).sum().sqrt()

    record = replace(RECORD, training=replace(RECORD.training, iterations=100))
    with pytest.raises(UserError, match="the loss is not finite at iteration"):
        toy_train(tmp_path / "out.pt", loss, record, FLOAT16)


# ---- the curve -----------------------------------------------------------------------------------


def test_a_curve_of_the_losses_is_drawn_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "draw_losses", draw_losses)  # see conftest.py
    toy_train(tmp_path / "out.pt")
    assert Image.open(tmp_path / "out-loss.png").width > 500
    record = replace(RECORD, training=replace(RECORD.training, iterations=1))
    toy_train(tmp_path / "short.pt", record=record)
    assert (tmp_path / "short-loss.png").exists()


# ---- what is in the way --------------------------------------------------------------------------


def test_two_trainings_at_once_do_not_share_a_file(tmp_path):
    file = tmp_path / "out.pt"

    def second_training():
        with pytest.raises(UserError, match="another process is training .*out.pt now: wait"):
            toy_train(file)

    _, losses = toy_train(file, at_iteration(11, second_training))
    assert read(file)["losses"] == losses and not list(tmp_path.glob("*.lock"))
    assert not list(tmp_path.glob(".*"))


def test_a_killed_training_leaves_no_lock(tmp_path):
    script = "import sys, os, training, pathlib\n"
    script += "with training.lock_checkpoint(pathlib.Path(sys.argv[1])): os._exit(9)"
    command = [sys.executable, "-c", script, tmp_path / "out.pt"]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert (tmp_path / ".out.pt.lock").exists()
    toy_train(tmp_path / "out.pt")


def test_another_training_in_the_way_is_told_apart_by_one_setting(tmp_path):
    toy_train(tmp_path / "out.pt")
    before = (tmp_path / "out.pt").read_bytes()
    other = replace(RECORD, training=replace(RECORD.training, lr=0.2))
    with pytest.raises(UserError, match="holds another training: lr is 0.1 there and 0.2 here"):
        toy_train(tmp_path / "out.pt", record=other)
    assert (tmp_path / "out.pt").read_bytes() == before


def test_an_export_in_the_way_cannot_be_continued(tmp_path):
    export(tmp_path / "out.pt", "classifier", asdict(RECORD), toy_model().state_dict())
    before = (tmp_path / "out.pt").read_bytes()
    with pytest.raises(UserError, match="was exported, for use only"):
        toy_train(tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == before
    assert load_checkpoint(tmp_path / "out.pt", "classifier")["record"] == RECORD


@pytest.mark.parametrize(
    "change",
    [
        dict(optimizer={}),
        dict(optimizer=[]),
        dict(optimizer=dict(state={}, param_groups=[])),
        dict(model={}),
        dict(loss_sum="x"),
        dict(scaler="x"),
        dict(iteration=-5),
        dict(iteration=31),
    ],
)
def test_a_damaged_training_is_not_continued(tmp_path, change):
    file = tmp_path / "out.pt"
    crashed(file, 10, runtime=FLOAT16)
    torch.save(read(file) | change, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="out.pt (is damaged|holds the weights of)"):
        toy_train(file, runtime=FLOAT16)
    assert file.read_bytes() == before


@pytest.mark.parametrize("key, value", [("exp_avg", math.nan), ("exp_avg_sq", math.inf)])
def test_moments_that_are_not_finite_are_not_continued(tmp_path, key, value):
    file = tmp_path / "out.pt"
    crashed(file, 10)
    content = read(file)
    content["optimizer"]["state"][0][key].fill_(value)
    torch.save(content, file)
    with pytest.raises(UserError, match="moments are not those of the weights"):
        toy_train(file)


@pytest.mark.parametrize("part", ["ema", "model"])
def test_weights_that_are_not_finite_are_not_continued(tmp_path, part):
    file = tmp_path / "out.pt"
    toy_train(file)
    content = read(file)
    content[part]["0.bias"].fill_(math.nan)
    torch.save(content, file)
    with pytest.raises(UserError, match="0.bias holds values that are not finite"):
        toy_train(file)


def test_a_lack_of_memory_names_the_batch(tmp_path):
    def hungry_loss(model, iteration):
        return model(torch.empty(2**58)).mean()

    says = "out of memory, with 4 samples at a time .*--accumulate K"
    with pytest.raises(UserError, match=says):
        toy_train(tmp_path / "out.pt", hungry_loss)


@pytest.mark.parametrize("content", [b"a thesis", b""])
def test_another_file_in_the_way_is_not_overwritten(tmp_path, content):
    (tmp_path / "out.pt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        toy_train(tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == content
