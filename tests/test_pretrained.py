"""Published networks. Their names and shapes are written down here by hand, and so are the public
samplers, so that what is loaded can be compared with what was published.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import pretrained
from config import (
    AUTHORS_STUDENT,
    ModelConfig,
    Student,
    StudentRecord,
    TeacherRecord,
    parse_size,
)
from files import UserError, export, fingerprint
from model import DiT
from pretrained import find_teacher, load_network, model_config
from sample import few_step, predict_all, student_times
from teacher import solve
from test_model import plain_dit
from tiny import CONFIG, FLOW_8, TEACHER, TRAINING, random_dit, write_teacher

WIDTH, DEPTH, HEADS, PATCH, SIDE, CLASSES = 64, 6, 4, 2, 8, 10  # DiT-N/2 of 8×8 latents
X = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([3, 9])


def public_weights(outputs=8, output_layers=1, width=WIDTH, depth=DEPTH, tokens=16, seed=0):
    """Names and shapes of a public DiT, filled with random numbers. outputs: 8 with a variance."""
    linear = {
        "x_embedder.proj": (width, 4, PATCH, PATCH),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
    }
    for i in range(depth):
        linear[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        linear[f"blocks.{i}.attn.proj"] = (width, width)
        linear[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        linear[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        linear[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    for i in range(output_layers):
        name = f"final_layer{i + 1 if i else ''}"
        linear[f"{name}.adaLN_modulation.1"] = (2 * width, width)
        linear[f"{name}.linear"] = (PATCH * PATCH * outputs, width)
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes["pos_embed"] = (1, tokens, width)
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, width)
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def save(path, content):
    torch.save(content, path)
    return path


def assert_weights(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], value.float()), name


def refused(says, *args, **more):
    """load_network(…) raises a UserError of one line that says this."""
    with pytest.raises(UserError, match=says) as error:
        load_network(*args, **more)
    assert "\n" not in str(error.value)


# ---- 1. Each kind of network, against what was published -----------------------------------------


def plain(w, x, t, y, heads=HEADS):
    """The public network: x (b, c, h, w); t, y (b,)."""
    tokens = w["pos_embed"].shape[1]
    everything = torch.ones(tokens, tokens, dtype=torch.bool)
    masks = [everything for name in w if name.endswith("qkv.weight")]
    return plain_dit(w, x[:, None], t[:, None], y, masks, PATCH, heads)[:, 0]


def plain_guided(w, x, t, y, channels):
    """Guidance 1.5 of the first few channels, at one time t."""
    times = torch.full((len(x),), float(t))
    cond = plain(w, x, times, y)
    uncond = plain(w, x, times, torch.full_like(y, CLASSES))
    guided = cond.clone()
    guided[:, :channels] = (uncond + 1.5 * (cond - uncond))[:, :channels]
    return guided


def dit_sampler(w, x, y):
    """25 respaced times, guidance of three channels, DDIM without noise (η = 0)."""
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = [round(k * 999 / 24) for k in range(25)]
    for i in range(24, -1, -1):
        eps = plain_guided(w, x, times[i], y, 3)
        bar, bar_next = bars[times[i]], bars[times[i - 1]] if i else 1.0
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next) * eps
    return x


def sit_sampler(w, x, y):
    """dx/dt = x_0 − ε, from noise at t = 0 to the image at t = 1; guidance of three channels."""
    for k in range(25):
        x = x + plain_guided(w, x, k / 25, y, 3) / 25
    return x


def repa_sampler(w, x, y):
    """dx/dt = ε − x_0, from noise at t = 1 to the image at t = 0; guidance of all channels."""
    for k in range(25, 0, -1):
        x = x - plain_guided(w, x, k / 25, y, 4) / 25
    return x


SAMPLERS = {"dit": dit_sampler, "sit": sit_sampler, "repa": repa_sampler}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_teacher_is_solved_as_its_public_sampler_does(tmp_path, kind):
    weights = public_weights(outputs=4 if kind == "repa" else 8)
    projectors = {"projectors.0.0.weight": torch.ones(3, WIDTH)} if kind == "repa" else {}
    file = save(tmp_path / "a.pt", {"ema": weights | projectors, "steps": 400_000})
    model, record = load_network(file, "teacher", teacher_kind=kind)
    assert not model.training and not any(w.requires_grad for w in model.parameters())
    assert record.ode.euler_steps == 25 and record.ode.guidance_scale == 1.5
    assert model.null_class == CLASSES and len(record.classes) == CLASSES
    assert record.model.learn_sigma == (kind != "repa")
    states, _ = solve(model, record.ode, X, Y)
    ends = {name: sampler(weights, X, Y) for name, sampler in SAMPLERS.items()}
    expected = ends.pop(kind)
    assert (states[:, -1] - expected).norm() < 3e-5 * expected.norm()
    for other in (X, *ends.values()):
        assert (other - expected).norm() > 0.02 * expected.norm(), "the samplers are alike"


@pytest.mark.parametrize("letters", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("side", [32, 64])  # for images of 256 and of 512 pixels
def test_all_public_sizes_are_recognised_by_their_shapes(letters, patch, side):
    size = parse_size(f"{letters}/{patch}")
    config = ModelConfig(side, channels=4, classes=1000, learn_sigma=True, **size)
    with torch.device("meta"):
        weights = DiT(config).state_dict()
    assert model_config(weights, None, "a.pt") == config


def test_the_public_dit_for_512_pixels(tmp_path):
    file = save(tmp_path / "a.pt", public_weights(tokens=1024))
    model, record = load_network(file, "teacher", teacher_kind="dit")
    assert record.model.image_size == record.data.image_size == 64 and record.data.channels == 4
    x = torch.randn(1, 4, 64, 64)
    expected = plain(public_weights(tokens=1024), x, torch.tensor([42.0]), Y[:1])
    output = model(x[:, None], torch.tensor([42.0]), Y[:1])[:, 0]
    assert (output - expected).norm() < 5e-5 * expected.norm()


def test_the_authors_training_checkpoint_is_a_student(tmp_path):
    """Four output layers, x0 predictions, timesteps of its own. Its `args` are a Namespace."""
    arguments = argparse.Namespace(lr=1e-4)
    weights = public_weights(output_layers=4)
    content = {"model": public_weights(4, seed=1), "ema": weights, "opt": {}, "args": arguments}
    model, record = load_network(save(tmp_path / "0300000.pt", content), "student", "teacher")
    assert isinstance(record, StudentRecord)
    assert (record.model.mask, record.model.history_layers) == ("causal", 6)
    student = record.student
    assert student.timesteps == (999.0, 749.25, 499.5, 249.75)
    assert student_times(student).tolist() == [999.0, 583.0, 375.0, 166.0, -1.0]
    states = few_step(model, student, X, Y)
    whole = predict_all(model, student, states[:, :4], Y)
    assert whole.norm() > 1 and (whole - states[:, 1:]).norm() < 1e-4 * whole.norm()
    first = plain(weights, X, torch.full((2,), AUTHORS_STUDENT.timesteps[0]), Y)
    assert (states[:, 1] - first).norm() < 5e-5 * first.norm()  # the noise has no history
    refused("holds a student, and a teacher is needed", tmp_path / "0300000.pt", "teacher")


# ---- 2. Telling DiT, SiT and REPA apart ----------------------------------------------------------


def best_slope(kind, t, p=0.1):
    """If latents are Gaussian with variance p, the best prediction is x times this. Where SiT and
    REPA start and end, the two are the same function of what they are told: −1 at 0 and 1 at 1."""
    if kind == "sit":
        return (t * p - (1 - t)) / (t**2 * p + (1 - t) ** 2)
    if kind == "repa":
        return (t - (1 - t) * p) / (t**2 + (1 - t) ** 2 * p)
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[round(t)]
    return math.sqrt(1 - bar) / (bar * p + 1 - bar)


def linear_network(slope, image=0.0, outputs=8):
    """Weights of a DiT whose output is slope(timestep)·x + image. Of its width of 64, a quarter
    holds the patch, a quarter the negative, and the rest a large pattern, which makes LayerNorm a
    constant factor. The layers add nothing, and the last one multiplies the patch."""
    w = {name: torch.zeros_like(value) for name, value in public_weights(outputs).items()}
    large, numbers = 100.0, 4 * PATCH * PATCH
    identity = torch.eye(numbers).reshape(numbers, 4, PATCH, PATCH)
    w["x_embedder.proj.weight"][:numbers] = identity
    w["x_embedder.proj.weight"][numbers : 2 * numbers] = -identity
    w["pos_embed"][..., 2 * numbers : 3 * numbers] = large
    w["pos_embed"][..., 3 * numbers :] = -large
    out = w["final_layer.linear.weight"].view(PATCH, PATCH, outputs, WIDTH)
    out[:, :, :4, :numbers] = identity.permute(2, 3, 1, 0) * large / math.sqrt(2)
    w["final_layer.linear.bias"] += image

    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        w[name] = public_weights()[name]
    t = torch.tensor([0.0, 0.5, 1.0, 500.0, 999.0])
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    hidden = torch.cat([angles.cos(), angles.sin()], -1)
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        hidden = torch.nn.functional.silu(hidden @ w[name].T)
    wanted = torch.tensor([[slope(time)] for time in t.tolist()]) - 1  # scale: its factor less 1
    row = torch.linalg.lstsq(hidden.double(), wanted.double()).solution.float()
    w["final_layer.adaLN_modulation.1.weight"][WIDTH : WIDTH + numbers] = row.T
    return w


def slope_of(kind):
    """SiT and REPA, told 500 or 999, predict some noise with their usual sign (as trained ones)."""
    if kind == "dit":
        return lambda t: best_slope(kind, t)
    return lambda t: best_slope(kind, t) if t <= 1 else (-0.6 if kind == "sit" else 0.6)


@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize(
    "kind, image", [("dit", 0), ("sit", 0), ("sit", 1), ("repa", 0), ("repa", -1)]
)
def test_a_teacher_is_recognised_by_its_behaviour(tmp_path, capsys, kind, image, outputs):
    weights = linear_network(slope_of(kind), image, outputs)
    output = plain(weights, X, torch.tensor([0.0, 0.5]), Y)
    wanted = torch.tensor([best_slope(kind, 0.0), best_slope(kind, 0.5)])[:, None, None, None]
    assert (output - wanted * X - image).abs().max() < 0.01  # it does what it is written to do

    model, record = load_network(save(tmp_path / "a.pt", weights), "teacher")
    assert record.ode == pretrained.ODES[kind]
    assert f"behaves like a {kind}" in capsys.readouterr().out
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name] * (-1 if kind == "sit" else 1)
    assert_weights(model, weights)

    other = "dit" if kind == "sit" else "sit"  # a user who knows better is believed
    _, record = load_network(tmp_path / "a.pt", "teacher", teacher_kind=other)
    assert record.ode == pretrained.ODES[other]


def flow(t):
    """A flow-matching network that is given 1000·t; below 1, as such a trained network behaves."""
    return 3.5 if t <= 1 else best_slope("repa", t / 1000)


@pytest.mark.parametrize("weights", [
    public_weights(),
    {name: torch.zeros_like(value) for name, value in public_weights().items()},
    linear_network(flow),
    linear_network(lambda t: -best_slope("dit", t)),
], ids=["random", "zero", "flow", "negative"])
def test_a_teacher_that_behaves_like_none_is_refused(tmp_path, weights):
    says = "like none of DiT, SiT and REPA .* --teacher-kind"
    refused(says, save(tmp_path / "a.pt", weights), "teacher")


# ---- 3. Files as they come -----------------------------------------------------------------------


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


WRAPPED = {
    "weights alone": lambda w, other: w,
    "a training checkpoint": lambda w, other: {"model": other, "ema": w, "opt": {}, "epoch": 3},
    "no EMA": lambda w, other: {"model": w, "opt": {}, "args": argparse.Namespace(lr=1)},
    "an empty EMA": lambda w, other: {"model": w, "ema": {}},
    "DDP": lambda w, other: {"ema": prefixed("module.", w)},
    "torch.compile": lambda w, other: {"model": prefixed("_orig_mod.", w)},
    "DDP of torch.compile": lambda w, other: prefixed("module._orig_mod.", w),
    "compiled layers": lambda w, other: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in w.items()
    },
    "an EMA that is nested": lambda w, other: {"ema": {"decay": 0.9, "module": w}, "model": other},
    "EMA and model side by side": lambda w, other: {
        "state_dict": prefixed("model.", other) | prefixed("ema.", w) | {"step": torch.ones(1)}
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_weights_are_found_in_a_file(tmp_path, wrap):
    file = save(tmp_path / "a.pt", wrap(public_weights(), public_weights(seed=1)))
    model, _ = load_network(file, "teacher", teacher_kind="dit")
    assert_weights(model, public_weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_become_float32(tmp_path, dtype):
    weights = {name: value.to(dtype) for name, value in public_weights().items()}
    model, _ = load_network(save(tmp_path / "a.pt", weights), "teacher", teacher_kind="dit")
    assert_weights(model, weights)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_safetensors_file_is_recognised_by_its_content(tmp_path, name):
    reason = "optional package safetensors is not installed"
    safetensors = pytest.importorskip("safetensors.torch", reason=reason)
    safetensors.save_file(prefixed("module.", public_weights()), tmp_path / name)
    model, _ = load_network(tmp_path / name, "teacher", teacher_kind="dit")
    assert_weights(model, public_weights())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    refused("cannot be read: it is damaged", tmp_path / name, "teacher")


def test_a_checkpoint_with_the_suffix_of_safetensors(tmp_path):
    file = save(tmp_path / "a.safetensors", public_weights())
    model, _ = load_network(file, "teacher", teacher_kind="dit")
    assert_weights(model, public_weights())


def test_without_the_package_a_safetensors_file_says_what_to_install(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.pt").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    refused("needs the package safetensors", tmp_path / "a.pt", "teacher")


PROJ = "blocks.3.attn.proj.weight"


@pytest.mark.parametrize("content, says", [
    (lambda w: {"weights": torch.zeros(3)}, "no weight is called x_embedder.*It holds weights"),
    (lambda w: {"ema": 3}, "neither a checkpoint of this project nor a public DiT"),
    (lambda w: {}, "It holds nothing"),
    (lambda w: [w], "holds a list"),
    (lambda w: w | {"x_embedder.proj.weight": torch.zeros(3)}, "not those of a DiT"),
    (lambda w: w | {"x_embedder.proj.weight": 3}, "not those of a DiT"),
    (lambda w: w | {"pos_embed": torch.zeros(5)}, "not those of a DiT"),
    (lambda w: w | {"pos_embed": torch.zeros(1, 15, WIDTH)}, "pos_embed"),
    (lambda w: public_weights(width=96), "6 layers of width 96, which is no known size"),
    (lambda w: public_weights(depth=5), "5 layers of width 64, which is no known size"),
    (lambda w: public_weights(outputs=6), "final_layer.linear.weight"),
    (lambda w: {name: x for name, x in w.items() if name != PROJ}, PROJ),
    (lambda w: w | {"blocks.3.attn.q_norm.weight": torch.ones(16)}, "blocks.3.attn.q_norm.weight"),
    (lambda w: w | {PROJ: torch.zeros(WIDTH, 63)}, PROJ),
    (lambda w: w | {PROJ: w[PROJ].clone().fill_(math.nan)}, PROJ + " holds values that are not"),
    (lambda w: w | {PROJ: w[PROJ].half() / 0}, PROJ + " holds values that are not"),
    (lambda w: w | {PROJ: 3}, PROJ + " holds values that are not"),
    (lambda w: public_weights(output_layers=3), "3 output layers"),
])
def test_what_is_no_public_dit_is_refused(tmp_path, content, says):
    file = save(tmp_path / "a.pt", content(public_weights()))
    refused(f"{file}.*{says}", file, "teacher", "student", teacher_kind="dit")


# ---- 4. Our own checkpoints, and where they are looked for ---------------------------------------


def write_student(file):
    config = replace(CONFIG, mask="causal", history_layers=2)
    student = Student(FLOW_8, (2, 4, 6, 8), "states", "direction", (1000.0, 750.0, 500.0, 250.0))
    known = {name: getattr(TEACHER, name) for name in ("data", "classes", "class_weights")}
    record = StudentRecord(config, student, **known, teacher="", trajectories=1, training=TRAINING)
    model = random_dit(mask="causal", history_layers=2)
    export(file, "student", asdict(record), model.state_dict())
    return record


def test_our_own_checkpoints_are_loaded_with_their_records(tmp_path):
    export(tmp_path / "teacher.pt", "teacher", asdict(TEACHER), random_dit(3).state_dict())
    model, record = load_network(tmp_path / "teacher.pt", "student", "teacher", device="cpu")
    assert record == TEACHER and not model.training
    assert_weights(model, {name: w.half() for name, w in random_dit(3).state_dict().items()})
    assert not any(weight.requires_grad for weight in model.parameters())
    student = write_student(tmp_path / "student.pt")
    assert load_network(tmp_path / "student.pt", "student")[1] == student
    refused("holds a student, and a teacher is needed", tmp_path / "student.pt", "teacher")
    refused("no such checkpoint", tmp_path / "none.pt", "teacher")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretrained.py", *map(str, words)])
    pretrained.main()


def test_a_network_alone_is_written(tmp_path, monkeypatch, capsys):
    """Of a training's checkpoint, its EMA; of a published file, a checkpoint of this project."""
    write_student(tmp_path / "student.pt")
    torch.save(dict(ema=public_weights(outputs=4), opt={}), tmp_path / "sit.pt")
    for name, kind in (("student", "student"), ("sit", "teacher")):
        words = ("--teacher-kind", "sit") if name == "sit" else ()
        run(monkeypatch, tmp_path / f"{name}.pt", tmp_path / f"small-{name}.pt", *words)
        found, found_record = load_network(tmp_path / f"small-{name}.pt", kind)
        more = dict(teacher_kind="sit") if name == "sit" else {}
        model, record = load_network(tmp_path / f"{name}.pt", kind, **more)
        assert found_record == record
        weights = {key: value.half() for key, value in model.state_dict().items()}
        assert_weights(found, weights)
    assert "rounding has made it another teacher" in capsys.readouterr().out
    run(monkeypatch, tmp_path / "small-sit.pt", tmp_path / "again.pt")  # nothing left to round
    assert "another teacher" not in capsys.readouterr().out
    before = (tmp_path / "student.pt").read_bytes()
    for file, says in (("student.pt", "is there already: export to another"), ("", "is a folder")):
        with pytest.raises(UserError, match=says):
            run(monkeypatch, tmp_path / "student.pt", tmp_path / file)
    assert (tmp_path / "student.pt").read_bytes() == before


def test_our_own_checkpoint_unfinished_or_damaged(tmp_path, capsys):
    weights = random_dit().state_dict()
    content = dict(kind="teacher", record=asdict(TEACHER), ema=weights)
    load_network(save(tmp_path / "a.pt", content | dict(iteration=60)), "teacher")
    assert capsys.readouterr().out == ""
    load_network(save(tmp_path / "a.pt", content | dict(iteration=10)), "teacher")
    assert "not finished: 10 of 60 iterations" in capsys.readouterr().out
    weights[PROJ][0, 0] = math.inf
    refused(PROJ + " holds values that are not", save(tmp_path / "a.pt", content), "teacher")


def test_the_folder_of_a_run_stands_for_its_student_or_teacher(tmp_path, capsys):
    refused("without student.pt or teacher.pt: name a checkpoint", tmp_path, "student", "teacher")
    write_teacher(tmp_path / "teacher.pt")
    assert isinstance(load_network(tmp_path, "student", "teacher")[1], TeacherRecord)
    assert "taking its teacher.pt" in capsys.readouterr().out
    refused("without student.pt: name a checkpoint", tmp_path, "student")
    write_student(tmp_path / "student.pt")
    assert isinstance(load_network(tmp_path, "student", "teacher")[1], StudentRecord)
    assert isinstance(load_network(tmp_path, "teacher")[1], TeacherRecord)


def test_where_the_teacher_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path / "assets")
    folders = ["out/teacher.pt", "runs/textures/teacher.pt", "assets/textures-teacher.pt"]
    places = ["given.pt", *folders]
    for seed, place in enumerate(places):
        write_teacher(tmp_path / place, seed)
    out = tmp_path / "out"
    for seed, place in enumerate(places):
        model, _ = find_teacher("given.pt" if seed == 0 else None, "textures", out)
        expected = {name: w.half() for name, w in random_dit(seed).state_dict().items()}
        assert fingerprint(model.state_dict()) == fingerprint(expected)
        assert f"{place}\n" in capsys.readouterr().out
        (tmp_path / place).unlink()
    with pytest.raises(UserError, match="or train it: python teacher.py --preset textures"):
        find_teacher(None, "textures", out)
    with pytest.raises(UserError, match="no such checkpoint: given.pt"):
        find_teacher("given.pt", "textures", out)


# ---- 5. Folders of diffusers ---------------------------------------------------------------------

SETTINGS = dict(
    _class_name="DiTTransformer2DModel",
    num_attention_heads=HEADS,
    attention_head_dim=WIDTH // HEADS,
    sample_size=SIDE,
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
)
SCHEDULER = dict(
    _class_name="DDIMScheduler",
    prediction_type="epsilon",
    beta_schedule="linear",
    beta_start=0.0001,
    beta_end=0.02,
    num_train_timesteps=1000,
    trained_betas=None,
    clip_sample=False,
)


def diffusers_weights(w):
    """Public weights as the conversion of diffusers names them: copies of the embeddings in every
    layer; q, k and v apart; no positions."""
    theirs, depth = {}, sum(name.endswith("qkv.weight") for name in w)

    def put(name, kind, value):
        theirs[f"{name}.{kind}"] = value.clone()

    for kind in ("weight", "bias"):
        put("pos_embed.proj", kind, w[f"x_embedder.proj.{kind}"])
        put("proj_out_1", kind, w[f"final_layer.adaLN_modulation.1.{kind}"])
        put("proj_out_2", kind, w[f"final_layer.linear.{kind}"])
        for i in range(depth):
            layer, ours = f"transformer_blocks.{i}", f"blocks.{i}"
            embedding = f"{layer}.norm1.emb.timestep_embedder.linear_"
            put(embedding + "1", kind, w[f"t_embedder.mlp.0.{kind}"])
            put(embedding + "2", kind, w[f"t_embedder.mlp.2.{kind}"])
            put(f"{layer}.norm1.linear", kind, w[f"{ours}.adaLN_modulation.1.{kind}"])
            for letter, value in zip("qkv", w[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                put(f"{layer}.attn1.to_{letter}", kind, value)
            put(f"{layer}.attn1.to_out.0", kind, w[f"{ours}.attn.proj.{kind}"])
            put(f"{layer}.ff.net.0.proj", kind, w[f"{ours}.mlp.fc1.{kind}"])
            put(f"{layer}.ff.net.2", kind, w[f"{ours}.mlp.fc2.{kind}"])
    labels = w["y_embedder.embedding_table.weight"]
    for i in range(depth):
        put(f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table", "weight", labels)
    return theirs


def sincos(grid, width):
    """The public positions: a quarter of the width each for sines and cosines of column and row."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows = []
    for row in range(grid):
        for column in range(grid):
            angles = [column * omega, column * omega, row * omega, row * omega]
            halves = [np.sin(angles[0]), np.cos(angles[1]), np.sin(angles[2]), np.cos(angles[3])]
            rows.append(np.concatenate(halves))
    return torch.tensor(np.stack(rows), dtype=torch.float32)[None]


WEIGHTS = "diffusion_pytorch_model.bin"


def write_folder(folder, weights, settings=SETTINGS, scheduler=None, name=WEIGHTS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if scheduler is not None:
        (folder.parent / "scheduler").mkdir(exist_ok=True)
        file = folder.parent / "scheduler/scheduler_config.json"
        file.write_text(json.dumps(scheduler))
    if weights is not None:
        torch.save(weights, folder / name)
    return folder


PUBLIC = public_weights() | {"pos_embed": sincos(SIDE // PATCH, WIDTH)}


def test_a_converted_folder_is_the_network_that_was_converted(tmp_path):
    theirs = diffusers_weights(PUBLIC)
    folder = write_folder(tmp_path / "p/transformer", theirs, scheduler=SCHEDULER)
    for path in (folder, tmp_path / "p"):  # the transformer, or the whole pipeline
        model, record = load_network(path, "student", "teacher", teacher_kind="dit")
        assert record.ode == pretrained.ODES["dit"] and record.model.heads == HEADS
        for name, value in PUBLIC.items():
            assert (model.state_dict()[name] - value).abs().max() < 1e-6, name
        timesteps = torch.tensor([999.0, 42.0])
        expected = plain(PUBLIC, X, timesteps, Y)  # with its frequencies, over 128
        output = model(X[:, None], timesteps[:, None], Y)[:, 0]
        assert (output - expected).norm() < 5e-5 * expected.norm()
    refused("holds a teacher, and a student is needed", folder, "student")


@pytest.mark.parametrize("width, depth, heads, wrong", [(48, 2, 3, 4), (WIDTH, DEPTH, 8, HEADS)])
def test_a_folder_says_its_heads_so_any_size_is_loaded(tmp_path, width, depth, heads, wrong):
    weights = public_weights(width=width, depth=depth)
    weights["pos_embed"] = sincos(SIDE // PATCH, width)
    settings = SETTINGS | dict(num_attention_heads=heads, attention_head_dim=width // heads)
    folder = write_folder(tmp_path / "dit", diffusers_weights(weights), settings)
    model, record = load_network(folder, "teacher", teacher_kind="dit")
    assert (record.model.depth, record.model.heads) == (depth, heads)
    output = model(X[:, None], torch.tensor([500.0]), Y)[:, 0]
    for count in (heads, wrong):
        expected = plain(weights, X, torch.full((2,), 500.0), Y, count)
        is_equal = (output - expected).norm() < 5e-5 * expected.norm()
        assert is_equal == (count == heads)


def test_variants_and_parts_of_a_folders_weights(tmp_path):
    theirs = diffusers_weights(PUBLIC)
    half = {name: value.half() for name, value in theirs.items()}
    folder = write_folder(tmp_path / "a", half, name="diffusion_pytorch_model.fp16.bin")
    model, _ = load_network(folder, "teacher", teacher_kind="dit")
    assert torch.equal(model.state_dict()[PROJ], PUBLIC[PROJ].half().float())
    write_folder(folder, theirs)  # beside the float16 variant
    model, _ = load_network(folder, "teacher", teacher_kind="dit")
    assert torch.equal(model.state_dict()[PROJ], PUBLIC[PROJ])
    names = list(theirs)
    for i, part in enumerate((names[:20], names[20:]), start=1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.bin"
        write_folder(tmp_path / "b", {name: theirs[name] for name in part}, name=file)
    model, _ = load_network(tmp_path / "b", "teacher", teacher_kind="dit")
    assert torch.equal(model.state_dict()[PROJ], PUBLIC[PROJ])


@pytest.mark.parametrize("settings, scheduler, says", [
    (dict(norm_type="ada_norm_single"), {}, "norm_type = ada_norm_single: only .* ada_norm_zero"),
    (dict(norm_elementwise_affine=True), {}, "norm_elementwise_affine = True"),
    (dict(activation_fn="geglu"), {}, "activation_fn = geglu"),
    (dict(sample_size=None), {}, "is no DiT of diffusers"),
    ({}, dict(prediction_type="v_prediction"), "prediction_type = v_prediction: only .* epsilon"),
    ({}, dict(beta_schedule="scaled_linear"), "beta_schedule = scaled_linear"),
    ({}, dict(beta_end=0.012), "beta_end = 0.012: only networks with 0.02"),
    ({}, dict(num_train_timesteps=100), "num_train_timesteps = 100"),
    ({}, dict(trained_betas=[0.1]), "trained_betas"),
    ({}, dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr = True"),
    ({}, None, "prediction_type = None"),  # the scheduler of flow matching, which has none of these
])
def test_settings_of_diffusers_that_are_no_public_dits_are_refused(
    tmp_path, settings, scheduler, says
):
    if scheduler is None:
        scheduler = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000)
    else:
        scheduler = SCHEDULER | scheduler
    theirs = diffusers_weights(PUBLIC)
    folder = write_folder(tmp_path / "p/transformer", theirs, SETTINGS | settings, scheduler)
    refused(says, folder, "teacher", teacher_kind="dit")


@pytest.mark.parametrize("change, says", [
    (lambda w: w.pop("transformer_blocks.3.attn1.to_q.weight"), "blocks.3.attn"),
    (lambda w: w.pop("transformer_blocks.3.ff.net.2.bias"), "blocks.3.mlp.fc2.bias"),
    (lambda w: w.pop("pos_embed.proj.weight"), "is no DiT of diffusers"),
    (lambda w: w.update({"transformer_blocks.1.norm3.weight": torch.ones(64)}), "norm3"),
    (lambda w: w.update({"proj_out_2.bias": torch.ones(3)}), "final_layer.linear.bias"),
    (lambda w: w["proj_out_2.bias"].fill_(math.nan), "final_layer.linear.bias holds values"),
    (lambda w: w["transformer_blocks.4.norm1.emb.timestep_embedder.linear_1.weight"].add_(1e-3),
     "was trained with diffusers: each layer has its own t_embedder.mlp.0.weight"),
    (lambda w: w["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"].neg_(),
     "was trained with diffusers: each layer has its own y_embedder"),
])
def test_weights_of_diffusers_that_are_no_public_dits_are_refused(tmp_path, change, says):
    theirs = diffusers_weights(PUBLIC)
    change(theirs)
    refused(says, write_folder(tmp_path / "dit", theirs), "teacher", teacher_kind="dit")


def test_a_folder_of_diffusers_that_cannot_be_read(tmp_path):
    refused("lacks its weights", write_folder(tmp_path / "a", None), "teacher")
    folder = write_folder(tmp_path / "b", diffusers_weights(PUBLIC))
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        refused("config.json is damaged", folder, "teacher")


def test_against_diffusers_itself(tmp_path):
    """Their frequencies differ in all but the first; at t = 0 all cosines are 1 and all sines 0."""
    reason = "optional package diffusers is not installed"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    theirs.save_pretrained(tmp_path / "fresh")
    refused("was trained with diffusers", tmp_path / "fresh", "teacher")

    theirs.load_state_dict(diffusers_weights(PUBLIC))
    theirs.save_pretrained(tmp_path / "p/transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "p/scheduler")
    model, _ = load_network(tmp_path / "p", "teacher", teacher_kind="dit")
    errors = []
    for t in (0, 999):
        with torch.no_grad():
            expected = theirs(X, timestep=torch.full((2,), t), class_labels=Y).sample[:, :4]
        output = model(X[:, None], torch.tensor([float(t)]), Y)[:, 0]
        errors.append(((output - expected).norm() / expected.norm()).item())
    assert errors[0] < 1e-4 < 1e-3 < errors[1]
    for scheduler in (
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        scheduler.save_pretrained(tmp_path / "p/scheduler")
        refused("scheduler_config.json says", tmp_path / "p", "teacher")
