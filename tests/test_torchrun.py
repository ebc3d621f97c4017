"""Two processes do what one does: the same losses, trajectories and samples, each process its own
share; and a training may continue with another number of them. torchrun starts them, on the CPU,
where they talk through gloo."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import gan
import sample
import training
from tiny import write_images, write_teacher

ROOT = Path(training.__file__).resolve().parent

TOY = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
import training
from command_line import run_program
from config import ClassifierRecord, DataConfig, Training
from machine import Runtime, rank, world_size

def batch_at(iteration):
    if iteration == int(sys.argv[2]):
        raise RuntimeError("the power went")
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(iteration)),

def loss_of(model, x):
    assert len(x) == 8 // world_size() // 2  # its share of the batch, half at a time
    return 10 * (model(x) - x.sum(1, keepdim=True)).square().mean()

def main():
    torch.manual_seed(rank())  # the processes must agree on the weights of the first
    training.LOG_EVERY = 5
    training.SaveClock.due = lambda clock: True  # save each time
    settings = Training(iterations=12, batch=8, lr=0.1, ema_decay=0.9)
    record = ClassifierRecord(DataConfig("toy", 1, 3), ("a",), 1, settings)
    runtime = Runtime(torch.device("cpu"), accumulate=2)
    model, file = torch.nn.Linear(3, 1), Path(sys.argv[1])
    training.train("classifier", model, loss_of, batch_at, file, record, runtime)

run_program(main)
"""

PROGRAMS = """
import json, sys
import distill, evaluate, gan, sample
from command_line import run_program

def main():
    evaluate.REPORT_IMAGES, gan.report = 16, lambda *words: None
    for words in json.loads(sys.argv[1]):
        sys.argv = list(map(str, words))
        {"distill.py": distill, "gan.py": gan, "sample.py": sample}[words[0]].main()

run_program(main)
"""


def in_this_process(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")


def start_two_processes(folder, script, *words) -> subprocess.Popen:
    start = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    return subprocess.Popen(
        [sys.executable, *start, script, *map(str, words)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, fails=False) -> str:
    """Wait for a process. Returns what it printed."""
    printed, errors = process.communicate(timeout=170)
    assert (process.returncode != 0) == fails, errors
    return printed


def read(file):
    return torch.load(file, weights_only=True)


def test_one_process_continues_what_two_began(tmp_path, monkeypatch):
    """The two trained as one: the end is that of a training by one process alone."""
    monkeypatch.setattr(training, "LOG_EVERY", training.LOG_EVERY)  # put back what TOY changes
    monkeypatch.setattr(training.SaveClock, "due", training.SaveClock.due)
    script, cut, whole = (tmp_path / name for name in ("toy.py", "cut.pt", "whole.pt"))
    script.write_text(TOY)
    two = start_two_processes(tmp_path, script, cut, 7)
    in_this_process(monkeypatch, script, whole, -1)
    end(two, fails=True)
    assert read(cut)["iteration"] == 7
    in_this_process(monkeypatch, script, cut, -1)
    found, expected = read(cut), read(whole)
    assert [iteration for iteration, _ in expected["losses"]] == [5, 10, 12]
    assert expected["losses"][-1][1] < expected["losses"][0][1]
    losses = torch.tensor(found["losses"]), torch.tensor(expected["losses"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["ema"], expected["ema"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same commands by one process and, at the same time, by two: folders one/ and two/ with a
    student, its trajectories, a second stage, and samples."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images", each=10)
    write_teacher(folder / "teacher.pt", source=folder / "images")
    script = folder / "programs.py"
    script.write_text(PROGRAMS)
    cpu, processes = ("--device", "cpu", "--no-bf16"), None
    for out in ("two", "one"):
        student = f"{out}/student.pt"
        train = ("--preset", "shapes", "--iterations", 6, "--batch", 16, "--teacher", "teacher.pt")
        train += ("--trajectories", f"{out}/trajectories", *cpu)
        distil = ("--count", 512, "--on-policy", 1, "--no-control", "--out", out)
        refine = ("--from", student, "--hidden", 16, "--warmup", 2, "--out", f"{out}/gan")
        sampling = (student, "--count", 20, "--batch", 4, "--npz", "--out", f"{out}/samples")
        commands = [
            ("distill.py", *distil, *train),
            ("gan.py", *refine, *train),
            ("sample.py", *sampling, *cpu),
        ]
        if out == "two":
            processes = start_two_processes(folder, script, json.dumps(commands))
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for program in (distill, gan):
                patch.setattr(program, "report", lambda *words: None)
            for words, program in zip(commands, (distill, gan, sample), strict=True):
                patch.setattr(sys, "argv", list(map(str, words)))
                program.main()
    assert end(processes).count("distilling into 4 steps") == 1  # one of them speaks
    return folder


def test_two_processes_write_the_trajectories_that_one_writes(runs):
    for number in range(2):  # a shard each
        shards = [np.load(runs / out / f"trajectories/{number:05d}.npy") for out in ("one", "two")]
        one, two = shards
        assert np.array_equal(one["label"], two["label"])
        for name in ("x_T", "states", "x0"):
            expected, found = one[name].astype(float), two[name].astype(float)
            np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("file, values", [("student.pt", 1), ("gan/student.pt", 5)])
def test_two_processes_train_as_one(runs, file, values):
    a, b = (read(runs / out / file) for out in ("one", "two"))
    torch.testing.assert_close(a["ema"], b["ema"], rtol=1e-3, atol=1e-5)
    [one], [two] = a["losses"], b["losses"]
    assert one[0] == 6 and len(one) == 1 + values
    assert two == pytest.approx(one, rel=1e-3)
    if values == 5:
        _, _, _, weight, _, _ = one
        assert weight > 0  # λ


def test_two_processes_sample_the_images_of_one(runs):
    files = [runs / out / "samples/samples.npz" for out in ("one", "two")]
    a, b = (np.load(file)["arr_0"].astype(int) for file in files)
    assert a.shape == (20, 8, 8, 3) and a.std() > 10 and abs(a - b).max() <= 1
