"""The training loop against what it promises: a run that was stopped (by a crash, by a real signal to a real process)
and started again ends with the very bits of one that was not; the optimiser, its schedule and the moving average agree
with a plain loop written here; and whatever goes wrong with a file is a Fault that leaves the file as it was.
"""

import copy
import io
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import training
from model import DiT
from training import Fault, fingerprint, learning_rate, load_checkpoint, pick_device, replace_file, train

ROOT = Path(training.__file__).resolve().parent
ABOUT = {"kind": "toy", "classes": ["a", "b"], "training": {"iterations": 30, "lr": 0.1}}
FIT = dict(iterations=30, batch=4, lr=0.1, decay=0.7, warmup=5, log_every=7)


def toy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def toy_loss(model, step):
    """A regression whose batch is a function of the step."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return 10 * (model(x) - x.sum(1, keepdim=True)).square().mean()


def toy_train(out, loss=toy_loss, about=ABOUT, **changes):
    """A training whose batches hold nothing but the number of their step."""
    return train("toy", toy_model(), lambda step: (torch.full((4,), step),),
                 lambda model, steps: loss(model, int(steps[0])), out, about, **FIT | changes)


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


def at_step(k, action):
    """toy_loss that first does something at step k."""
    def loss(model, step):
        if step == k:
            action()
        return toy_loss(model, step)
    return loss


def crash():
    raise RuntimeError("the power went")


# ---- stopped and continued ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 7, 17, 29])  # between two entries of the log, and right at one
def test_a_run_that_crashed_continues_to_the_very_same_end(tmp_path, k):
    whole, losses = toy_train(tmp_path / "whole.pt")
    with pytest.raises(RuntimeError, match="the power went"):
        toy_train(tmp_path / "cut.pt", at_step(k, crash), save_seconds=-1)  # saves at every step
    assert read(tmp_path / "cut.pt")["step"] == k
    steps = []
    continued, losses_too = toy_train(tmp_path / "cut.pt", lambda m, step: steps.append(step) or toy_loss(m, step))
    assert steps == list(range(k, 30))
    assert same(read(tmp_path / "cut.pt"), read(tmp_path / "whole.pt"))
    assert same(continued.state_dict(), whole.state_dict()) and losses == losses_too
    assert not same(whole.state_dict(), toy_model().state_dict()) and losses[-1][1] < losses[0][1]


@pytest.fixture
def handlers():
    """Signals that nobody catches fail a test here, instead of ending pytest."""
    def uncaught(number, _):
        raise AssertionError(f"signal {number} was not caught")

    old = {number: signal.signal(number, uncaught) for number in (signal.SIGINT, signal.SIGTERM)}
    yield dict.fromkeys(old, uncaught)
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, handlers, number):
    with pytest.raises(KeyboardInterrupt, match="holds 12 of 30 steps"):
        toy_train(tmp_path / "cut.pt", at_step(11, lambda: signal.raise_signal(number)))
    assert {n: signal.getsignal(n) for n in handlers} == handlers  # as they were before
    assert read(tmp_path / "cut.pt")["step"] == 12
    toy_train(tmp_path / "cut.pt")
    toy_train(tmp_path / "whole.pt")
    assert same(read(tmp_path / "cut.pt"), read(tmp_path / "whole.pt"))


def test_a_second_signal_stops_at_once(tmp_path, handlers):
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path / "cut.pt", at_step(11, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]))
    assert not list(tmp_path.iterdir())


TEACHER = ["--preset", "points", "--iterations", "60", "--batch", "16", "--device", "cpu", "--out"]
SLOWLY = """
import runpy, sys, time, data
draw = data.Dataset.draw
def slow_draw(*args):
    print("a batch", flush=True)
    time.sleep(0.05)
    return draw(*args)
data.Dataset.draw = slow_draw
sys.argv[0] = "teacher.py"
runpy.run_path("teacher.py", run_name="__main__")
"""


def test_ctrl_c_to_a_real_process(tmp_path):
    """teacher.py, slowed so that the signal must fall in the middle on any machine; then the plain command again."""
    options = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stderr=subprocess.PIPE)
    plain = [sys.executable, "teacher.py", *TEACHER]
    slow = [sys.executable, "-c", SLOWLY, *TEACHER, tmp_path / "cut"]
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
    cut = tmp_path / "cut" / "teacher.pt"
    assert 0 < read(cut)["step"] < 60 and f"{cut} holds {read(cut)['step']} of 60 steps" in errors

    subprocess.run([*plain, tmp_path / "cut"], check=True, stdout=subprocess.PIPE, **options)
    subprocess.run([*plain, tmp_path / "whole"], check=True, stdout=subprocess.PIPE, **options)
    continued, whole = read(cut), read(tmp_path / "whole" / "teacher.pt")
    assert whole["step"] == 60 and whole["losses"] and whole["optimiser"]["state"]
    assert whole["model"].keys() == whole["ema"].keys() and not same(whole["model"], whole["ema"])
    for part in whole:
        assert same(continued[part], whole[part]), part


def test_a_finished_run_is_not_run_again(tmp_path):
    whole, losses = toy_train(tmp_path / "out.pt")
    before = (tmp_path / "out.pt").read_bytes()
    again, losses_too = toy_train(tmp_path / "out.pt", at_step(0, crash))
    assert same(again.state_dict(), whole.state_dict()) and losses == losses_too
    assert (tmp_path / "out.pt").read_bytes() == before


# ---- what a step does -----------------------------------------------------------------------------------------------

def test_training_is_adam_with_warm_up_cosine_clipping_and_an_average(tmp_path):
    """Against a plain loop: Adam, its rate by hand, gradients scaled by hand, the average in Python floats."""
    model, total, clipped = toy_model(), 0.0, 0
    average = [w.tolist() for w in nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    adam, expected = torch.optim.Adam(model.parameters()), []
    for step in range(30):
        adam.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / 30)) / 2
        loss = toy_loss(model, step)
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(w.grad.square().sum().item() for w in model.parameters()))
        for w in model.parameters():
            w.grad *= min(1, 0.5 / norm)
        clipped += norm > 0.5
        adam.step()
        decay = min(0.7, (1 + step) / (10 + step))  # 0.7 from step 20 on
        now = nn.utils.parameters_to_vector(model.parameters()).tolist()
        average = [decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)]
        total += loss.item()
        if (step + 1) % 7 == 0 or step == 29:
            expected.append((step + 1, total / (7 if step < 29 else 2)))
            total = 0.0
    assert 0 < clipped

    returned, losses = toy_train(tmp_path / "out.pt", clip=0.5)
    trained = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    trained.load_state_dict(read(tmp_path / "out.pt")["model"])
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in (trained, model, returned)]
    assert torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert torch.allclose(vectors[2], torch.tensor(average), atol=1e-5)
    assert (vectors[0] - vectors[2]).abs().max() > 1e-3  # the average is not the model
    assert [step for step, _ in losses] == [7, 14, 21, 28, 30]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-3)


def test_learning_rate_warms_up_and_follows_its_schedule():
    constant = [2 * learning_rate(step, 100, 10, "constant") for step in range(100)]
    assert constant == pytest.approx([0.2 * k for k in range(1, 11)] + [2.0] * 90)
    cosine = [2 * learning_rate(step, 100, 10, "cosine") for step in range(100)]
    assert cosine[25] == pytest.approx(1 + math.sqrt(0.5)) and cosine[50] == pytest.approx(1.0)
    assert cosine[75] == pytest.approx(1 - math.sqrt(0.5)) and 0 < cosine[99] < 0.001
    assert cosine[0] == pytest.approx(0.2) and cosine[:10] == sorted(cosine[:10])
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert learning_rate(0, 10, 0, "constant") == 1.0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path):
    out = tmp_path / "out.pt"
    with pytest.raises(RuntimeError, match="the power went"):
        toy_train(out, at_step(10, crash), save_seconds=-1)
    before = out.read_bytes()
    for bad, k in ((math.nan, 15), (math.inf, 15), (math.inf, 29)):
        with pytest.raises(Fault, match="not finite"):
            toy_train(out, lambda model, step, bad=bad, k=k: toy_loss(model, step) * (bad if step == k else 1))
        assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    assert all(w.isfinite().all() for w in read(out)["model"].values()) and read(out)["step"] == 10


# ---- files ----------------------------------------------------------------------------------------------------------

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"  # a reader in the middle of the writing
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", [lambda file: torch.save({"w": torch.ones(1_000_000)}, file),
                                   lambda file: file.write(bytes(4_000_000))])
@pytest.mark.parametrize("room", [0, 100, 1_000_000, 3_999_999])
def test_a_full_disk_is_an_error_that_says_so(tmp_path, write, room):
    """A limit on the size of files stands in for it."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError):
            replace_file(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stroke", [1, 2, 3])
def test_ctrl_c_while_saving(tmp_path, stroke):
    class Impatient:
        strokes = 0

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.strokes += 1
            if self.strokes == stroke:
                raise KeyboardInterrupt
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", lambda file: torch.save({"w": torch.ones(1_000_000)}, Impatient(file)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path):
    left, others = tmp_path / ".file.0a.part", [tmp_path / ".file.0b.part", tmp_path / ".other.0a.part"]
    for file in (left, *others):
        file.touch()
    for file in (left, others[1]):  # the other one of this file is being written now, for all we know
        os.utime(file, (0, 0))
    replace_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert {*tmp_path.iterdir()} == {tmp_path / "file", *others}


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


GOOD = {"about": {"kind": "toy"}, "ema": {"w": torch.ones(1000)}}


def saved_in_the_old_way(content) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


DAMAGED = {  # what the file holds, and what the Fault says
    "nothing there": (None, "no such checkpoint"),
    "empty": (b"", "cannot be read"),
    "text": (b"hello, I am a text file\n", "cannot be read"),
    "text that starts like a pickle": (b"some notes", "cannot be read"),
    "cut at the end": (saved(GOOD)[:-500], "cannot be read"),
    "cut at the start": (saved(GOOD)[:100], "cannot be read"),
    "old, cut at the end": (saved_in_the_old_way(GOOD)[:-500], "cannot be read"),
    "old, cut in the middle": (saved_in_the_old_way(GOOD)[:120], "cannot be read"),
    "old, cut at the start": (saved_in_the_old_way(GOOD)[:28], "cannot be read"),
    "a pickled object": (pickle.dumps(Path("a"), 2), "cannot be read"),
    "a pickled dict": (pickle.dumps(dict(about=dict(kind="toy"), ema={}), 2), "cannot be read"),
    "a saved object": (saved(Path("a")), "cannot be read"),
    "a saved list": (saved([1, 2, 3]), "not a checkpoint of this project"),
    "only weights": (saved({"w": torch.ones(3)}), "not a checkpoint of this project"),
    "no weights": (saved({"about": {"kind": "toy"}}), "not a checkpoint of this project"),
    "another kind": (saved(GOOD | {"about": {"kind": "student"}}), "holds a student, and a toy is needed"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_not_the_checkpoint_wanted_is_a_fault(tmp_path, what):
    path, (content, says) = tmp_path / "x.pt", DAMAGED[what]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Fault, match=says) as fault:
        load_checkpoint(path, "toy")
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


def test_a_good_checkpoint_loads_as_any_of_the_kinds_asked_for(tmp_path):
    (tmp_path / "x.pt").write_bytes(saved(GOOD))
    assert same(load_checkpoint(tmp_path / "x.pt", ("student", "toy")), GOOD)


def test_a_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    for content in (pickle.dumps(Evil(), 2), saved(GOOD | {"extra": Evil()})):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(Fault, match="cannot be read"):
            load_checkpoint(tmp_path / "x.pt", "toy")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content, says", [
    pytest.param(saved(GOOD), "holds another training", id="another training"),
    pytest.param(saved(GOOD)[:-500], "cannot be read", id="cut"),
    pytest.param(b"a thesis", "cannot be read", id="text"),
    pytest.param(saved(GOOD | {"about": {"kind": "student"}}), "holds a student", id="another kind"),
])
def test_what_is_in_the_way_is_a_fault_and_is_not_overwritten(tmp_path, content, says):
    out = tmp_path / "out.pt"
    out.write_bytes(content)
    with pytest.raises(Fault, match=says):
        toy_train(out)
    assert out.read_bytes() == content and list(tmp_path.iterdir()) == [out]


def test_another_training_in_the_way_is_told_apart_by_one_setting(tmp_path):
    out, other = tmp_path / "out.pt", copy.deepcopy(ABOUT)
    other["training"]["lr"] = 0.2
    toy_train(out)
    before = out.read_bytes()
    with pytest.raises(Fault, match="lr is 0.1 there, not 0.2"):
        toy_train(out, about=other)
    assert out.read_bytes() == before


def test_weights_of_another_model_are_a_fault(tmp_path):
    with pytest.raises(Fault, match="x.pt holds the weights of another model"):
        training.load_weights(nn.Linear(3, 4), nn.Linear(3, 5).state_dict(), "x.pt")


def test_an_export_holds_the_weights_in_half_precision(tmp_path):
    weights = toy_model().state_dict()
    training.export(tmp_path / "x.pt", ABOUT, weights)
    expected = {name: weight.to(torch.float16) for name, weight in weights.items()}
    assert same(load_checkpoint(tmp_path / "x.pt", "toy"), {"about": ABOUT, "ema": expected})


def test_a_fingerprint_tells_weights_apart():
    weights = toy_model().state_dict()
    other = copy.deepcopy(weights)
    assert fingerprint(other) == fingerprint(dict(reversed(weights.items()))) == fingerprint(weights)
    other["2.weight"][0, 5] += 1e-6
    assert fingerprint(other) != fingerprint(weights)
    assert fingerprint({"a": weights["0.bias"]}) != fingerprint({"b": weights["0.bias"]})


# ---- devices --------------------------------------------------------------------------------------------------------

def test_devices(monkeypatch):
    assert torch.ones(2, device=pick_device("auto")).sum() == 2 and pick_device("cpu") == torch.device("cpu")
    with pytest.raises(Fault, match="no device is called 'abacus'"):
        pick_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(Fault, match=f"no {name} device"):
            pick_device(name)


# ---- precision ------------------------------------------------------------------------------------------------------

def test_bfloat16_is_used_only_where_it_was_asked_for_and_is_native(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert [training.precision(cpu, asked) for asked in (True, False, None)] == [torch.bfloat16] + [torch.float32] * 2
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert training.precision(cpu, True) == torch.float32


def test_bfloat16_training_keeps_float32_weights_and_almost_the_gradient(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    torch.manual_seed(0)
    model = DiT(image_size=8, channels=3, classes=3, patch=2, width=32, depth=2, heads=2, history_layers=1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, t, y = torch.randn(4, 2, 3, 8, 8), torch.tensor([900.0, 400.0]), torch.tensor([0, 1, 2, 3])
    gradients = {}
    for bf16 in (False, True):
        model.zero_grad()
        with training.autocast(torch.device("cpu"), bf16):
            output = model(x, t, y)
        assert output.dtype == (torch.bfloat16 if bf16 else torch.float32)
        output.float().square().mean().backward()
        gradients[bf16] = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    assert gradients[True].dtype == torch.float32
    gap = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert 0 < gap < 0.05  # bfloat16 keeps 8 bits


def test_one_gpu_needs_no_number(monkeypatch):
    """No GPU is needed to see it: with a device that has no index, set_device would raise at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    with pytest.raises(Fault, match="there is no cuda:1"):
        pick_device("cuda:1")
    torch.backends.cuda.matmul.allow_tf32 = False
