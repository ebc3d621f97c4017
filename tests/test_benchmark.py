"""The benchmark's dense reference computes what our network computes, or its ratios would mean nothing."""

import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import LATENT, RECIPE, bill, dense_forward, dense_macs, dense_sample, game_macs, head_macs
from discriminator import Discriminator
from model import DiT, size
from refine import players
from sample import few_step
from training import Fault


def small(history_layers):
    torch.manual_seed(0)
    model = DiT(image_size=8, channels=4, classes=3, patch=2, width=48, depth=3, heads=3, learn_sigma=True,
                history_layers=history_layers)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def test_dense_outputs_and_gradients_are_ours():
    x, t, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([999.0, 749.25, 499.5, 249.75]), torch.tensor([0, 3])
    for layers in (0, 2, 3):
        results = []
        for forward in (lambda m: m(x, t, y), lambda m: dense_forward(m, x, t, y)):
            model = small(layers)
            output = forward(model)
            output.square().mean().backward()
            results.append((output, torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])))
        for ours, dense in zip(*results, strict=True):
            assert ours.norm() > 1 and (ours - dense).norm() < 1e-4 * ours.norm()


def test_dense_sampling_without_a_cache_is_ours():
    about = dict(S=4, output="state", times=[999.0, 583.0, 375.0, 166.0, -1.0], told=[999.0, 749.25, 499.5, 249.75])
    model, x, y = small(2), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    ours = few_step(model, about, x, y)
    with torch.no_grad():
        dense = dense_sample(model, about, x, y)
    assert ours[:, 1:].norm() > 1 and (ours - dense).norm() < 1e-4 * ours.norm()


def test_dense_arithmetic_is_what_a_counter_sees():
    """PyTorch counts the FLOPs of the products that run (of attention only where it is made of plain products)."""
    model = small(2)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dense_forward(model, torch.randn(1, 4, 4, 8, 8), torch.tensor([4.0, 3, 2, 1]), torch.tensor([0]))
    assert abs(counter.get_total_flops() / 2 / dense_macs(model, 4) - 1) < 0.02


@pytest.mark.parametrize("judged", ["own", "forced"])
def test_the_second_stages_arithmetic_is_what_a_counter_sees(judged):
    """Of a step of both players, gradients included."""
    student, teacher = small(2), small(0)
    discriminator = Discriminator(teacher, hidden=16)
    about = dict(S=4, output="state", times=[999.0, 583.0, 375.0, 166.0, -1.0], told=[999.0, 749.25, 499.5, 249.75],
                 path="ddpm")
    losses = players(student, about, discriminator, dict(judged=judged, level=0.02, strength=1.0))
    images, y = torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.long)
    batch = torch.randn(8, 5, 4, 8, 8), y, images, y, images, images, torch.ones_like(y)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for model, loss_of in zip((student, discriminator), losses, strict=True):
            loss_of(model, *batch)[0].backward()
    macs = game_macs(student, head_macs(discriminator.heads[0], student), judged)
    assert abs(counter.get_total_flops() / 2 / 8 / macs - 1) < 0.05


def test_the_program_measures_once_and_then_remembers(tmp_path, monkeypatch, capsys):
    words = f"benchmark.py --size N/8 --batch 1 --sample-batch 1 --repeats 1 --device cpu --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    benchmark.main()
    first, said = (tmp_path / "benchmark.json").read_bytes(), capsys.readouterr().out
    results = json.loads(first)["results"]
    assert set(results["training, N/8"]) == {"ours", "ours, N = 0", "ours, recomputing", "dense reference"}
    assert set(results["second stage, N/8"]) == {"R + G, own", "R + G, forced"}
    assert set(results["sampling, N/8"]) == {"ours", "ours, N = 0", "dense reference", "teacher, 25 steps"}
    for rows in results.values():
        assert benchmark.table(rows, benchmark.COLUMNS) in said
        assert all(row["tflops"] > 0 for row in rows.values())
    benchmark.main()
    assert (tmp_path / "benchmark.json").read_bytes() == first
    for other, says in (("--batch 2", "batch is 1 there, not 2"), ("--size Q/8", "no model size"),
                        ("--history-layers 7", "the model has 6 layers")):
        monkeypatch.setattr(sys, "argv", [*words.split(), *other.split()])
        with pytest.raises(Fault, match=says):
            benchmark.main()


def test_the_bill_at_the_papers_setting():
    rows = bill({"XL/2": dict(training=400.0, refining=400.0, sampling=400.0)}, **RECIPE)
    row = rows["DiT-XL/2 at 256"]
    assert abs(row["disk GB"] - 52.4) < 0.1  # 1.28 million of five 4×32×32 arrays in float16
    assert abs(row["distill h"] - 300_000 * 184.3 / 400 / 3600) < 0.5  # 184.3 TFLOP a step of 64
    shares = [rows[f"DiT-XL/2 at {pixels}"]["history %"] for pixels in (256, 512, 1024)]
    assert all(abs(a - b) < 0.5 for a, b in zip(shares, (1.1, 4, 12), strict=True))
    assert LATENT["image_size"] == 32 and size("XL/2")["depth"] == 28
