"""The network against networks that are written here.

`plain_dit` below is the public DiT by the book: a loop over patches, one modulation per token,
attention as a softmax of a score matrix with a dense mask. It uses nothing of model.py but the
mask, and reads the weights by their public names. Whatever model.py does faster (states folded into
the batch, sliced keys, a cache) must come to the same numbers.

A fresh DiT predicts exactly zero (adaLN-zero), and zero agrees with almost anything. So every
network here has random weights, and `run` insists on an output that is not small.
"""

import math
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
from config import MASKS, ModelConfig, parse_size
from model import DiT, KVCache, history_mask, sincos_positions

TINY = ModelConfig(image_size=6, channels=3, classes=5, patch=2, width=32, depth=3, heads=4)
TOKENS, STATES = 9, 4  # n, and S


def network(**changes):
    """A tiny DiT with random weights."""
    model = DiT(replace(TINY, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15, generator=generator)
    return model


def trajectory():
    """x (b, s, c, h, w), timesteps (s,), y (b,)."""
    torch.manual_seed(1)
    x = torch.randn(2, STATES, 3, 6, 6)
    return x, torch.tensor([999.0, 750.0, 500.0, 250.0]), torch.tensor([1, 4])


def run(model, x, timesteps, y):
    out = model(x, timesteps, y)
    assert out.shape == x.shape and out.std() > 0.1
    return out


def run_stepwise(model, x, timesteps, y, cache):
    """One state at a time, as in sampling."""
    outputs = [model(x[:, [i]], timesteps[[i]], y, cache) for i in range(x.shape[1])]
    return torch.cat(outputs, dim=1)


def moved(model, j):
    """Which states' outputs change at all (in any bit) when state j of the input does."""
    x, timesteps, y = trajectory()
    other = x.clone()
    other[:, j] += torch.randn_like(x[:, j])
    with torch.no_grad():
        before, after = run(model, x, timesteps, y), run(model, other, timesteps, y)
    return [not torch.equal(before[:, i], after[:, i]) for i in range(STATES)]


def test_a_fresh_network_predicts_zero_and_each_of_its_layers_is_the_identity():
    model = DiT(TINY)
    x, timesteps, y = trajectory()
    assert torch.equal(model(x, timesteps, y), torch.zeros_like(x))
    tokens, c = model.embed(x), model.condition(timesteps, y)
    assert tokens.std() > 0.1 and torch.equal(model.run_layer(0, tokens, c), tokens)


# ---- a DiT by the book ---------------------------------------------------------------------------


def plain_dit(w, x, timesteps, y, masks, patch=2, heads=4):
    """w: weights by name; x: (b, s, c, h, w), whose tokens are put in one row; timesteps: (b, s);
    y: (b,); masks: for each layer, which token (row) may read which (column), (s·n, s·n).
    With s = 1 it is the DiT of Peebles & Xie."""
    b, s, channels, side, _ = x.shape
    g = side // patch

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(v, shift, scale):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def silu(v):
        return v / (1 + torch.exp(-v))

    patches = []  # a patch goes in as (c p q)
    for i in range(s):
        for r in range(0, side, patch):
            for q in range(0, side, patch):
                patches.append(x[:, i, :, r : r + patch, q : q + patch].reshape(b, -1))
    kernel = w["x_embedder.proj.weight"].reshape(-1, channels * patch * patch)
    h = torch.stack(patches, 1) @ kernel.T + w["x_embedder.proj.bias"]
    h = h + w["pos_embed"].repeat(1, s, 1)

    angles = timesteps[..., None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    label = w["y_embedder.embedding_table.weight"][y][:, None]
    c = linear("t_embedder.mlp.2", silu(time)) + label
    c = silu(c.repeat_interleave(g * g, dim=1))  # (b, s·n, width): one condition per token

    for i, mask in enumerate(masks):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h, shift1, scale1))
        q, k, v = qkv.reshape(b, s * g * g, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (b, heads, s·n, s·n)
        scores = scores.masked_fill(~mask, -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + gate1 * linear(f"blocks.{i}.attn.proj", attended)
        u = linear(f"blocks.{i}.mlp.fc1", norm(h, shift2, scale2))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))  # GELU
        h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", u)

    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", norm(h, shift, scale))
    out = out.reshape(b, s, g, g, patch, patch, -1)  # a patch comes out as (p q c)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, s, -1, side, side)[:, :, :channels]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_without_history_it_is_one_plain_dit_per_state(learn_sigma):
    model = network(mask="causal", history_layers=0, learn_sigma=learn_sigma)
    x, timesteps, y = trajectory()
    timesteps = torch.stack([timesteps, timesteps / 2])  # (b, s): each sample may have its own
    out = run(model, x, timesteps, y)
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    for i in range(STATES):
        alone = plain_dit(model.state_dict(), x[:, [i]], timesteps[:, [i]], y, 3 * [everything])
        torch.testing.assert_close(out[:, [i]], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_the_slices_compute_what_the_mask_says_outputs_and_gradients(mask, layers):
    model = network(mask=mask, history_layers=layers)
    x, timesteps, y = trajectory()
    weights = dict(model.named_parameters())
    trained = [weight for weight in weights.values() if weight.requires_grad]
    masks = layers * [history_mask(mask, STATES, TOKENS)]
    masks += (3 - layers) * [history_mask("none", STATES, TOKENS)]
    out = run(model, x, timesteps, y)
    expected = plain_dit(weights, x, timesteps.expand(2, -1), y, masks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    target = torch.randn_like(x)
    ours = torch.autograd.grad((out - target).square().mean(), trained)
    dense = torch.autograd.grad((expected - target).square().mean(), trained)
    for gradient, reference in zip(ours, dense, strict=True):
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)


def test_the_example_of_the_docstring():
    _, _, example = model_module.__doc__.partition("is not trained):\n")
    *setup, last = textwrap.dedent(example).strip().splitlines()
    names = vars(model_module) | dict(parse_size=parse_size)
    exec("\n".join(setup), names)
    out = eval(last.partition("#")[0], names)
    assert out.shape == eval(last.partition("#")[2]) and not out.any()  # it is not trained


# ---- which state reads which ---------------------------------------------------------------------

PAPER = {  # Fig. 3; a row is the state that reads, a column the state that is read, x_T first
    "none": ["■···", "·■··", "··■·", "···■"],
    "window": ["■···", "■■··", "·■■·", "··■■"],
    "anchor": ["■···", "■■··", "■·■·", "■··■"],
    "causal": ["■···", "■■··", "■■■·", "■■■■"],
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_is_the_papers(mask):
    states = torch.tensor([[cell == "■" for cell in row] for row in PAPER[mask]])
    assert torch.equal(history_mask(mask, 4, 1), states)
    every_token = torch.kron(states, torch.ones(3, 3, dtype=torch.bool))  # of a state alike
    assert torch.equal(history_mask(mask, 4, 3), every_token)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_causal_to_the_bit(mask, shortcut):
    model = network(mask=mask, history_layers=2, noise_shortcut=shortcut)
    for j in range(STATES):
        changes = moved(model, j)
        assert changes[j] and not any(changes[:j])


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_told_apart_by_one_layer(mask):
    model = network(mask=mask, history_layers=1)  # one layer: what moves was read directly
    for j in range(STATES):
        assert moved(model, j) == [row[j] == "■" for row in PAPER[mask]]


# ---- the noise shortcut --------------------------------------------------------------------------


def test_the_noise_shortcut_reads_x_T_and_nothing_else():
    model = network(noise_shortcut=True)  # and no history layers
    assert moved(model, 0) == [True, True, True, True]
    for j in range(1, STATES):
        assert moved(model, j) == [i == j for i in range(STATES)]


def test_the_noise_shortcut_adds_a_linear_map_of_x_Ts_token_at_the_same_place():
    model, x = network(noise_shortcut=True), trajectory()[0]
    with torch.no_grad():
        tokens = model.embed(x)
        matrix = model.noise_shortcut.weight.clone()
        model.noise_shortcut.weight.zero_()  # as it starts
        without = model.embed(x)
    expected = without.clone()
    expected[:, 1:] += without[:, :1] @ matrix.T
    torch.testing.assert_close(tokens, expected)
    assert (tokens - without)[:, 1:].abs().mean() > 0.1


def test_the_noise_shortcut_starts_at_zero_and_learns():
    model = network(noise_shortcut=True)
    fresh = DiT(model.config).noise_shortcut.weight
    assert torch.equal(fresh, torch.zeros_like(fresh))
    with torch.no_grad():
        model.noise_shortcut.weight.zero_()
    run(model, *trajectory()).square().mean().backward()
    assert model.noise_shortcut.weight.grad.abs().mean() > 1e-5


# ---- sampling with the cache ---------------------------------------------------------------------


@pytest.mark.parametrize("output_layers", [1, STATES])
@pytest.mark.parametrize("layers, shortcut", [(0, False), (1, False), (3, True), (0, True)])
@pytest.mark.parametrize("mask", MASKS)
def test_cached_sampling_equals_the_full_pass(mask, layers, shortcut, output_layers):
    model = network(
        mask=mask,
        history_layers=layers,
        noise_shortcut=shortcut,
        output_layers=output_layers,
    )
    x, timesteps, y = trajectory()
    tokens_read = []  # by the first layer, call by call

    def count(_, inputs, out):
        tokens_read.append(out[0].numel() // out.shape[-1])

    model.blocks[0].attn.qkv.register_forward_hook(count)
    cache = KVCache()
    with torch.no_grad():
        full = run(model, x, timesteps, y)
        stepwise = run_stepwise(model, x, timesteps, y, cache)
    torch.testing.assert_close(stepwise, full, rtol=1e-5, atol=1e-5)
    assert tokens_read == [STATES * TOKENS] + STATES * [TOKENS]  # one state at a time, no prefix
    # Only the layers that look back remember anything.
    assert len(cache.past) == (0 if mask == "none" else layers)


def test_every_step_has_its_own_output_layer():
    model = network(output_layers=STATES)
    x, timesteps, y = trajectory()
    with torch.no_grad():
        before = run(model, x, timesteps, y)
        model.final_layer3.linear.bias += 1
        change = run(model, x, timesteps, y) - before
    third = torch.zeros_like(x)
    third[:, 2] = 1
    torch.testing.assert_close(change, third)


@pytest.mark.parametrize("mask", MASKS)
def test_no_mask_reaches_attention(mask, monkeypatch):
    attend, queries = F.scaled_dot_product_attention, []

    def watch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        assert attn_mask is None and is_causal is False and dropout_p == 0
        queries.append(query.shape[-2])
        return attend(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model = network(mask=mask, history_layers=2)
    x, timesteps, y = trajectory()
    run(model, x, timesteps, y).sum().backward()
    in_training = len(queries)
    with torch.no_grad():
        run_stepwise(model, x, timesteps, y, KVCache())
    assert in_training == (3 if mask == "none" else 2 * STATES + 1)
    assert len(queries) - in_training == 3 * STATES
    assert set(queries) == {TOKENS}  # of one state: no S·n × S·n matrix anywhere


# ---- training ------------------------------------------------------------------------------------


def test_checkpointing_changes_no_gradient():
    model, passes = network(mask="causal", history_layers=2), []
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: passes.append(1))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = []
    for model.checkpointing in (False, True):
        loss = run(model, *trajectory()).square().mean()
        gradients.append(torch.autograd.grad(loss, trained))
    assert len(passes) == 1 + 2  # with checkpointing, the backward pass computes the layer again
    for stored, recomputed in zip(*gradients, strict=True):
        assert stored.abs().max() > 0
        torch.testing.assert_close(recomputed, stored, rtol=1e-6, atol=1e-8)


# ---- the public DiT ------------------------------------------------------------------------------


def public(size, **changes):
    """A public ImageNet-256 network, on the meta device: shapes without memory."""
    config = ModelConfig(
        image_size=32, channels=4, classes=1000, learn_sigma=True, **parse_size(size), **changes
    )
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    "letters, width, depth, heads, millions",
    [
        ("S", 384, 12, 6, 33),
        ("B", 768, 12, 12, 130),
        ("L", 1024, 24, 16, 458),
        ("XL", 1152, 28, 16, 675),
    ],
)
def test_parameters_of_the_public_sizes(letters, width, depth, heads, millions, patch):
    def linear(i, o):
        return i * o + o

    d, size = width, f"DiT-{letters}/{patch}"
    layer = linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    layer += linear(d, 6 * d)  # the modulation
    embedders = linear(4 * patch**2, d) + linear(256, d) + linear(d, d) + 1001 * d
    expected = embedders + depth * layer + linear(d, 2 * d) + linear(d, 8 * patch**2)

    assert parse_size(size) == dict(width=width, depth=depth, heads=heads, patch=patch)
    weights = list(public(size).parameters())
    assert sum(w.numel() for w in weights if w.requires_grad) == expected
    positions = (32 // patch) ** 2 * d  # fixed
    assert sum(w.numel() for w in weights) == expected + positions
    if patch == 2:
        assert round(expected / 1e6) == millions  # as published, which counts what is trained


def test_names_are_the_public_ones():
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    for i in range(28):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            layers.append(f"blocks.{i}.{part}")
    layers += ["final_layer.adaLN_modulation.1", "final_layer.linear"]
    names = {"pos_embed", "y_embedder.embedding_table.weight"}
    names |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    student = public("DiT-XL/2", mask="causal", history_layers=6)
    assert set(student.state_dict()) == names


def test_positions_are_the_public_ones():
    width, g = 32, 5
    column, row = np.meshgrid(np.arange(g), np.arange(g))  # "w goes first", as the public code says

    def sincos(d, positions):
        omega = 1 / 10000 ** (np.arange(d // 2) / (d / 2))
        angles = np.outer(positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    halves = [sincos(width // 2, column), sincos(width // 2, row)]
    expected = np.concatenate(halves, axis=1)
    np.testing.assert_allclose(sincos_positions(g, width)[0].numpy(), expected, atol=1e-6)
    fresh = DiT(replace(TINY, image_size=10)).pos_embed
    np.testing.assert_allclose(fresh[0].numpy(), expected, atol=1e-6)
    assert not fresh.requires_grad


def test_timesteps_become_256_sinusoids_cosines_first():
    embedder = network().t_embedder
    embedder.mlp = torch.nn.Identity()
    timesteps = np.array([[0, 1, 583], [41.5, 250, 999]])
    angles = timesteps[..., None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    found = embedder(torch.from_numpy(timesteps)).numpy()
    np.testing.assert_allclose(found, expected, atol=3e-4)  # 999 rad in float32


# ---- text ----------------------------------------------------------------------------------------


class FewPrompts:
    """Three prompts of 2, 4 and 1 words, padded to 4; the last is the empty one."""

    vectors = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(3))
    words = torch.tensor([2, 4, 1])

    def __getitem__(self, y):
        is_word = torch.arange(4) < self.words[y][:, None]
        return self.vectors.to(torch.get_default_dtype())[y] * is_word[..., None]

    def __deepcopy__(self, memo):
        return self


def text_network(**changes):
    model = network(text_width=8, **changes)
    model.prompts = FewPrompts()
    return model


def plain_text_dit(model, x, timesteps, y, mask):
    """PixArt-α's network over all tokens of a trajectory in one row, with a dense mask. Every state
    reads its text by itself, word by word without padding."""
    w = model.state_dict(keep_vars=True)
    b, s = x.shape[:2]

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(v, shift, scale):
        return F.layer_norm(v, v.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def attend(q, k, v, mask=None):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    outputs = []
    for i in range(b):
        h = torch.cat([model.embed(x[[i]])[0, j] for j in range(s)])        # (s·n, width)
        words = FewPrompts()[y[[i]]][0, : FewPrompts.words[y[i]]]
        words = F.gelu(linear("text_embedder.0", words), approximate="tanh")
        words = linear("text_embedder.2", words)
        time = model.t_embedder(timesteps)                                  # (s, width)
        six = linear("shared_modulation.1", F.silu(time)).repeat_interleave(TOKENS, 0)
        for layer in range(3):
            name = f"blocks.{layer}"
            vectors = (six + w[f"{name}.adaLN_modulation.scale_shift_table"]).chunk(6, -1)
            q, k, v = linear(f"{name}.attn.qkv", norm(h, *vectors[:2])).chunk(3, -1)
            seen = mask if layer < 2 else history_mask("none", s, TOKENS)
            h = h + vectors[2] * linear(f"{name}.attn.proj", attend(q, k, v, seen))
            k, v = linear(f"{name}.cross_attn.kv", words).chunk(2, -1)
            read = [attend(linear(f"{name}.cross_attn.q", h[[t]]), k, v) for t in range(len(h))]
            h = h + linear(f"{name}.cross_attn.proj", torch.cat(read))
            u = linear(f"{name}.mlp.fc1", norm(h, *vectors[3:5]))
            h = h + vectors[5] * linear(f"{name}.mlp.fc2", F.gelu(u, approximate="tanh"))
        two = time.repeat(1, 2).repeat_interleave(TOKENS, 0)
        shift, scale = (two + w["final_layer.adaLN_modulation.scale_shift_table"]).chunk(2, -1)
        out = linear("final_layer.linear", norm(h, shift, scale))
        outputs.append(out.reshape(s, 3, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(s, 3, 6, 6))
    return torch.stack(outputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mask", MASKS)
def test_a_text_network_equals_dense_attention_with_a_text_for_each_state(mask):
    model = text_network(mask=mask, history_layers=2)
    x, timesteps, _ = trajectory()
    y = torch.tensor([0, 1])
    out = run(model, x, timesteps, y)
    expected = plain_text_dit(model, x, timesteps, y, history_mask(mask, STATES, TOKENS))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    trained = [w for w in model.parameters() if w.requires_grad]
    gradients, dense = (
        torch.autograd.grad(o.square().mean(), trained) for o in (out, expected)
    )
    for ours, reference in zip(gradients, dense, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-7, atol=1e-9)


def test_the_texts_keys_and_values_are_computed_once_for_a_sample():
    model = text_network(mask="causal", history_layers=2)
    x, timesteps, _ = trajectory()
    y, calls = torch.tensor([0, -1]), []
    for layer in model.blocks:
        layer.cross_attn.kv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        full = run(model, x, timesteps, y)
        assert len(calls) == 3  # once in each layer, for all four states
        stepwise = run_stepwise(model, x, timesteps, y, KVCache())
    assert len(calls) == 3 + 3  # and once in each layer, for all four steps
    torch.testing.assert_close(stepwise, full, rtol=1e-5, atol=1e-5)


def test_a_text_network_has_no_classes():
    names = set(text_network().state_dict())
    assert not any("y_embedder" in name for name in names)
    fresh = DiT(replace(TINY, text_width=8))
    fresh.prompts = FewPrompts()
    x, timesteps, _ = trajectory()
    assert torch.equal(fresh(x, timesteps, torch.tensor([0, 1])), torch.zeros_like(x))
