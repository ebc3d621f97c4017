"""Published weights, as our checkpoints: what others have trained is where one starts at ImageNet's size.

    DiT-XL-2-256x256.pt    the public DiT (Peebles & Xie): a teacher. Any of the twelve sizes; weights alone
    0300000.pt             a training checkpoint of the authors' ARD code (model, ema, opt, args): a student. One of
                           the public DiT's training code looks the same, and is a teacher
    a folder               DiTTransformer2DModel of `diffusers` (config.json and safetensors): a teacher

All go where one of our own checkpoints goes, --teacher in distill.py or the argument of sample.py. What the files do
not say is filled in from the papers and the public code, here:
"""

import math
from pathlib import Path

import torch

from model import SIZES, sincos_positions
from training import Fault, optional

# The ODE of the public DiT: 1000-step DDPM that predicts ε; 25 respaced DDIM steps, guidance on three latent channels.
ODE = dict(path="ddpm", predicts="eps", guidance=1.5, guided_channels=3, steps=25)
MARKS = [10, 15, 20, 25]  # the Euler steps whose clean prediction the authors keep
TIMES = [999.0, 583.0, 375.0, 166.0, -1.0]  # of x_T and of the states there
TOLD = [999.0, 749.25, 499.5, 249.75]  # what their student is told instead
HISTORY_LAYERS = 6  # of 28; the file does not tell


def adapt(content: dict, path: Path) -> dict:
    """What a published file holds, as {"about", "ema"}, like a checkpoint of ours. Raises Fault for anything else."""
    weights = content.get("ema", content)  # a training checkpoint, or the weights alone
    try:
        config = configuration(weights)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError):
        raise Fault(f"{path} is neither a checkpoint of this project nor a public DiT of a known size") from None
    if config["step_heads"] not in (1, len(TOLD)):
        raise Fault(f"{path} has {config['step_heads']} output layers: a public DiT has 1, the authors' student "
                    f"{len(TOLD)}")
    about = dict(kind="teacher", model=config, **ODE, data="latents",
                 classes=[str(i) for i in range(config["classes"])], training=dict(iterations=0, source=path.name))
    if config["step_heads"] > 1:
        config.update(history="causal", history_layers=HISTORY_LAYERS)
        about |= dict(kind="student", teacher=None, S=len(TOLD), output="state", trajectory="clean", told=TOLD,
                      marks=MARKS, times=TIMES)
    return {"about": about, "ema": weights}


def configuration(weights: dict) -> dict:
    """The arguments of DiT(…), read off the shapes of its weights; the heads, which leave no trace there, off the
    size."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    [heads] = [size["heads"] for size in SIZES.values() if (size["width"], size["depth"]) == (width, depth)]
    outputs = weights["final_layer.linear.weight"].shape[0] // patch**2
    return dict(image_size=math.isqrt(weights["pos_embed"].shape[1]) * patch, channels=channels,
                classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1, patch=patch, width=width,
                depth=depth, heads=heads, learn_sigma=outputs == 2 * channels,
                step_heads=len({name.split(".")[0] for name in weights if name.startswith("final_layer")}))


def from_diffusers(folder: Path) -> dict:
    """The weights of a diffusers folder under the public DiT's names. Every layer there has its own copy of the
    embeddings of time and label (all equal), and q, k and v apart."""
    if (folder / "transformer").is_dir():  # a whole pipeline's
        folder = folder / "transformer"
    try:
        load = optional("diffusers").DiTTransformer2DModel.from_pretrained
        network, found = load(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise Fault(f"{folder} is no DiT of diffusers ({' '.join(str(error).split())[:200]})") from None
    if found["missing_keys"]:  # diffusers warns only, and puts random weights there
        raise Fault(f"{folder} lacks weights of its DiT: {found['missing_keys'][0]}")
    theirs, depth = network.state_dict(), network.config.num_layers
    names = {"pos_embed.proj": "x_embedder.proj",
             "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
             "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
             "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
             "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}
    for i in range(depth):
        names |= {f"transformer_blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in (
            ("attn1.to_out.0", "attn.proj"), ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"),
            ("norm1.linear", "adaLN_modulation.1"))}
    ours = {f"{b}.{kind}": theirs[f"{a}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")
            if f"{a}.{kind}" in theirs}
    for i in range(depth):
        for kind in ("weight", "bias"):
            qkv = [f"transformer_blocks.{i}.attn1.to_{x}.{kind}" for x in "qkv"]
            if qkv[0] in theirs:
                ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[name] for name in qkv])
    width, _, patch, _ = ours["x_embedder.proj.weight"].shape
    return ours | {"pos_embed": sincos_positions(network.config.sample_size // patch, width)}
