"""Two processes do what one does: the same losses, trajectories and samples, each process its own share; and a run may
continue with another number of them. torchrun starts them, on the CPU, where they talk through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import make_teacher, run

import data

ROOT = Path(data.__file__).parent

TOY = """
import os, sys
from pathlib import Path
import torch
from training import command, rank, train, world

def batch_of(step):
    if step == int(sys.argv[2]):
        raise RuntimeError("the power went")
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step)),

def loss(model, x):
    assert len(x) == 8 // world() // 2  # its share of the batch, half at a time
    return 10 * (model(x) - x.sum(1, keepdim=True)).square().mean()

def main():
    torch.manual_seed(rank())  # the processes must agree on the weights of the first
    train("toy", torch.nn.Linear(3, 1), batch_of, loss, Path(sys.argv[1]), dict(kind="toy"), iterations=12, batch=8,
          lr=0.1, accumulate=2, save_seconds=-1, log_every=5)

command(main)
"""


def torchrun(folder, processes, script, *words, fails=False):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, script, *map(str, words)], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=170)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout


def test_two_processes_train_as_one_and_one_continues_for_two(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    torchrun(tmp_path, 1, script, "one.pt", -1)
    torchrun(tmp_path, 2, script, "two.pt", -1)
    torchrun(tmp_path, 2, script, "cut.pt", 7, fails=True)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 7
    torchrun(tmp_path, 1, script, "cut.pt", -1)
    one, *others = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt", "cut.pt"))
    assert [step for step, _ in one["losses"]] == [5, 10, 12] and one["losses"][-1][1] < one["losses"][0][1]
    for other in others:
        for (_, a), (_, b) in zip(one["losses"], other["losses"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        torch.testing.assert_close(other["ema"], one["ema"], rtol=1e-5, atol=1e-6)


def test_two_processes_distil_and_sample_as_one(tmp_path, monkeypatch):
    make_teacher(tmp_path / "teacher.pt", seed=1)
    monkeypatch.chdir(tmp_path)
    words = "--teacher teacher.pt --count 512 --iterations 6 --batch 8 --no-bf16 --device cpu"
    run(monkeypatch, f"distill.py {words} --trajectories t1 --out one")
    said = torchrun(tmp_path, 2, ROOT / "distill.py", *words.split(), "--trajectories", "t2", "--out", "two")
    assert said.count("distilling into 4 steps") == 1  # one of them speaks
    for number in range(2):  # a shard each
        ours, theirs = (np.load(tmp_path / folder / f"{number:05d}.npy") for folder in ("t1", "t2"))
        assert (ours["label"] == theirs["label"]).all()
        np.testing.assert_allclose(ours["states"].astype(float), theirs["states"].astype(float), atol=2e-3)
    one, two = (json.loads((tmp_path / out / "result.json").read_text())["losses"] for out in ("one", "two"))
    assert one[0][1] == pytest.approx(two[0][1], rel=1e-5)

    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            Image.effect_noise((8, 8), 40 + i).convert("RGB").save(tmp_path / "images" / name / f"{i}.png")
    words = ("--from one/student.pt --teacher teacher.pt --trajectories t1 --count 512 --data images --iterations 6 "
             "--batch 16 --alone 2 --hidden 16 --no-bf16 --device cpu")
    run(monkeypatch, f"refine.py {words} --out three")
    torchrun(tmp_path, 2, ROOT / "refine.py", *words.split(), "--out", "four")
    three, four = (json.loads((tmp_path / out / "result.json").read_text())["losses"] for out in ("three", "four"))
    assert len(three[0]) == 7 and three[0][4] > 0 and three[0][1:] == pytest.approx(four[0][1:], rel=1e-4)

    words = "one/student.pt --count 20 --batch 4 --npz --device cpu"
    run(monkeypatch, f"sample.py {words} --out s1")
    torchrun(tmp_path, 2, ROOT / "sample.py", *words.split(), "--out", "s2")
    a, b = (np.load(tmp_path / out / "samples.npz")["arr_0"].astype(int) for out in ("s1", "s2"))
    assert a.shape == (20, 8, 8, 3) and a.std() > 10 and abs(a - b).max() <= 1
