"""PixArt-α, the public DiT that reads text (arXiv 2310.00426), from a folder of `diffusers`.

PixArt-α is built like the text networks of model.py, so its weights only need other names:

    diffusers (PixArtTransformer2DModel)         here
    pos_embed.proj                               x_embedder.proj
    adaln_single.emb.timestep_embedder           t_embedder
    caption_projection                           text_embedder
    adaln_single.linear                          shared_modulation.1
    transformer_blocks.i.scale_shift_table       blocks.i.adaLN_modulation, flattened
                        .attn1                         .attn, with q, k and v stacked
                        .attn2                         .cross_attn, with k and v stacked
                        .ff                            .mlp
    scale_shift_table, proj_out                  final_layer

Networks for 1024 pixels are also told the height, the width and the aspect ratio of the image.
Images are square here and of the one size that the network was trained for, so that the embeddings
of these three numbers are constants. They are added to the bias of the time's embedding.

The ODE is the public DiT's, with a stronger guidance that acts on all channels. Prompts are encoded
beforehand (text.py), and the programs are given their folder, --prompts DIR.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from config import ModelConfig
from files import UserError, load_weights
from model import TimestepEmbedder, sincos_positions
from text import EncodedPrompts

# ---- 1. Weights ----------------------------------------------------------------------------------

PIXART_SETTINGS = dict(  # that config.json must have
    norm_type="ada_norm_single",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
)
NAMES = (  # patterns of diffusers' names, and what our DiT calls that; applied in this order
    (r"^pos_embed\.", "x_embedder."),
    (r"^caption_projection\.linear_1", "text_embedder.0"),
    (r"^caption_projection\.linear_2", "text_embedder.2"),
    (r"^adaln_single\.linear", "shared_modulation.1"),
    (r"^adaln_single\.emb\.(\w+)_embedder\.linear_1", r"\1_embedder.mlp.0"),
    (r"^adaln_single\.emb\.(\w+)_embedder\.linear_2", r"\1_embedder.mlp.2"),
    (r"^timestep_embedder", "t_embedder"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"\.scale_shift_table", ".adaLN_modulation.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"\.attn1\.to_out\.0", ".attn.proj"),
    (r"\.attn2\.to_out\.0", ".cross_attn.proj"),
    (r"\.attn2\.to_q", ".cross_attn.q"),
    (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
    (r"\.ff\.net\.2", ".mlp.fc2"),
)
# In training, PixArt-α replaced some captions by these vectors. diffusers ignores them, too: for
# guidance, it encodes the empty text like any other.
UNUSED = "caption_projection.y_embedding"


def is_pixart(settings: dict) -> bool:
    """Whether the config.json of a folder of diffusers describes a PixArt. (Early versions had one
    class for several transformers.)"""
    kind = settings.get("_class_name")
    is_early = kind == "Transformer2DModel" and settings.get("norm_type") == "ada_norm_single"
    return kind == "PixArtTransformer2DModel" or is_early


def convert_pixart(weights: dict, settings: dict, folder: Path) -> tuple[ModelConfig, dict]:
    """The ModelConfig and the weights, under our names, of what a folder of diffusers holds.
    Missing or extra weights are not noticed here: load_weights is strict, and refuses them. Raises
    UserError where config.json does not describe a PixArt-α."""
    config = pixart_config(settings, folder)
    ours = {}
    for name, value in weights.items():
        for pattern, our_name in NAMES:
            name = re.sub(pattern, our_name, name)
        is_table = name.endswith("scale_shift_table")  # (6, width) or (2, width)
        ours[name] = value.flatten() if is_table else value
    ours.pop(UNUSED, None)
    stack(ours, "attn1", "qkv", "attn.qkv")
    stack(ours, "attn2", "kv", "cross_attn.kv")
    size = config.image_size
    is_told_size = settings.get("use_additional_conditions")
    if is_told_size is None:
        is_told_size = size == 128
    if is_told_size:
        fold_image_size(ours, config, folder)
    # The positions of large images are divided by `scale`, to span the same range as at 512 pixels.
    scale = settings.get("interpolation_scale") or max(size // 64, 1)
    ours["pos_embed"] = sincos_positions(config.grid_size, config.width, scale)
    return config, ours


def pixart_config(settings: dict, folder: Path) -> ModelConfig:
    """The ModelConfig that config.json describes. Raises UserError where a setting is missing."""
    try:
        heads, channels = settings["num_attention_heads"], settings["in_channels"]
        return ModelConfig(
            image_size=settings["sample_size"],
            channels=channels,
            classes=0,  # the number of prompts: see use_prompts
            patch=settings["patch_size"],
            width=heads * settings["attention_head_dim"],
            depth=settings["num_layers"],
            heads=heads,
            learn_sigma=settings["out_channels"] == 2 * channels,
            text_width=int(settings["caption_channels"]),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/config.json does not describe a PixArt-α") from None


def stack(weights: dict, layer: str, letters: str, our_name: str):
    """diffusers keeps the linear maps to q, k and v apart. Here they are stacked, in place. The
    `letters` "qkv" or "kv" say which of them."""
    first_map = f"{layer}.to_{letters[0]}"
    for first in [name for name in weights if f".{first_map}." in name]:
        names = [first.replace(first_map, f"{layer}.to_{letter}") for letter in letters]
        if all(name in weights for name in names):
            stacked = torch.cat([weights.pop(name) for name in names])
            weights[first.replace(first_map, our_name)] = stacked


def fold_image_size(weights: dict, config: ModelConfig, folder: Path):
    """Add the embeddings of the height, the width and the aspect ratio, each of which has a third
    of the features, to the bias of the timestep's embedding, in place. Raises UserError where the
    weights have other shapes."""
    pixels = 8 * config.image_size  # the autoencoder's latents have an eighth
    third = config.width // 3
    side = embed_number(weights, "resolution_embedder.", pixels, third, folder)
    ratio = embed_number(weights, "aspect_ratio_embedder.", 1.0, third, folder)
    constant = torch.cat([side, side, ratio])                               # (width,)
    name = "t_embedder.mlp.2.bias"
    if name not in weights or weights[name].shape != constant.shape:
        raise UserError(f"{folder} holds the weights of another network: see {name}")
    weights[name] = weights[name].float() + constant


@torch.no_grad()
def embed_number(weights: dict, prefix: str, value: float, width: int, folder: Path):
    """The embedding of a number, (width,), by the embedder whose weights' names start with this
    prefix. These weights are taken out of `weights`."""
    embedder = TimestepEmbedder(width)
    names = [name for name in weights if name.startswith(prefix)]
    own = {name.removeprefix(prefix): weights.pop(name) for name in names}
    load_weights(embedder, own, folder)
    return embedder(torch.tensor(value))


# ---- 2. Prompts ----------------------------------------------------------------------------------


class NoPrompts:
    """In the place of the prompts of a network that has not been given any."""

    def __getitem__(self, y):
        raise UserError(
            "this network reads text: name a folder of encoded prompts with --prompts. "
            "python text.py makes one"
        )


def use_prompts(model, record, folder: Path | None):
    """Let a network read the prompts in a folder, and return its record (a TeacherRecord or a
    StudentRecord) with how many there are. Without a folder, a network that needs none stays as it
    is. Raises UserError where the two do not go together."""
    needs_prompts = isinstance(model.prompts, NoPrompts)
    if folder is None:
        if needs_prompts:
            model.prompts[0]  # raises
        return record
    if not record.model.reads_text:
        raise UserError("this network is given classes, not text: leave out --prompts")
    if not needs_prompts:
        raise UserError("this network reads the captions of scenes.py: leave out --prompts")
    prompts = EncodedPrompts(folder)
    if prompts.width != record.model.text_width:
        raise UserError(
            f"the prompts in {folder} are vectors of {prompts.width} features, and this network "
            f"reads {record.model.text_width}: encode them with its own T5"
        )
    model.prompts = prompts
    return replace(record, model=replace(record.model, classes=len(prompts)))
