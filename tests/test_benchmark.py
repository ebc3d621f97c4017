"""The dense reference computes what our network computes, or the benchmark's ratios would mean
nothing; and the rows of a GPU run on a CPU, too, at a tiny size."""

import json
import sys

import pytest
import torch
from tiny import random_weights
from torch.utils.flop_counter import FlopCounterMode

from config import AUTHORS_STUDENT
from experiments import benchmark
from experiments.benchmark import STUDENT, Bench, DenseReference, latent_config
from files import UserError
from machine import Runtime
from model import DiT
from sample import few_step
from training import accumulate_gradients

CPU = torch.device("cpu")


def network(history_layers: int) -> DiT:
    return random_weights(DiT(latent_config("N/8", history_layers)), std=0.2)


@pytest.mark.parametrize("history_layers", [0, 2, 6])
def test_dense_outputs_and_gradients_are_ours(history_layers):
    model = network(history_layers)
    x, y = torch.randn(2, 4, 4, 32, 32), torch.tensor([0, 3])
    results = []
    for forward in (model, DenseReference(model)):
        model.zero_grad()
        output = forward(x, torch.tensor(AUTHORS_STUDENT.timesteps), y)
        output.square().mean().backward()
        gradients = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
        results.append((output, torch.cat(gradients)))
    for ours, dense in zip(*results, strict=True):
        assert ours.norm() > 1
        assert (ours - dense).norm() < 1e-4 * ours.norm()


def test_dense_sampling_is_ours():
    model = network(2)
    x_T, y = torch.randn(2, 4, 32, 32), torch.tensor([1, 2])
    ours = few_step(model, STUDENT, x_T, y)
    dense = few_step(DenseReference(model), STUDENT, x_T, y)
    assert ours[:, 1:].norm() > 1
    assert (ours - dense).norm() < 1e-4 * ours.norm()


def test_the_reference_modulates_each_token():
    """Otherwise it would be no reference: a counter of products sees the difference."""
    model = network(2)
    x, y = torch.randn(1, 4, 4, 32, 32), torch.tensor([0])
    timesteps = torch.tensor(AUTHORS_STUDENT.timesteps)
    counts = []
    for forward in (model, DenseReference(model)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(x, timesteps, y)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    config = model.config
    states, tokens = 4, 4 * config.tokens
    each = 2 * (6 * config.depth + 2) * config.width**2
    assert counts[1] - counts[0] == (tokens - states) * each


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark.main()
    return capsys.readouterr().out


def test_the_program_measures_once_and_then_remembers(tmp_path, monkeypatch, capsys):
    sizes = "--size N/8 --batch 1 --sample-batch 1 --repeats 1 --device cpu"
    words = [*sizes.split(), "--out", str(tmp_path)]
    nothing = run(monkeypatch, capsys, *words, "--seconds", "0")
    assert "not measured: matrix rate, training, sampling, second stage." in nothing
    assert nothing.count("not measured   goal") == 5

    printed = run(monkeypatch, capsys, *words)
    first = (tmp_path / "benchmark.json").read_bytes()
    results = json.loads(first)["results"]
    rows = {"ours", "ours, N = 0", "dense reference"}
    assert set(results["training"]) == rows | {"ours, recomputing"}
    assert set(results["sampling"]) == rows | {"teacher"}
    assert set(results["second stage"]) == {"ours", "ours, recomputing"}
    for title, found in results.items():
        assert benchmark.table(found, benchmark.COLUMNS) in printed, title
        assert all(row["images"] > 0 for row in found.values() if "images" in row)
    assert "aten::addmm" in (tmp_path / "profile-training-ours.txt").read_text()

    run(monkeypatch, capsys, *words)
    assert (tmp_path / "benchmark.json").read_bytes() == first
    for other, message in (
        ("--batch 2", "batch is 1 there and 2 here"),
        ("--size Q/8", "no model size"),
        ("--history-layers 7", "the network has 6 layers"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, capsys, *words, *other.split())


def test_the_rows_of_a_gpu(monkeypatch):
    """All but the compiler, which takes long on a CPU."""
    monkeypatch.setattr(benchmark, "LARGE_BATCH", 4)
    monkeypatch.setattr(DiT, "compile_layers", lambda model: None)
    bench = Bench(CPU, "N/8", batch=2, sample_batch=2, history_layers=2, repeats=1, on_gpu=True)
    results = {"matrix rate": {"bfloat16": dict(tflops=1.0)}}
    for title in ("training", "sampling", "training, large batch"):
        rows = benchmark.measurements(bench)[title](bench)
        benchmark.add_shares(rows, results, "bfloat16")
        results[title] = rows
    assert results["training"]["ours, accumulating"]["batch"] == 4
    assert {"dense reference, bf16", "ours, not compiled"} <= results["training"].keys()
    goals = benchmark.goals(results)
    measured = {name: value for name, (value, _) in goals.items() if value is not None}
    assert set(goals) - set(measured) == {"training, recomputing: peak GiB"}
    assert all(value > 0 for value in measured.values())


def test_what_does_not_fit_is_left_out(capsys):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    jobs = {"large": benchmark.Job(fail, 1), "small": benchmark.Job(lambda: None, 1)}
    assert list(benchmark.measure(jobs, CPU, repeats=1)) == ["small"]
    assert "large cannot be measured here: CUDA out of memory" in capsys.readouterr().out


def test_a_training_that_does_not_fit_is_left_out(capsys):
    """training.py gives advice on --accumulate, which is a UserError."""

    def no_memory(network, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def step():
        accumulate_gradients(None, no_memory, [(torch.ones(2),)], Runtime(CPU))

    job = benchmark.Job(step, images=2)
    assert benchmark.measure({"large": job}, CPU, repeats=1) == {}
    assert "large cannot be measured here: out of memory, with 2 samples" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["hello", "[1]", "{}", '{"settings": 1, "results": {}}', ""])
def test_a_damaged_file_of_results_is_refused(tmp_path, content):
    file = tmp_path / "benchmark.json"
    file.write_text(content)
    with pytest.raises(UserError, match="is damaged, or was written by another program"):
        benchmark.open_results(file, {})
    assert file.read_text() == content
