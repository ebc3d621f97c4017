"""The attention of experiments/routes.py: without a bias it is the plain one, with a very large one
it reads one position, and the cache changes nothing."""

import pytest
import torch
from tiny import random_dit

from experiments.routes import ROUTES, replace_attention
from model import KVCache

TIMESTEPS = torch.tensor([1000.0, 750.0, 500.0])


def student(name: str, bias: float):
    model = random_dit(mask="causal", history_layers=2)
    replace_attention(model, ROUTES[name])
    for block in model.blocks[:2]:
        block.attn.bias.data[:] = bias
    return model


def states():
    torch.manual_seed(0)
    return torch.randn(2, 3, 3, 8, 8), torch.tensor([0, 4])


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTES)
def test_without_a_bias_it_is_plain_attention(name):
    x, y = states()
    plain = random_dit(mask="causal", history_layers=2)(x, TIMESTEPS, y)
    assert plain.abs().mean() > 0.1
    torch.testing.assert_close(student(name, 0.0)(x, TIMESTEPS, y), plain)
    assert not student(name, 4.0)(x, TIMESTEPS, y).allclose(plain, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTES)
def test_the_cache_changes_nothing(name):
    model, cache = student(name, 4.0), KVCache()
    x, y = states()
    steps = [model(x[:, [i]], TIMESTEPS[[i]], y, cache) for i in range(3)]
    torch.testing.assert_close(torch.cat(steps, 1), model(x, TIMESTEPS, y), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTES)
def test_a_large_bias_reads_one_position(name):
    """`bias`: of the earlier states; `positions`: of the state itself, too. These keys then share
    the attention as their own logits say."""
    attention = student(name, 1000.0).blocks[0].attn
    x = torch.randn(2, 3, 4, attention.qkv.in_features)                     # (b, s, n, width)
    found = attention(x, "causal", None)
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).unbind(3)
    for i in range(1, 3):
        last = i if name == "bias" else i + 1
        logits = (q[:, i, None] * k[:, :last]).sum(-1) / q.shape[-1] ** 0.5  # (b, last, n, h)
        read = (logits.softmax(dim=1)[..., None] * v[:, :last]).sum(1)
        expected = attention.proj(read.flatten(-2))
        torch.testing.assert_close(found[:, i], expected, rtol=1e-3, atol=1e-4)
