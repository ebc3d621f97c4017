"""The network against networks written here. `plain_dit` below is the public DiT by the book: a loop over patches, one
modulation per token, attention as a softmax of a score matrix with a dense mask. It imports nothing from model.py and
reads the weights by their public names, so whatever model.py does faster (folded blocks, sliced keys, a cache), it must
come to the same numbers. A fresh DiT puts out exactly zero (adaLN-zero), and zero passes almost any test: so every
network here has all its parameters drawn at random first, and `run` insists on an output that is not small."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import DiT, KVCache, sincos_positions, size

HISTORIES = ("none", "window", "anchor", "causal")
TINY = dict(image_size=6, channels=3, classes=5, patch=2, width=32, depth=3, heads=4)
TOKENS, STEPS = 9, 4  # n of a block, blocks of a trajectory


def network(**changes):
    """A tiny DiT with every parameter random."""
    model = DiT(**TINY | changes)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.15, generator=dice)
    return model


def trajectory():
    """x (b, s, c, h, w), t (s,), y (b,)."""
    torch.manual_seed(1)
    return torch.randn(2, STEPS, 3, 6, 6), torch.tensor([999.0, 750.0, 500.0, 250.0]), torch.tensor([1, 4])


def run(model, x, t, y):
    out = model(x, t, y)
    assert out.shape == x.shape and out.std() > 0.1
    return out


def moved(model, j):
    """Which blocks' outputs change at all (in any bit) when block j of the input does: a list of booleans."""
    x, t, y = trajectory()
    other = x.clone()
    other[:, j] += torch.randn_like(x[:, j])
    with torch.no_grad():
        before, after = run(model, x, t, y), run(model, other, t, y)
    return [not torch.equal(before[:, i], after[:, i]) for i in range(STEPS)]


# ---- a DiT by the book ----------------------------------------------------------------------------------------------

def plain_dit(w, x, t, y, masks, patch=2, heads=4):
    """w: weights by name; x: images (b, s, c, h, w), their tokens put in one row; t: (b, s); y: (b,); masks: for each
    layer which token (row) may read which (column), (s*n, s*n), or None for all. With s = 1 it is Peebles & Xie's."""
    b, s, channels, side, _ = x.shape
    g = side // patch

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(v, shift, scale):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def silu(v):
        return v / (1 + torch.exp(-v))

    kernel = w["x_embedder.proj.weight"].reshape(-1, channels * patch * patch)  # a patch goes in as (c p q)
    patches = [x[:, i, :, r * patch:(r + 1) * patch, q * patch:(q + 1) * patch].reshape(b, -1)
               for i in range(s) for r in range(g) for q in range(g)]
    h = torch.stack(patches, 1) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"].repeat(1, s, 1)

    angles = t[..., None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    c = linear("t_embedder.mlp.2", silu(time)) + w["y_embedder.embedding_table.weight"][y][:, None]
    c = silu(c.repeat_interleave(g * g, dim=1))  # (b, s*n, width): one condition per token

    for i, mask in enumerate(masks):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, -1)
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h, shift1, scale1))
        q, k, v = qkv.reshape(b, s * g * g, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (b, heads, s*n, d)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        h = h + gate1 * linear(f"blocks.{i}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        u = linear(f"blocks.{i}.mlp.fc1", norm(h, shift2, scale2))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))  # tanh GELU
        h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", u)

    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", norm(h, shift, scale)).reshape(b, s, g, g, patch, patch, -1)  # out as (p q c)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, s, -1, side, side)[:, :, :channels]


def dense_mask(history, s=STEPS, n=TOKENS):
    reads = {"none": lambda i, j: j == i, "window": lambda i, j: j in (i - 1, i),
             "anchor": lambda i, j: j in (0, i), "causal": lambda i, j: j <= i}[history]
    blocks = torch.tensor([[reads(i, j) for j in range(s)] for i in range(s)])
    return blocks.repeat_interleave(n, 0).repeat_interleave(n, 1)


@pytest.fixture
def float64():
    """In double precision, a right answer agrees to 1e-10 and a nearly right one does not."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_without_history_it_is_one_plain_dit_per_state(learn_sigma):
    model = network(history_layers=0, learn_sigma=learn_sigma)
    x, t, y = trajectory()
    t = torch.stack([t, t / 2])  # (b, s): each sample may have its own times
    out = run(model, x, t, y)
    for i in range(STEPS):
        alone = plain_dit(model.state_dict(), x[:, [i]], t[:, [i]], y, masks=[None] * 3)
        torch.testing.assert_close(out[:, [i]], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("history", HISTORIES)
def test_outputs_and_gradients_equal_dense_masked_attention(history, layers):
    model = network(history=history, history_layers=layers)
    x, t, y = trajectory()
    weights = dict(model.named_parameters())
    trained = [w for w in weights.values() if w.requires_grad]
    masks = [dense_mask(history if layer < layers else "none") for layer in range(3)]
    out, expected = run(model, x, t, y), plain_dit(weights, x, t.expand(2, -1), y, masks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    target = torch.randn_like(x)
    gradients, dense = (torch.autograd.grad((o - target).square().mean(), trained) for o in (out, expected))
    for ours, reference in zip(gradients, dense, strict=True):
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10)


# ---- which block reads which ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("history", HISTORIES)
def test_causal_to_the_bit(history):
    model = network(history=history, history_layers=2)
    for j in range(STEPS):
        changes = moved(model, j)
        assert changes[j] and not any(changes[:j])


@pytest.mark.parametrize("history, by_block_0, by_block_1", [
    ("none", [True, False, False, False], [False, True, False, False]),
    ("window", [True, True, False, False], [False, True, True, False]),
    ("anchor", [True, True, True, True], [False, True, False, False]),
    ("causal", [True, True, True, True], [False, True, True, True]),
])
def test_masks_are_told_apart_by_one_layer(history, by_block_0, by_block_1):
    model = network(history=history, history_layers=1)  # one layer: what moves was read directly
    assert moved(model, 0) == by_block_0
    assert moved(model, 1) == by_block_1


# ---- sampling with the cache ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("step_heads", [1, STEPS])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("history", HISTORIES)
def test_cached_sampling_equals_the_full_forward(history, layers, step_heads):
    model = network(history=history, history_layers=layers, step_heads=step_heads)
    x, t, y = trajectory()
    read = []  # tokens that the first layer computes keys for, call by call
    model.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, out: read.append(out[0].numel() // out.shape[-1]))
    with torch.no_grad():
        full, cache = run(model, x, t, y), KVCache(STEPS)
        stepwise = torch.cat([model(x[:, [i]], t[[i]], y, cache) for i in range(STEPS)], dim=1)
    torch.testing.assert_close(stepwise, full, rtol=1e-5, atol=1e-5)
    assert read == [STEPS * TOKENS] + STEPS * [TOKENS]  # the full pass, then one block at a time: a cache is a cache
    assert len(cache.buffers) == (0 if history == "none" else layers)  # and only for the layers that look back


def test_every_step_has_its_own_head():
    model = network(step_heads=STEPS)
    x, t, y = trajectory()
    with torch.no_grad():
        before = run(model, x, t, y)
        model.final_layer3.linear.bias += 1
        torch.testing.assert_close(model(x, t, y) - before, torch.eye(STEPS)[2].view(1, -1, 1, 1, 1).expand_as(x))


@pytest.mark.parametrize("history", HISTORIES)
def test_no_mask_reaches_attention(history, monkeypatch):
    attend, calls = F.scaled_dot_product_attention, []

    def watch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        assert attn_mask is None and is_causal is False and dropout_p == 0
        calls.append(query.shape[-2])
        return attend(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model, cache = network(history=history, history_layers=2), KVCache(STEPS)
    x, t, y = trajectory()
    run(model, x, t, y).sum().backward()
    trained = len(calls)
    with torch.no_grad():
        for i in range(STEPS):
            model(x[:, [i]], t[[i]], y, cache)
    assert trained >= 3 and len(calls) - trained == 3 * STEPS
    assert set(calls) == {TOKENS}  # queries of one block at a time: no S·n × S·n matrix anywhere


# ---- training -------------------------------------------------------------------------------------------------------

def test_checkpointing_changes_no_gradient():
    model, passes = network(history_layers=2), []
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: passes.append(1))
    x, t, y = trajectory()
    trained = [w for w in model.parameters() if w.requires_grad]
    gradients = []
    for model.checkpointing in (False, True):
        gradients.append(torch.autograd.grad(run(model, x, t, y).square().mean(), trained))
    assert len(passes) == 1 + 2  # with checkpointing, the backward pass computes the layer again
    for stored, recomputed in zip(*gradients, strict=True):
        assert stored.abs().max() > 0
        torch.testing.assert_close(recomputed, stored, rtol=1e-6, atol=1e-8)


# ---- the public DiT -------------------------------------------------------------------------------------------------

def public(name, **more):
    """A public ImageNet-256 configuration, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return DiT(image_size=32, channels=4, classes=1000, learn_sigma=True, **size(name), **more)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("letters, width, depth, heads, millions", [
    ("S", 384, 12, 6, 33), ("B", 768, 12, 12, 130), ("L", 1024, 24, 16, 458), ("XL", 1152, 28, 16, 675)])
def test_parameters_of_the_public_sizes(letters, width, depth, heads, millions, patch):
    def linear(i, o):
        return i * o + o

    d, name = width, f"DiT-{letters}/{patch}"
    layer = linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + linear(d, 6 * d)
    embedders = linear(4 * patch**2, d) + linear(256, d) + linear(d, d) + 1001 * d
    expected = embedders + depth * layer + linear(d, 2 * d) + linear(d, 8 * patch**2)

    assert size(name) == dict(width=width, depth=depth, heads=heads, patch=patch)
    model = public(name)
    assert sum(w.numel() for w in model.parameters() if w.requires_grad) == expected
    assert sum(w.numel() for w in model.parameters()) == expected + (32 // patch) ** 2 * d  # and the fixed positions
    if patch == 2:
        assert round(expected / 1e6) == millions  # as published, which counts what is trained


def test_names_are_the_public_ones():
    def both(name):
        return {f"{name}.weight", f"{name}.bias"}

    names = {"pos_embed", "y_embedder.embedding_table.weight"}
    names |= both("x_embedder.proj") | both("t_embedder.mlp.0") | both("t_embedder.mlp.2")
    for i in range(28):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            names |= both(f"blocks.{i}.{part}")
    names |= both("final_layer.adaLN_modulation.1") | both("final_layer.linear")
    assert set(public("DiT-XL/2", history_layers=6).state_dict()) == names


def test_positions_are_the_public_ones():
    width, g = 32, 5
    column, row = np.meshgrid(np.arange(g), np.arange(g))  # "w goes first", as the public code remarks

    def sincos(d, positions):
        omega = 1 / 10000 ** (np.arange(d // 2) / (d / 2))
        angles = np.outer(positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    expected = np.concatenate([sincos(width // 2, column), sincos(width // 2, row)], axis=1)
    np.testing.assert_allclose(sincos_positions(g, width)[0].numpy(), expected, atol=1e-6)
    fresh = DiT(**TINY | dict(image_size=10)).pos_embed
    np.testing.assert_allclose(fresh[0].numpy(), expected, atol=1e-6)
    assert not fresh.requires_grad


def test_times_become_256_sinusoids_cosines_first():
    embedder = network().t_embedder
    embedder.mlp = torch.nn.Identity()
    times = np.array([[0, 1, 583], [41.5, 250, 999]])
    angles = times[..., None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(embedder(torch.from_numpy(times)).numpy(), expected, atol=3e-4)  # 999 rad in float32


# ---- the bill -------------------------------------------------------------------------------------------------------

def counted(forward):
    """Multiply-accumulates of a call of forward(), as PyTorch counts them: a MAC is two FLOPs."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    assert torch.ops.aten.bmm in counter.get_flop_counts()["Global"]  # attention was seen
    return counter.get_total_flops() / 2


def test_macs_of_the_paper():
    plain, ard = public("DiT-XL/2"), public("DiT-XL/2", history_layers=6)
    assert round(plain.macs() / 1e9, 1) == 118.6
    assert plain.macs(4) / 1e9 == pytest.approx(474.6, abs=0.2)
    assert round(100 * (ard.macs(4) / plain.macs(4) - 1), 1) == 1.1

    x, t, y = (torch.empty(*shape, device="meta") for shape in ((1, 4, 4, 32, 32), (1, 4), (1,)))
    assert counted(lambda: plain(x[:, :1], t[:, :1], y.long())) == plain.macs()
    assert counted(lambda: ard(x, t, y.long())) == ard.macs(4)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("history", HISTORIES)
def test_macs_are_what_pytorch_counts(history, layers):
    model, cache = network(history=history, history_layers=layers, learn_sigma=True), KVCache(STEPS)
    x, t, y = trajectory()
    x, t, y = x[:1], t[None], y[:1]  # one image
    assert counted(lambda: model(x, t, y)) == model.macs(STEPS)
    assert counted(lambda: [model(x[:, [i]], t[:, [i]], y, cache) for i in range(STEPS)]) == model.macs(STEPS)


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [
    dict(history="diagonal"), dict(history_layers=4), dict(history_layers=-1), dict(image_size=7)])
def test_wrong_configurations_are_refused(wrong):
    with pytest.raises(ValueError):
        DiT(**TINY | wrong)


@pytest.mark.parametrize("name", ["DiT-Q/2", "XL", "XL/", "XL/0", "XL/two", ""])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(ValueError, match="model size"):
        size(name)


def test_a_full_cache_refuses_more():
    model, cache = network(history_layers=1), KVCache(2)
    x, t, y = trajectory()
    with torch.no_grad():
        model(x[:, :2], t[:2], y, cache)
        with pytest.raises(ValueError, match="cache"):
            model(x[:, 2:3], t[2:3], y, cache)
