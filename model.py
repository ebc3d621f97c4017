"""The diffusion transformer (DiT) over a trajectory: the one network of this project.

A diffusion model turns noise into an image by solving an ODE in many small steps. The student of
AutoRegressive Distillation (ARD, arXiv 2504.11295) makes the same image in S large steps. Of all
the states that the ODE passes, S + 1 matter to it. They are called a *trajectory*:

    x_{τ_S} = x_T,  x_{τ_{S−1}},  …,  x_{τ_1},  x_{τ_0} = x_0

from the noise x_T to the image x_0, where τ_S > … > τ_0 are the times of these states. The code
counts from the noise: state i is x_{τ_{S−i}}.

A teacher reads one state, and its output says where the ODE goes next. The student reads the
current state and, as its *history*, all states before it. Its output gives the next state. Both are
this class:

    teacher   x has shape (b, 1, c, h, w): one state, and no history layers
    student   x has shape (b, s, c, h, w): the first s states of a trajectory, s ≤ S. (The last
              state, x_0, is only ever an output.)

In shapes, b is the batch, s the number of states, n the number of tokens of a state, and c, h, w
are channels, height and width. (In the paper's formulas, s is a step, and counts down from S. A
variable c in the code is the condition: see DiT.condition.)

Every image is made for some y, the index of a class or, in a *text network* (`config.reads_text`),
the index of a prompt. Compared with the DiT of Peebles & Xie (arXiv 2212.09748), two things are
new:

  1. Each state has its own *timestep*, a number that tells the network the time of that state (the
     paper's "token-wise time embedding"). All states share the positions and the weights of the
     layers. So, apart from two options (the noise shortcut, and an output layer for each step),
     only their timesteps tell their tokens apart.
  2. In the first N layers (`history_layers`), those nearest the input, a state also attends to
     earlier states. In the later layers it attends only to itself. With N = 0, or with the mask
     "none", the student sees its current state and nothing else: this is step distillation. (The
     noise shortcut, an addition of ours, shows it x_T as well. See add_noise_shortcut.)

The paper compares four masks, M1 to M4, for which earlier states are visible in those N layers.
For S = 4, a row is the state that reads and a column is the state that is read:

         none (M1)            window (M2)          anchor (M3)          causal (M4)
         x_T x_τ3 x_τ2 x_τ1   x_T x_τ3 x_τ2 x_τ1   x_T x_τ3 x_τ2 x_τ1   x_T x_τ3 x_τ2 x_τ1
    x_T   ■   ·    ·    ·      ■   ·    ·    ·      ■   ·    ·    ·      ■   ·    ·    ·
    x_τ3  ·   ■    ·    ·      ■   ■    ·    ·      ■   ■    ·    ·      ■   ■    ·    ·
    x_τ2  ·   ·    ■    ·      ·   ■    ■    ·      ■   ·    ■    ·      ■   ■    ■    ·
    x_τ1  ·   ·    ·    ■      ·   ·    ■    ■      ■   ·    ·    ■      ■   ■    ■    ■

`history_mask` returns exactly this, as a matrix over tokens. The network computes the same
attention without the matrix: it hands the queries of each state only the keys that they may see.

This file knows nothing of noise paths, data or losses. Parameters have the same names as in the
public code of DiT, which calls a transformer layer a "block". An example, in which T/4 is the size
"tiny" with patches of 4×4 pixels (ModelConfig and parse_size are in config.py; the result is zero,
since the network is not trained):

    config = ModelConfig(image_size=16, channels=3, classes=10, **parse_size("T/4"),
                         mask="causal", history_layers=2)
    x, y = torch.randn(8, 4, 3, 16, 16), torch.zeros(8, dtype=torch.long)
    DiT(config)(x, timesteps=torch.tensor([1000, 750, 500, 250]), y=y)       # (8, 4, 3, 16, 16)
"""

import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig

# ---- 1. Which state reads which ------------------------------------------------------------------


def history_mask(mask: str, states: int, tokens: int) -> torch.Tensor:
    """The paper's mask as a matrix, (states·tokens, states·tokens): True where the token of a row
    may read the token of a column. Tests and evaluate.py use it. The network slices keys instead
    (visible_keys)."""
    query = torch.arange(states)[:, None]
    key = torch.arange(states)[None, :]
    visible = {
        "none": key == query,
        "window": (key == query) | (key == query - 1),
        "anchor": (key == query) | (key == 0),
        "causal": key <= query,
    }[mask]
    return repeat(visible, "query key -> (query i) (key j)", i=tokens, j=tokens)


def visible_keys(kv: torch.Tensor, i: int, n: int, mask: str) -> torch.Tensor:
    """What the mask does, by slicing. kv: keys or values, or both, stacked, (…, s·n, d), of s > i
    states with n tokens each. Returns the part that state i may read."""
    own = kv[..., i * n : (i + 1) * n, :]
    if mask == "none" or i == 0:
        return own
    if mask == "window":
        return kv[..., (i - 1) * n : (i + 1) * n, :]
    if mask == "anchor":
        return torch.cat([kv[..., :n, :], own], dim=-2)
    return kv[..., : (i + 1) * n, :]  # causal


class KVCache:
    """What the network remembers of the states that it has read, when it samples one state at a
    time: their keys and values in the history layers. (The other layers never look back.) It also
    remembers two things that are the same at every step: the noise shortcut and the text.

    A cache serves one batch of trajectories."""

    def __init__(self):
        self.states_read = 0  # counted by DiT.forward, when a pass is over
        self.past = {}  # number of a history layer -> the list that Attention calls `past`
        self.shortcut = None  # what DiT.add_noise_shortcut adds to each state
        self.text = None  # see DiT.read_text


# ---- 2. A transformer layer ----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask: str, past: list | None):
        """x: (b, s, n, width). past: None without a cache. With one, it is a list through which
        this layer keeps its keys and values from call to call: empty before the first state, then
        one tensor, (2, b, heads, tokens, d), of all states that were read before. This method
        replaces that tensor by one that also includes x. (All states are kept, whatever the
        mask.)"""
        b, s, n, _ = x.shape
        split = dict(three=3, heads=self.heads)
        if mask == "none":
            # Each state attends to itself only, so the states can be folded into the batch.
            qkv = rearrange(self.qkv(x), "b s n (three heads d) -> three (b s) heads n d", **split)
            x = F.scaled_dot_product_attention(*qkv)                        # (b·s, heads, n, d)
            return self.proj(rearrange(x, "(b s) heads n d -> b s n (heads d)", b=b))

        qkv = rearrange(self.qkv(x), "b s n (three heads d) -> three b heads (s n) d", **split)
        q, kv = qkv[0], qkv[1:]
        states_before = 0
        if past is not None:
            kv = torch.cat([*past, kv], dim=3)
            past[:] = [kv]
            states_before = kv.shape[3] // n - s
        outputs = []  # one for each state; rearrange stacks them
        for i, query in enumerate(q.split(n, dim=2), start=states_before):  # (b, heads, n, d)
            seen = visible_keys(kv, i, n, mask)                             # (2, b, heads, …, d)
            outputs.append(F.scaled_dot_product_attention(query, *seen))
        return self.proj(rearrange(outputs, "s b heads n d -> b s n (heads d)"))


class CrossAttention(nn.Module):
    """The tokens of all states read a text (PixArt-α, arXiv 2310.00426). It is the same for all
    states of a trajectory, so its keys and values are computed once per pass, and are cached in
    sampling."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text):
        """text: (b, l, width). Returns keys and values, (2, b, heads, l, d)."""
        kv = self.kv(text)
        return rearrange(kv, "b l (two heads d) -> two b heads l d", two=2, heads=self.heads)

    def forward(self, x, keys_values, is_word):
        """x: (b, s, n, width); is_word: (b, l), False at padding."""
        q = rearrange(self.q(x), "b s n (heads d) -> b heads (s n) d", heads=self.heads)
        k, v = keys_values
        is_word = rearrange(is_word, "b l -> b 1 1 l")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_word)    # (b, heads, s·n, d)
        return self.proj(rearrange(out, "b heads (s n) d -> b s n (heads d)", s=x.shape[1]))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """(1 + scale)·x + shift. The condition gives one shift and one scale for each state,
    (b, s, 1, width), which are broadcast over the state's n tokens."""
    return torch.addcmul(shift, x, 1 + scale)


class SharedAdaLN(nn.Module):
    """The modulation of a layer in a text network (PixArt-α's adaLN-single): shared vectors plus
    the layer's own. In a transformer layer, `shared` holds six vectors, which are the same for all
    layers (DiT.shared_modulation); each is added to one of the layer's six. In the output layer,
    `shared` is a single vector, the condition c, which is added to both its shift and its
    scale."""

    def __init__(self, width: int, vectors: int):
        super().__init__()
        self.width = width
        self.scale_shift_table = nn.Parameter(torch.zeros(vectors * width))

    def forward(self, shared):
        """shared: (b, s, vectors·width), or a single vector, (b, s, width). Returns
        (b, s, vectors·width)."""
        shared = rearrange(shared, "b s (k d) -> b s k d", d=self.width)
        own = rearrange(self.scale_shift_table, "(k d) -> k d", d=self.width)
        return rearrange(shared + own, "b s k d -> b s (k d)")


class Block(nn.Module):
    """A transformer layer with adaLN-zero: the condition c sets the shift and scale after each
    LayerNorm, and gates what attention and MLP add. In a text network (`reads_text`),
    cross-attention to the text stands between attention and MLP, without LayerNorm or gate."""

    def __init__(self, width: int, heads: int, reads_text: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width)
        if reads_text:
            self.cross_attn = CrossAttention(width, heads)
            self.adaLN_modulation = SharedAdaLN(width, vectors=6)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, mask: str = "none", past: list | None = None, text=None):
        """x: (b, s, n, width); c: the condition, (b, s, width), or in a text network six vectors
        that are computed from it, (b, s, 6·width); past: see Attention; text: this layer's pair
        from DiT.read_text."""
        modulation = self.adaLN_modulation(c)                               # once per state
        modulation = rearrange(modulation, "b s (six d) -> six b s 1 d", six=6)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        attn_input = modulate(self.norm1(x), shift_attn, scale_attn)
        x = x + gate_attn * self.attn(attn_input, mask, past)
        if text is not None:
            x = x + self.cross_attn(x, *text)
        mlp_input = modulate(self.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp * self.mlp(mlp_input)


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int, reads_text: bool = False):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        if reads_text:
            self.adaLN_modulation = SharedAdaLN(width, vectors=2)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        """x: (b, s, n, width); c: the condition, (b, s, width)."""
        modulation = rearrange(self.adaLN_modulation(c), "b s (two d) -> two b s 1 d", two=2)
        shift, scale = modulation
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---- 3. Embeddings -------------------------------------------------------------------------------


class TimestepEmbedder(nn.Module):
    """A timestep becomes 256 sinusoids, cosines first, and then goes through a small MLP. Timesteps
    are numbers from 0 to 1000, or from 0 to 1 in two public networks (see teacher.py)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps):
        index = torch.arange(128, device=timesteps.device)
        omega = torch.exp(-math.log(10000) * index / 128)
        angles = timesteps[..., None].float() * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))    # (…, width)


def sincos_positions(grid_size: int, width: int, scale: float = 1.0) -> torch.Tensor:
    """Fixed 2-D positions, (1, grid_size², width), divided by `scale` (PixArt-α's, for large
    images). Half of the features are for the column and half for the row; of each half, sines come
    first."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    positions = torch.arange(grid_size, dtype=torch.float64) / scale
    angles = positions[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()           # (grid_size, width/2)
    column = repeat(line, "col d -> row col d", row=grid_size)
    row = repeat(line, "row d -> row col d", col=grid_size)
    return rearrange(torch.cat([column, row], dim=-1), "row col d -> 1 (row col) d")


# ---- 4. The network ------------------------------------------------------------------------------


class DiT(nn.Module):
    """The diffusion transformer. `model.checkpointing = True` recomputes each layer in the backward
    pass instead of storing its activations."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.compiled_blocks = None  # see compile_layers
        # In a text network, y holds the indices of prompts, and prompts[y] their words as vectors,
        # (b, l, text_width), made by an encoder that is not trained: see text.Prompts.
        self.prompts = None
        width, patch, reads_text = config.width, config.patch, config.reads_text

        self.x_embedder = nn.ModuleDict(
            {"proj": nn.Conv2d(config.channels, width, patch, stride=patch)}
        )
        self.t_embedder = TimestepEmbedder(width)
        if reads_text:
            self.text_embedder = nn.Sequential(
                nn.Linear(config.text_width, width),
                nn.GELU(approximate="tanh"),
                nn.Linear(width, width),
            )
            self.shared_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        else:
            self.y_embedder = nn.ModuleDict(
                {"embedding_table": nn.Embedding(config.classes + 1, width)}
            )
        positions = sincos_positions(config.grid_size, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        layers = [Block(width, config.heads, reads_text) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(layers)
        if config.noise_shortcut:
            self.noise_shortcut = nn.Linear(width, width, bias=False)
        # Some public networks (learn_sigma) also output a variance, in as many more channels. It is
        # not used here, and has nothing to do with σ(t) in teacher.py.
        out_channels = config.channels * (2 if config.learn_sigma else 1)
        for name in self.output_layer_names:
            setattr(self, name, FinalLayer(width, patch, out_channels, reads_text))
        self.initialise()

    @property
    def null_class(self) -> int:
        """The label that stands for no label, for classifier-free guidance. In a text network it is
        −1, the index of the empty prompt, which is the last of the prompts."""
        return -1 if self.config.reads_text else self.config.classes

    @property
    def output_layer_names(self) -> list[str]:
        """One output layer for all steps, or one for each (with the names of the authors' code)."""
        count = self.config.output_layers
        return ["final_layer"] + [f"final_layer{i}" for i in range(2, count + 1)]

    def initialise(self):
        """As in DiT, linear layers start with Xavier's initialisation. These start at zero: all
        biases, the adaLN modulations, the output layers, the last projection of cross-attention,
        and the noise shortcut. So each layer starts as the identity, and a fresh network outputs
        exactly zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.flatten(1))
        if not self.config.reads_text:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for name, weight in self.named_parameters():
            if re.search("bias|modulation|final_layer|cross_attn.proj|noise_shortcut", name):
                nn.init.zeros_(weight)

    def forward(self, x, timesteps, y, cache: KVCache | None = None):
        """x: states, (b, s, c, h, w); timesteps: one for each state, (s,) or (b, s), on the scale
        that the network was trained with; y: labels, or indices of prompts, (b,). Returns an output
        for each state, (b, s, c, h, w).

        With a `cache`, x holds only the states that have not been read yet."""
        tokens = self.embed(x, cache)                                       # (b, s, n, width)
        c = self.condition(timesteps, y)                                    # (b, s, width)
        text, c_of_layers = [None] * len(self.blocks), c
        if self.config.reads_text:
            text = self.read_text(y, cache)
            c_of_layers = self.shared_modulation(c)                         # (b, s, 6·width)
        for i in range(len(self.blocks)):
            tokens = self.run_layer(i, tokens, c_of_layers, cache, text[i])
        out = self.output(tokens, c, cache)
        if cache is not None:
            cache.states_read += x.shape[1]
        return out

    def embed(self, x, cache: KVCache | None = None):
        """States (b, s, c, h, w) to tokens (b, s, n, width): patches and positions."""
        b = x.shape[0]
        patches = self.x_embedder["proj"](rearrange(x, "b s c h w -> (b s) c h w"))
        tokens = rearrange(patches, "(b s) d h w -> b s (h w) d", b=b) + self.pos_embed
        return self.add_noise_shortcut(tokens, cache) if self.config.noise_shortcut else tokens

    def add_noise_shortcut(self, tokens, cache: KVCache | None):
        """Ours, not the paper's: a linear map of x_T's tokens is added to the tokens at the same
        places in every later state. By attention alone, a small network takes long to learn to look
        at x_T in the same place (docs/results.md)."""
        if cache is not None and cache.states_read > 0:
            return tokens + cache.shortcut
        shortcut = self.noise_shortcut(tokens[:, :1])                       # (b, 1, n, width)
        if cache is not None:
            cache.shortcut = shortcut
        return torch.cat([tokens[:, :1], tokens[:, 1:] + shortcut], dim=1)

    def condition(self, timesteps, y):
        """The condition c of each state, (b, s, width): the embedding of its timestep plus that of
        the label. In a text network, where the prompt is read by cross-attention, it is the
        embedding of the timestep alone."""
        timestep = self.t_embedder(timesteps)                               # (…, s, width)
        if self.config.reads_text:
            return timestep.expand(len(y), -1, -1)
        label = self.y_embedder["embedding_table"](y)
        return timestep + rearrange(label, "b d -> b 1 d")

    def read_text(self, y, cache: KVCache | None) -> list:
        """Encode the prompts with the indices y, (b,). Returns a list of one pair for each layer:
        the keys and values for its cross-attention, and is_word, (b, l), which is False at padding.
        (The vectors of padding are all zeros.)"""
        if cache is not None and cache.text is not None:
            return cache.text
        vectors = self.prompts[y]                                           # (b, l, text_width)
        is_word = vectors.abs().sum(dim=-1) > 0                             # (b, l)
        tokens = self.text_embedder(vectors)                                # (b, l, width)
        text = [(layer.cross_attn.keys_values(tokens), is_word) for layer in self.blocks]
        if cache is not None:
            cache.text = text
        return text

    def run_layer(self, i: int, tokens, c, cache: KVCache | None = None, text=None):
        """Run layer i on the tokens (b, s, n, width), with its mask, its part of the cache, and its
        pair from read_text. c: as in Block.forward."""
        mask = self.config.mask if i < self.config.history_layers else "none"
        past = None
        if cache is not None and mask != "none":
            past = cache.past.setdefault(i, [])
        layer = (self.compiled_blocks or self.blocks)[i]
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                layer,
                tokens,
                c,
                mask,
                past,
                text,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return layer(tokens, c, mask, past, text)

    def output(self, tokens, c, cache: KVCache | None = None):
        """Tokens (b, s, n, width) to outputs of the shape of the states, (b, s, c, h, w)."""
        config = self.config
        if config.output_layers == 1:
            out = self.final_layer(tokens, c)
        else:
            first = 0 if cache is None else cache.states_read
            out = []
            for i in range(tokens.shape[1]):
                output_layer = getattr(self, self.output_layer_names[first + i])
                out.append(output_layer(tokens[:, i : i + 1], c[:, i : i + 1]))
            out = torch.cat(out, dim=1)
        out = rearrange(
            out,
            "b s (h w) (p q c) -> b s c (h p) (w q)",
            h=config.grid_size, p=config.patch, q=config.patch,
        )
        return out[:, :, : config.channels]  # without the variance of learn_sigma

    def compile_layers(self):
        """Use torch.compile. The layers are compiled one by one. All layers run the same code, so
        they share their compiled graphs. There is a graph for each shape (`dynamic=False`):
        sampling needs one for each step, and a last, smaller batch needs others. `compiled_blocks`
        is a plain list, in which PyTorch does not look for weights: so the names of the weights do
        not change."""
        torch._dynamo.reset()  # forget the graphs of earlier models
        torch._dynamo.config.cache_size_limit = 64  # graphs; beyond it, layers run uncompiled
        self.compiled_blocks = [torch.compile(block, dynamic=False) for block in self.blocks]
