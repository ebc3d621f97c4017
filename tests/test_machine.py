"""Devices, precision and progress lines."""

import copy
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch

import machine
from files import UserError
from machine import Progress, Runtime, pick_device, runtime_from, short_dtype
from sample import few_step
from tiny import random_dit, student_of

CPU = torch.device("cpu")


@pytest.fixture
def bf16_cpu(monkeypatch):
    """A CPU that multiplies in bfloat16, as far as this project asks."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)


def test_devices(monkeypatch):
    assert torch.ones(2, device=pick_device("auto")).sum() == 2
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="no device is called 'abacus'"):
        pick_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match="device: use --device auto"):
            pick_device(name)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="there is no cuda:1"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    "flag, default, used", [(True, False, True), (False, True, False), (None, True, True)]
)
def test_a_flag_goes_before_the_presets_choice(bf16_cpu, flag, default, used):
    flags = Namespace(device="cpu", bf16=flag, checkpointing=flag, accumulate=None, compile=False)
    dtype = torch.bfloat16 if used else torch.float32
    expected = Runtime(CPU, dtype, checkpointing=used)
    assert runtime_from(flags, bf16=default, checkpointing=default) == expected


def test_bfloat16_is_used_only_where_it_is_native(monkeypatch):
    flags = Namespace(device="cpu", bf16=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert runtime_from(flags).precision == "float32"
    assert short_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_older_gpus_multiply_in_float16(monkeypatch, capability, dtype):
    """V100, T4 and A100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert short_dtype(torch.device("cuda")) == dtype


def test_a_machine_without_a_compiler_says_so_before_the_work(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler:\n g++")

    monkeypatch.setattr(torch, "compile", fail)
    flags = Namespace(device="cpu", bf16=False, compile=True)
    with pytest.raises(UserError, match="--compile does not work .* .no compiler: g...: leave it"):
        runtime_from(flags)
    assert not runtime_from(Namespace(device="cpu", bf16=False, compile=False)).compile


@pytest.mark.parametrize("short, error", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_sixteen_bits_keep_float32_weights_and_almost_the_gradient(bf16_cpu, short, error):
    model = random_dit(mask="causal", history_layers=1)
    torch.manual_seed(0)
    x, timesteps, y = torch.randn(4, 2, 3, 8, 8), torch.tensor([900.0, 400.0]), torch.arange(4)
    gradients = []
    for dtype in (torch.float32, short):
        model.zero_grad()
        with Runtime(CPU, dtype).autocast():
            output = model(x, timesteps, y)
        assert output.dtype == dtype
        output.float().square().mean().backward()
        found = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    gap = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < gap < error  # bfloat16 keeps 8 bits, float16 11


def test_a_weight_used_without_and_then_with_gradient_gets_one_in_bfloat16(bf16_cpu):
    """With autocast's cache, the bfloat16 copy made under no_grad would be used again."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with Runtime(CPU, torch.bfloat16).autocast():
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype, compiled", [(torch.bfloat16, False), (torch.float32, True)])
def test_a_prepared_network_computes_the_same(dtype, compiled, monkeypatch):
    """To the bit, where nothing is compiled. A student samples with a cache."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    runtime = Runtime(CPU, dtype, compile=compiled)
    model, record = student_of(random_dit(), noise_shortcut=True)
    ready = copy.deepcopy(model)
    runtime.prepare(ready)
    assert {ready.blocks[0].mlp.fc1.weight.dtype, ready.x_embedder["proj"].bias.dtype} == {dtype}
    assert (ready.compiled_blocks is not None) == compiled
    x_T, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    with runtime.autocast():
        plain = few_step(model, record.student, x_T, y)
        found = few_step(ready, record.student, x_T, y)
    assert (plain[:, -1] - x_T).abs().mean() > 0.1
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4 * compiled)


# ---- progress ------------------------------------------------------------------------------------


def lines_of(progress, monkeypatch, capsys, seconds):
    """What a progress prints where each item takes so long."""
    now = [1000.0]
    monkeypatch.setattr(machine.time, "time", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    for _ in progress:
        now[0] += seconds
    return capsys.readouterr().err.splitlines()


def test_progress_says_how_far_how_fast_and_how_long(monkeypatch, capsys):
    progress = Progress("drawing", range(60), start=40, unit="images", size=8)
    lines = lines_of(progress, monkeypatch, capsys, seconds=10)
    assert lines[0] == "drawing: 41/100  0.8 images/s  ETA 9:50  "
    assert lines[-1] == "drawing: 100/100  0.8 images/s  took 600 s  "


def test_the_last_item_may_be_smaller(monkeypatch, capsys):
    progress = Progress("drawing", range(3), unit="images", size=256, amount=600)
    assert "100.0 images/s" in lines_of(progress, monkeypatch, capsys, seconds=2)[-1]


def test_short_work_prints_nothing(monkeypatch, capsys):
    assert lines_of(Progress("drawing", range(10)), monkeypatch, capsys, seconds=0.1) == []
