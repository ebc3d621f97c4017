"""Networks from files: checkpoints of this project, and what others have published.

    a checkpoint of this project       a teacher or a student
    a folder of a run                  its student.pt, or its teacher.pt
    DiT-XL-2-256x256.pt                the public DiT (arXiv 2212.09748), any size: a teacher
    SiT-XL-2-256x256.pt                the public SiT (arXiv 2401.08740): a teacher
    REPA's SiT-XL/2, such as last.pt   (arXiv 2410.06940): a teacher
    0300000.pt of the authors' ARD     four output layers: a student
    a folder of `diffusers`            a DiT converted from the public weights: a teacher
                                       PixArt-α (arXiv 2310.00426): a teacher that reads text

All of them go wherever a program takes a checkpoint. A published file may be a `.safetensors` file,
or a training checkpoint, of which the EMA is used. What a file does not say, such as the ODE that
its network was trained for, is filled in from the papers and the public code.

DiT, SiT and REPA differ in what they predict and in how time is given to them, but their weights
have the same names. They are told apart by how they behave (`recognise`).

    python pretrained.py runs/textures/student.pt small.pt     the network alone, in float16: an
                                                               eighth of a training's checkpoint
"""

import startup  # noqa: F401  before the large packages

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from command_line import add_teacher_kind, make_parser, run_program
from config import (
    AUTHORS_STUDENT,
    PRESETS,
    PUBLIC_DIT_ODE,
    SIZES,
    ModelConfig,
    StudentRecord,
    TeacherRecord,
)
from files import (
    UserError,
    check_checkpoint,
    check_finite,
    export,
    export_file,
    load_weights,
    optional_import,
    read_checkpoint,
)
from latents import SCALE
from model import DiT, sincos_positions
from pixart import (
    PIXART_SETTINGS,
    NoPrompts,
    convert_pixart,
    is_pixart,
    stack,
)
from shards import read_json
from text import scene_prompts

ASSETS = Path(__file__).parent / "assets"

# What published files do not say is taken from the paper's setting.
IMAGENET = PRESETS["imagenet256"]
ODES = {  # SiT guides three channels, as DiT; REPA guides all
    "dit": PUBLIC_DIT_ODE,
    "sit": replace(PUBLIC_DIT_ODE, noise_path="sit", predicts="v"),
    "repa": replace(PUBLIC_DIT_ODE, noise_path="repa", predicts="v", guided_channels=None),
}

# ---- 1. Loading ----------------------------------------------------------------------------------


def load_network(file, *kinds, device="cpu", teacher_kind: str | None = None):
    """The network of a checkpoint of one of these kinds, "student" or "teacher", and its record:
    (model in eval mode without gradients, StudentRecord or TeacherRecord).

    `teacher_kind`: "dit", "sit" or "repa"; a published teacher is then taken to be that, and is not
    tested. Raises UserError where the file holds no such network."""
    file = find_file(Path(file), kinds)
    if file.is_dir():
        check_pipeline(file)
        if is_pixart(read_json(file / "config.json")):
            return pixart_teacher(file, kinds, device, teacher_kind)
        weights, heads = read_diffusers(file)
    else:
        content = read_file(file)
        if "kind" in content:
            if teacher_kind is not None:
                raise UserError(f"{file} says itself what it is: leave out --teacher-kind")
            return own_network(content, file, kinds, device)
        weights, heads = find_weights(content, file), None
    return published_network(weights, heads, file, kinds, device, teacher_kind)


def own_network(content: dict, file: Path, kinds, device):
    """The network and the record of a checkpoint of this project. (See load_network.)"""
    content = check_checkpoint(content, file, *kinds)
    record = content["record"]
    model = make_network(record.model, content["ema"], file, device)
    if record.model.reads_text:
        is_scenes = record.data.source == "scenes"
        model.prompts = scene_prompts() if is_scenes else NoPrompts()
    training = getattr(record, "gan_training", None) or record.training
    done = content.get("iteration", training.iterations)
    if done < training.iterations:
        print(f"note: {file} is not finished: {done:,} of {training.iterations:,} iterations")
    return model, record


def make_network(config: ModelConfig, weights: dict, file: Path, device) -> DiT:
    """A network with these weights, in float32. Raises UserError where they do not fit or are not
    finite."""
    check_finite(weights, file)
    model = DiT(config)
    load_weights(model, weights, file)
    return model.to(device).eval().requires_grad_(False)


def find_file(path: Path, kinds) -> Path:
    """The file of a network, or its diffusers folder. `path` may be the folder of a run or of a
    diffusers pipeline. Raises UserError for a folder that holds no network of these kinds."""
    if not path.is_dir():
        return path
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    names = [f"{kind}.pt" for kind in kinds]
    for name in names:
        if (path / name).is_file():
            print(f"{path} is a folder: taking its {name}")
            return path / name
    raise UserError(f"{path} is a folder without {' or '.join(names)}: name a checkpoint")


def find_teacher(
    file: Path | None, preset_name: str, folder: Path, device="cpu", teacher_kind: str | None = None
):
    """A teacher and its record: of `file` where one is given; else the one that was trained into
    the run's `folder`; else the one in the preset's own folder; else the one that is shipped.
    Raises UserError where there is none."""
    if file is None:
        places = (
            folder / "teacher.pt",
            Path("runs") / preset_name / "teacher.pt",
            ASSETS / f"{preset_name}-teacher.pt",
        )
        file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"there is no teacher for {preset_name}: name its file with --teacher, or train it: "
            f"python teacher.py --preset {preset_name}"
        )
    print(f"the teacher is {file}")
    return load_network(file, "teacher", device=device, teacher_kind=teacher_kind)


# ---- 2. Published networks -----------------------------------------------------------------------

X_EMBEDDER = "x_embedder.proj.weight"  # every DiT has a weight of this name

def published_network(weights: dict, heads: int | None, file: Path, kinds, device, teacher_kind):
    """The network and the record of weights with the public DiT's names. (See load_network.)"""
    config = model_config(weights, heads, file)
    kind = "teacher" if config.output_layers == 1 else "student"
    if kind not in kinds:
        raise UserError(f"{file} holds a {kind}, and a {' or '.join(kinds)} is needed")
    model = make_network(config, weights, file, device)
    common = common_fields(config)
    if kind == "student":
        if teacher_kind is not None:
            raise UserError(f"{file} holds a student: leave out --teacher-kind")
        return model, StudentRecord(
            student=AUTHORS_STUDENT, teacher="", trajectories=0, **common
        )
    teacher_kind = teacher_kind or recognise(model, file)
    if teacher_kind == "sit":  # its output is x_0 − ε; our v is ε − x_0
        model.final_layer.linear.weight.neg_()
        model.final_layer.linear.bias.neg_()
    return model, TeacherRecord(ode=ODES[teacher_kind], images=0, **common)


def common_fields(config: ModelConfig) -> dict:
    """What the records of all published networks have in common."""
    return dict(
        model=config,
        data=replace(IMAGENET.data, image_size=config.image_size, channels=config.channels),
        classes=tuple(str(i) for i in range(config.classes)),
        class_weights=(),
        training=replace(IMAGENET.teacher, iterations=0),  # not known
    )


def model_config(weights: dict, heads: int | None, file: Path) -> ModelConfig:
    """The ModelConfig of a published network. Raises UserError where the weights are not those of
    a DiT."""
    arguments = read_arguments(weights, heads, file)
    try:
        return ModelConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} describes no DiT that is known here: {error}") from None


def read_arguments(weights: dict, heads: int | None, file: Path) -> dict:
    """Read the arguments of DiT off the shapes of its weights. The attention heads leave no trace
    in the shapes: where they are not given, the size must be a known one. Raises UserError."""
    try:
        width, channels, patch, _ = weights[X_EMBEDDER].shape
        tokens = weights["pos_embed"].shape[1]
        classes = len(weights["y_embedder.embedding_table.weight"]) - 1
        outputs = len(weights["final_layer.linear.weight"]) // patch**2
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise UserError(f"{file} holds weights, but not those of a DiT") from None
    depth = sum(name.endswith(".attn.qkv.weight") for name in weights)
    last = [n for n in weights if n.startswith("final_layer") and n.endswith(".linear.weight")]
    output_layers = len(last)
    if output_layers not in (1, AUTHORS_STUDENT.steps):
        raise UserError(
            f"{file} has {output_layers} output layers: a public DiT has 1, and the authors' "
            f"student has {AUTHORS_STUDENT.steps}"
        )
    heads_of = {(size["width"], size["depth"]): size["heads"] for size in SIZES.values()}
    heads = heads or heads_of.get((width, depth))
    if heads is None:
        raise UserError(
            f"{file} holds {depth} layers of width {width}, which is no known size of DiT, so the "
            "number of its attention heads is unknown. (A folder of diffusers says it.)"
        )
    is_student = output_layers > 1
    return dict(
        image_size=math.isqrt(tokens) * patch,
        channels=channels,
        classes=classes,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        learn_sigma=outputs == 2 * channels,
        mask="causal" if is_student else "none",
        history_layers=IMAGENET.student.history_layers if is_student else 0,  # not in the file
        output_layers=output_layers,
    )


# How each kind of teacher behaves. Its input is share·ε, a grey image (x_0 = 0) with that much
# noise, and the timestep that stands for so much noise. Then it predicts sign·ε. SiT and REPA add a
# mean image, which is the same for every ε, so the *difference* of two predictions is compared.
# Pure noise is not enough to tell SiT from REPA: SiT's timestep of noise, 0, is REPA's timestep of
# an image, where both predict −x. (At 1 both predict x.) At 1/2 their signs differ.
PROBES = (  # kind, share, timestep, sign
    ("dit", 1.0, 999.0, 1),
    ("dit", 0.96, 500.0, 1),
    ("sit", 1.0, 0.0, -1),
    ("sit", 0.5, 0.5, -1),
    ("repa", 1.0, 1.0, 1),
    ("repa", 0.5, 0.5, 1),
)
# Relative errors. Small networks of these kinds had 0.09, 0.42 and 0.41, after a training of some
# hundred iterations.
LARGEST_ERROR = {"dit": 0.2, "sit": 0.5, "repa": 0.5}


@torch.no_grad()
def recognise(model: DiT, file: Path) -> str:
    """Whether a published teacher is a "dit", "sit" or "repa": the kind from whose predictions on
    noise it differs least, by the measure of LARGEST_ERROR. Raises UserError where it behaves like
    none of them."""
    config, device = model.config, model.pos_embed.device
    shape = (2, config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.full((2,), model.null_class, device=device)
    errors = dict.fromkeys(ODES, 0.0)
    for kind, share, timestep, sign in PROBES:
        x, timesteps = share * noise[:, None], torch.tensor([timestep], device=device)
        error = model(x, timesteps, y)[:, 0] - sign * noise
        relative = (error[0] - error[1]).norm() / (noise[0] - noise[1]).norm()
        errors[kind] = max(relative.item(), errors[kind])
    kind = min(errors, key=lambda kind: errors[kind] / LARGEST_ERROR[kind])
    if not errors[kind] < LARGEST_ERROR[kind]:
        found = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
        raise UserError(
            f"{file} behaves on noise like none of DiT, SiT and REPA (relative errors: {found}), "
            "so its ODE is unknown. If it is one of them, say so with --teacher-kind"
        )
    print(f"{file} behaves like a {kind} (relative error on noise: {errors[kind]:.2f})")
    return kind


# ---- 3. Published files --------------------------------------------------------------------------


def read_file(file: Path) -> dict:
    """What a file of PyTorch or of safetensors holds. They are told apart by their content: a file
    of safetensors starts with a length, in eight bytes, and JSON text. Raises UserError."""
    if file.is_file():
        with open(file, "rb") as opened:
            start = opened.read(9)
        if start[8:] == b"{":
            safetensors = optional_import("safetensors.torch")
            try:
                return safetensors.load_file(file)
            except Exception:  # the exceptions for damaged files are of several types
                raise UserError(f"{file} cannot be read: it is damaged") from None
    return read_checkpoint(file)


def find_weights(content: dict, file: Path) -> dict:
    """A DiT's weights in what a file holds: the weights themselves or, in a training checkpoint,
    the EMA or else the model. The prefixes that DDP, torch.compile and others put before the names
    are removed, and so are REPA's projectors, which only its training needs. Raises UserError where
    there are none."""
    for name in ("ema", "ema_model", "model_ema", "state_dict", "model", "module"):
        inner = content.get(name)
        if isinstance(inner, dict) and inner:
            return find_weights(inner, file)
    content = {str(name).replace("_orig_mod.", ""): value for name, value in content.items()}
    prefixes = [name.removesuffix(X_EMBEDDER) for name in content if name.endswith(X_EMBEDDER)]
    if not prefixes:
        first = ", ".join(list(content)[:3])
        raise UserError(
            f"{file} is neither a checkpoint of this project nor a public DiT: no weight is called "
            f"{X_EMBEDDER}. It holds {first or 'nothing'}, …"
        )
    prefix = next((prefix for prefix in prefixes if "ema" in prefix), prefixes[0])
    weights = {n.removeprefix(prefix): w for n, w in content.items() if n.startswith(prefix)}
    return {name: w for name, w in weights.items() if not name.startswith("projectors.")}


# ---- 4. Folders of diffusers ---------------------------------------------------------------------

# Settings that must have these values. The scheduler's are in the folder `scheduler` beside the
# transformer's, if there is one.
DIT_SETTINGS = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
)
SCHEDULER_SETTINGS = dict(
    prediction_type="epsilon",
    beta_schedule="linear",
    beta_start=1e-4,
    beta_end=0.02,
    num_train_timesteps=1000,
    trained_betas=None,
    rescale_betas_zero_snr=False,
)
PUBLIC_NAMES = (  # patterns of diffusers' names, and what the public DiT calls that
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder", "y_embedder"),
    (r"^transformer_blocks", "blocks"),
    (r"\.norm1\.linear", ".adaLN_modulation.1"),
    (r"\.attn1\.to_out\.0", ".attn.proj"),
    (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
    (r"\.ff\.net\.2", ".mlp.fc2"),
    (r"^pos_embed", "x_embedder"),
    (r"^proj_out_1", "final_layer.adaLN_modulation.1"),
    (r"^proj_out_2", "final_layer.linear"),
)


def read_diffusers(folder: Path) -> tuple[dict, int]:
    """The weights of a DiT that `diffusers` has saved, under the public DiT's names, and the number
    of its attention heads. Raises UserError for a network that is not a public DiT.

    Such a folder was either converted from public weights or trained with diffusers. In diffusers,
    every layer has its own embeddings of time and label. The conversion makes equal copies of one,
    and training makes them differ, which tells the two apart. Our DiT, with one embedding, can only
    hold the former.

    diffusers runs converted weights a little differently from how they were trained: its time
    frequencies are 10000^(−i/127), where the public DiT has 10000^(−i/128), and one of its
    LayerNorms adds 1e-5 instead of 1e-6. Here they run as they were trained."""
    settings = check_settings(folder / "config.json", DIT_SETTINGS)
    weights = {}
    for name, value in read_parts(folder).items():
        for pattern, public_name in PUBLIC_NAMES:
            name = re.sub(pattern, public_name, name)
        if name in weights and not torch.equal(weights[name], value):
            raise UserError(
                f"{folder} was trained with diffusers: each layer has its own {name}. Only a DiT "
                "that was converted from public weights can be loaded"
            )
        weights[name] = value
    stack(weights, "attn1", "qkv", "attn.qkv")
    try:
        heads, size = settings["num_attention_heads"], settings["sample_size"]
        width, _, patch, _ = weights[X_EMBEDDER].shape
        weights["pos_embed"] = sincos_positions(size // patch, width)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder} is no DiT of diffusers") from None
    return weights, heads


def pixart_teacher(folder: Path, kinds, device, teacher_kind):
    """A PixArt-α and its record, from a folder of diffusers. (See load_network.)"""
    if "teacher" not in kinds:
        raise UserError(f"{folder} holds a teacher, and a {' or '.join(kinds)} is needed")
    if teacher_kind is not None:
        raise UserError(f"{folder} says itself what it is: leave out --teacher-kind")
    settings = check_settings(folder / "config.json", PIXART_SETTINGS)
    config, weights = convert_pixart(read_parts(folder), settings, folder)
    model = make_network(config, weights, folder, device)
    model.prompts = NoPrompts()
    ode = PRESETS["pixart256"].ode
    return model, TeacherRecord(ode=ode, images=0, **common_fields(config))


def check_pipeline(folder: Path):
    """Raises UserError where a transformer's pipeline has another ODE, or other latents."""
    scheduler = folder.parent / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        check_settings(scheduler, SCHEDULER_SETTINGS)
    vae = folder.parent / "vae" / "config.json"
    scale = (read_json(vae) or {}).get("scaling_factor", SCALE)
    if scale != SCALE:  # as in PixArt-Σ
        raise UserError(f"{vae} scales latents by {scale}: only {SCALE} can be decoded")


def check_settings(file: Path, needed: dict) -> dict:
    """The settings in a JSON file. Raises UserError where one differs from what is needed."""
    settings = read_json(file)
    for name, value in needed.items():
        found = settings.get(name)
        if found != value and (found or value):  # absent is the same as None or False
            raise UserError(
                f"{file} says {name} = {found}: only networks with {value} can be loaded"
            )
    return settings


def read_parts(folder: Path) -> dict:
    """The weights in a folder of diffusers. It may hold several files: parts of the weights, or
    variants such as float16, of which the main one, with the shortest name, is kept."""
    stem = "diffusion_pytorch_model*"
    files = list(folder.glob(stem + ".safetensors")) or list(folder.glob(stem + ".bin"))
    if not files:
        raise UserError(f"{folder} lacks its weights, diffusion_pytorch_model.safetensors")
    weights = {}
    for file in sorted(files, key=lambda file: len(file.name), reverse=True):
        weights |= read_file(file)
    return weights


# ---- 5. The program ------------------------------------------------------------------------------


def parse_flags():
    parser = make_parser(__doc__)
    parser.usage = "python %(prog)s FILE OUT [flags]"
    add = parser.add_argument
    add("file", type=Path, help="a checkpoint of this project, or a published network")
    add("out", type=export_file, help="the file to write")
    add_teacher_kind(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    model, record = load_network(
        flags.file, "student", "teacher", teacher_kind=flags.teacher_kind
    )
    kind = "student" if isinstance(record, StudentRecord) else "teacher"
    weights = model.state_dict()
    export(flags.out, kind, asdict(record), weights)
    is_rounded = any(not weight.half().float().equal(weight) for weight in weights.values())
    if kind == "teacher" and is_rounded:
        print(
            "note: rounding has made it another teacher: its students know the one in "
            f"{flags.file} only"
        )


if __name__ == "__main__":
    run_program(main)
