"""The diffusion transformer (DiT) over a trajectory: the one network of this project.

A *trajectory* is a short list of images x_{τ_S}, …, x_{τ_0}: what an ODE passes on its way from the noise x_{τ_S} = x_T
to a picture, x_{τ_0}. A diffusion model reads one of them and says where to go. The student of AutoRegressive
Distillation (ARD, arXiv 2504.11295) reads *all so far*, its history, and says where to go next. Both are this class:

    teacher   x of shape (b, 1, c, h, w): a trajectory of one state; history_layers = 0
    student   x of shape (b, s, c, h, w): s states, the *blocks* of its sequence, of n tokens each
              (a block is always that, except in the public DiT's names for its layers: `Block`, `DiT.blocks`)

The student differs from Peebles & Xie's DiT (arXiv 2212.09748) in two ways, and starts from the teacher's weights:

  1. every block carries its own time (the paper's "token-wise time embedding");
  2. in the lowest N = `history_layers` layers, a block also attends to earlier blocks. Above, it sees only itself.
     N = 0 is plain step distillation. Which earlier blocks are visible is the `history` (the paper's four masks):

         none (M1)         window (M2)       anchor (M3)       causal (M4)
         x_T  ■ · · ·      ■ · · ·           ■ · · ·           ■ · · ·
         τ_3  · ■ · ·      ■ ■ · ·           ■ ■ · ·           ■ ■ · ·
         τ_2  · · ■ ·      · ■ ■ ·           ■ · ■ ·           ■ ■ ■ ·
         τ_1  · · · ■      · · ■ ■           ■ · · ■           ■ ■ ■ ■

No mask tensor is ever built. A block-wise mask is just a choice of which keys to hand to a block's queries, so we
slice the keys instead. Sampling one block at a time with a `KVCache` runs the very same lines.

This file knows nothing of noise, data or losses. Parameter names are the public DiT's. To see it work:

    model = DiT(image_size=16, channels=3, classes=10, **size("DiT-T/4"), history_layers=2)
    model(torch.randn(8, 4, 3, 16, 16), t=torch.tensor([999, 750, 500, 250]), y=torch.zeros(8, dtype=torch.long))
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

HISTORIES = ("none", "window", "anchor", "causal")

SIZES = {
    "N": dict(width=64, depth=6, heads=4),  # nano: points in the plane
    "T": dict(width=128, depth=6, heads=4),  # tiny: 16×16 shapes, on a CPU
    "S": dict(width=384, depth=12, heads=6),  # the four public sizes: 33M parameters,
    "B": dict(width=768, depth=12, heads=12),  # 130M,
    "L": dict(width=1024, depth=24, heads=16),  # 458M,
    "XL": dict(width=1152, depth=28, heads=16),  # and 675M
}


def size(name: str) -> dict:
    """"DiT-XL/2" (or "XL/2") -> the width, depth, heads and patch of that configuration. Raises ValueError for other
    names."""
    letters, _, patch = name.removeprefix("DiT-").partition("/")
    if letters not in SIZES or not patch.isdigit() or patch == "0":
        raise ValueError(f"no model size {name!r}: write SIZE/PATCH with a size of {', '.join(SIZES)}, such as DiT-S/2")
    return dict(**SIZES[letters], patch=int(patch))


class KVCache:
    """Keys and values of the blocks read so far, kept for the history layers only (the others never look back).

    `capacity` is the number of blocks that will be read in all. Use one cache for one batch of trajectories."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.seen = 0  # blocks read so far; DiT.forward counts
        self.buffers = {}  # Attention -> keys and values, (2, b, h, capacity * n, d)

    def extend(self, layer, k, v, n: int):
        """Append the keys and values (b, h, s*n, d) of s new blocks of n tokens; return those of all so far."""
        start, stop = self.seen * n, self.seen * n + k.shape[2]
        if stop > self.capacity * n:
            raise ValueError(f"a cache for {self.capacity} blocks cannot take {k.shape[2] // n} after {self.seen}")
        if layer not in self.buffers:
            b, h, _, d = k.shape
            self.buffers[layer] = k.new_empty(2, b, h, self.capacity * n, d)
        buffer = self.buffers[layer]
        buffer[0, :, :, start:stop], buffer[1, :, :, start:stop] = k, v
        return buffer[0, :, :, :stop], buffer[1, :, :, :stop]


def visible(keys, i: int, n: int, history: str):
    """The keys (or values) that block i may read, out of those of the blocks so far, (b, h, s*n, d); `history` is not
    "none". Slices, hence no copies, except for `anchor`, whose two blocks are no neighbours in general."""
    if history == "causal" or i == 0:
        return keys[:, :, : (i + 1) * n]
    if history == "window":
        return keys[:, :, (i - 1) * n : (i + 1) * n]
    return torch.cat([keys[:, :, :n], keys[:, :, i * n : (i + 1) * n]], dim=2)  # anchor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, history: str, cache: KVCache | None):
        b, s, n, _ = x.shape  # (b, s, n, width)
        split = dict(qkv=3, h=self.heads)
        if history == "none":  # each block on its own: blocks are just more batch
            q, k, v = rearrange(self.qkv(x), "b s n (qkv h d) -> qkv (b s) h n d", **split)
            x = F.scaled_dot_product_attention(q, k, v)  # (b*s, h, n, d)
            return self.proj(rearrange(x, "(b s) h n d -> b s n (h d)", b=b))

        q, k, v = rearrange(self.qkv(x), "b s n (qkv h d) -> qkv b h (s n) d", **split)  # views, no copies
        first = cache.seen if cache is not None else 0
        if cache is not None:
            k, v = cache.extend(self, k, v, n)
        queries = q.split(n, dim=2)  # s blocks of (b, h, n, d)
        x = [
            F.scaled_dot_product_attention(block, visible(k, i, n, history), visible(v, i, n, history))
            for i, block in enumerate(queries, start=first)
        ]
        return self.proj(rearrange(x, "s b h n d -> b s n (h d)"))  # einops stacks the list: axis s


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """adaLN: (1 + scale)·x + shift, with one shift and scale per block, (b, s, 1, width), broadcast over its n
    tokens."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """A transformer layer. The condition c = time + label shifts and scales what its LayerNorms give, and gates what
    attention and MLP add (adaLN-zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, history: str = "none", cache: KVCache | None = None):
        six = rearrange(self.adaLN_modulation(c), "b s (six d) -> six b s 1 d", six=6)  # once per state, not per token
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), history, cache)
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = rearrange(self.adaLN_modulation(c), "b s (two d) -> two b s 1 d", two=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Times, one per block, to vectors: 256 sinusoids (cosines first), then a small MLP."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):  # (b, s) or (s,)
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t[..., None].float() * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (…, width)


class DiT(nn.Module):
    """The network. `image_size`, `patch` and `channels` give the tokens; `width`, `depth` and `heads` the
    transformer.

    classes         number of labels; label `classes` is one more, the null class of classifier-free guidance
    learn_sigma     the public ImageNet models also predict a variance, in C extra output channels, which no ODE needs
    history         which earlier blocks a block may read in the lowest `history_layers` layers (paper, Fig. 3)
    step_heads      1: one output layer for all steps (the paper's text); S: one for each step (the authors' code)

    Set `model.checkpointing = True` to recompute each layer in the backward pass instead of storing its
    activations."""

    def __init__(self, *, image_size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int,
                 learn_sigma: bool = False, history: str = "causal", history_layers: int = 0, step_heads: int = 1):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"an image of {image_size} pixels cannot be cut into patches of {patch}")
        if history not in HISTORIES:
            raise ValueError(f"no history {history!r}: choose one of {', '.join(HISTORIES)}")
        if not 0 <= history_layers <= depth:
            raise ValueError(f"history_layers is {history_layers}: the model has {depth} layers")
        self.patch, self.channels, self.width, self.heads = patch, channels, width, heads
        self.grid, self.null_class = image_size // patch, classes
        self.history, self.history_layers = history, history_layers
        self.checkpointing = False

        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.head_names = ["final_layer"] + [f"final_layer{i}" for i in range(2, step_heads + 1)]
        for name in self.head_names:
            setattr(self, name, FinalLayer(width, patch, channels * (2 if learn_sigma else 1)))
        self.initialise()

    def initialise(self):
        """DiT's: Xavier for the linear layers, and adaLN-*zero*: gates and output start at 0, so every layer starts
        as the identity and a fresh network outputs exactly zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.flatten(1))
        nn.init.zeros_(self.x_embedder["proj"].bias)
        for layer in (self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        heads = [getattr(self, name) for name in self.head_names]
        for zero in [layer.adaLN_modulation[1] for layer in [*self.blocks, *heads]] + [head.linear for head in heads]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def condition(self, t, y):
        """c = time + label, for each block: (b, s, width). t: (s,) or (b, s); y: (b,)."""
        return self.t_embedder(t) + self.y_embedder["embedding_table"](y)[:, None]

    def forward(self, x, t, y, cache: KVCache | None = None, features: list | None = None):
        """x: s states (b, s, c, h, w); t: their times, (s,) or (b, s), in the unit the model was trained with (0 …
        1000); y: labels (b,). Returns one image per state, (b, s, c, h, w): the prediction made at each block.

        With a `cache`, x holds only the *next* states: those read before are remembered. What each layer puts out, (b,
        s, n, width), is added to a list of `features`."""
        b, s = x.shape[:2]
        first = cache.seen if cache is not None else 0  # index of x's first block in its trajectory
        x = self.x_embedder["proj"](rearrange(x, "b s c h w -> (b s) c h w"))
        x = rearrange(x, "(b s) d h w -> b s (h w) d", b=b) + self.pos_embed  # (b, s, n, width)
        c = self.condition(t, y)

        for i, layer in enumerate(self.blocks):
            history = self.history if i < self.history_layers else "none"
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, c, history, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, c, history, cache)
            if features is not None:
                features.append(x)

        if len(self.head_names) == 1:
            x = self.final_layer(x, c)
        else:
            heads = [getattr(self, name) for name in self.head_names[first : first + s]]
            if len(heads) < s:
                raise ValueError(f"a student with {len(self.head_names)} output layers cannot take step {first + s}")
            x = torch.cat([head(x[:, i : i + 1], c[:, i : i + 1]) for i, head in enumerate(heads)], dim=1)
        if cache is not None:
            cache.seen += s
        x = rearrange(x, "b s (h w) (p q c) -> b s c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)
        return x[:, :, : self.channels]  # (b, s, c, h, w)

    def compile_layers(self):
        """torch.compile, for each layer by itself: having the same code, they share graphs. But not the cache's code,
        whose look-up would cost a graph for each. (It is kept out here, not by a decorator, which would load the
        compiler whenever a program starts.)"""
        KVCache.extend = torch.compiler.disable(KVCache.extend)
        for layer in self.blocks:
            layer.compile()

    def macs(self, blocks: int = 1) -> int:
        """Multiply-accumulates of reading a trajectory of that many blocks, for one image: 118.6 G for DiT-XL/2 (which
        papers call FLOPs) and one block. It is the same in one pass and with a cache, one block at a time."""
        n, d, depth = self.grid**2, self.width, len(self.blocks)
        out = self.final_layer.linear.out_features
        tokens = n * (self.channels * self.patch**2 * d + depth * 12 * d * d + d * out)  # qkv 3, proj 1, MLP 8
        condition = self.t_embedder.frequencies * d + d * d + depth * 6 * d * d + 2 * d * d  # time; adaLN
        attention = depth * 2 * n * n * d  # each block on itself: q·k and the sum of values
        earlier = {"none": 0, "causal": blocks * (blocks - 1) // 2}.get(self.history, blocks - 1)  # blocks read besides
        return blocks * (tokens + condition + attention) + self.history_layers * earlier * 2 * n * n * d

    def activation_bytes(self, blocks: int = 1, bf16: bool = False, checkpointing: bool = False) -> int:
        """Roughly what the backward pass needs stored of a trajectory of that many blocks: measured, 85 bytes for each
        token, feature and layer in float32, 51 under bf16 autocast; with checkpointing 5, and of one layer all."""
        layer, depth = 51 if bf16 else 85, len(self.blocks)
        return blocks * self.grid**2 * self.width * (5 * depth + layer if checkpointing else layer * depth)


def sincos_positions(grid: int, width: int):
    """Fixed 2-D positions, (1, grid*grid, width): half of the channels for the column, half for the row; sines, then
    cosines."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (grid, width/2)
    columns, rows = line[None, :].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "row col d -> 1 (row col) d")
