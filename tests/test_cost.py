"""The cost estimate counts what runs, and the committed table is what it says."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import cost
from experiments.benchmark import STUDENT, latent_config
from experiments.cost import PRESET, Rates, estimate_all, gan_macs
from files import UserError
from gan import Discriminator
from model import DiT

RESULTS = Path(cost.__file__).parent / "results"
CONFIG = latent_config("N/4", history_layers=2)


def test_the_papers_setting():
    rows = estimate_all(Rates(training=400.0, gan=400.0, sampling=400.0))
    row = rows["DiT-XL/2 at 256"]
    assert row["disk GB"] == pytest.approx(52.4, abs=0.1)  # 1.28 million of 5 × 4×32×32 float16
    hours = 300_000 * 184.3 / 400 / 3600  # 184.3 TFLOP a step of 64
    assert row["train h"] == pytest.approx(hours, rel=0.01)
    assert row["recomputed"] < 24
    overheads = [rows[f"DiT-XL/2 at {pixels}"]["history %"] for pixels in (256, 512, 1024)]
    assert overheads == pytest.approx([1.1, 4, 12], abs=0.5)


def test_the_committed_table_is_what_is_counted():
    content = json.loads((RESULTS / "cost.json").read_text())
    again = estimate_all(Rates(**content["rates"]))
    assert again.keys() == content["rows"].keys()
    for name, row in again.items():
        assert row == pytest.approx(content["rows"][name])


def test_the_arithmetic_of_the_second_stage_is_what_a_counter_sees(monkeypatch):
    """Of the student's and the discriminator's losses, gradients included, for a batch of 8."""
    gan = replace(PRESET.gan, hidden=16)
    monkeypatch.setattr(cost, "PRESET", replace(PRESET, gan=gan))
    student = random_weights(DiT(CONFIG))
    teacher = random_weights(DiT(replace(CONFIG, history_layers=0)))
    discriminator = Discriminator(teacher, STUDENT.ode, gan)
    x, y = torch.randn(8, 4, 4, 32, 32), torch.zeros(8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cost_of_one_iteration(student, discriminator, x, y)
    assert counter.get_total_flops() / 2 / 8 == pytest.approx(gan_macs(CONFIG), rel=0.05)


def cost_of_one_iteration(student, discriminator, x, y):
    """The products of gan.GANTrainer.step, without its optimizers."""
    from distill import own_inputs
    from sample import predict_all

    inputs = own_inputs(student, STUDENT, x[:, 0], y)
    prediction = predict_all(student, STUDENT, inputs, y)
    seen = prediction[:, -1].detach().requires_grad_()
    discriminator.requires_grad_(False)
    discriminator(seen, x[:, 1], y).mean().backward()
    prediction.mean().backward()
    discriminator.requires_grad_(True)
    images = torch.cat([x[:, 1], seen.detach()])
    discriminator(images, images, torch.cat([y, y])).mean().backward()


@pytest.mark.parametrize("text_width", [0, 100])
def test_activation_bytes_are_what_autograd_stores(text_width):
    """Within a third: what a layer stores, by hooks on all that is saved for the backward pass."""
    config = replace(CONFIG, text_width=text_width)
    model = random_weights(DiT(config))
    model.prompts = torch.randn(4, 120, text_width)
    x, y = torch.randn(4, 4, 4, 32, 32), torch.zeros(4, dtype=torch.long)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x, torch.tensor(STUDENT.timesteps), y)
    total = sum(size for size, _ in stored.values())
    assert output.requires_grad
    expected = 4 * cost.activation_bytes(config, states=4, bf16=False)
    assert total == pytest.approx(expected, rel=1 / 3)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["cost.py", *map(str, words)])
    cost.main()
    return capsys.readouterr().out


def test_the_program(tmp_path, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "--tflops", 100, "--out", tmp_path)
    assert printed.count("DiT-") == 12
    first = json.loads((tmp_path / "cost.json").read_text())
    assert first["rows"] == estimate_all(Rates(100.0, 100.0, 100.0))

    config = latent_config("N/8", 2)
    images = 1e12 / (2 * gan_macs(config))  # a second: 1 TFLOP/s
    results = {
        "training": {"ours": dict(tflops=3.0)},
        "sampling": {"teacher": dict(tflops=2.0)},
        "second stage": {"ours, recomputing": dict(images=images)},
    }
    content = dict(settings=dict(size="N/8", history_layers=2), results=results)
    file = tmp_path / "benchmark.json"
    file.write_text(json.dumps(content))
    run(monkeypatch, capsys, file, "--out", tmp_path)
    rates = json.loads((tmp_path / "cost.json").read_text())["rates"]
    assert rates == pytest.approx(dict(training=3.0, gan=1.0, sampling=2.0))

    del results["sampling"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not hold all rates .*sampling"):
        run(monkeypatch, capsys, file, "--out", tmp_path)
    for words in ((), (file, "--tflops", 1)):
        with pytest.raises(SystemExit):
            run(monkeypatch, capsys, *words)
