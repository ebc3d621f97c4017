"""Published checkpoints, made here in the published formats with random weights: they load strictly, and what they then
do is what the public DiT and its sampler do, written plainly in this file."""

import argparse
import math

import numpy as np
import pytest
import torch

import data
from distill import distill, make_student
from model import SIZES, DiT, size
from presets import STUDENTS, TEACHERS, choose
from public import TIMES, TOLD
from sample import few_step
from teacher import PATHS, load_network, solve, write_trajectories
from test_model import plain_dit
from training import Fault, fingerprint


def public_weights(output_layers=1, width=384, depth=12, patch=8):
    """Names and shapes of a DiT-S/8, the smallest of the twelve, written down by hand; random numbers in them."""
    shapes = {"x_embedder.proj": (width, 4, patch, patch), "t_embedder.mlp.0": (width, 256),
              "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
                   f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
                   f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}
    for i in range(output_layers):
        name = f"final_layer{i + 1 if i else ''}"
        shapes |= {f"{name}.adaLN_modulation.1": (2 * width, width), f"{name}.linear": (patch * patch * 8, width)}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()} | \
             {f"{name}.bias": shape[:1] for name, shape in shapes.items()} | \
             {"pos_embed": (1, (32 // patch) ** 2, width), "y_embedder.embedding_table.weight": (1001, width)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def public_dit(tmp_path_factory):
    """The file that the public repository gives: a dict of weights."""
    path = tmp_path_factory.mktemp("public") / "DiT-S-8-256x256.pt"
    torch.save(public_weights(), path)
    return path


def plain(w, x, t, y):
    return plain_dit(w, x[:, None], t[:, None], y, [None] * 12, patch=8, heads=6)[:, 0]


def plain_ddim(w, x, y):
    """The public sampler: 25 respaced times, guidance 1.5 on three channels, DDIM without noise (η = 0)."""
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = [round(k * 999 / 24) for k in range(25)]
    for i in range(24, -1, -1):
        t = torch.full((2 * len(x),), times[i])
        cond, uncond = plain(w, torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, 1000)])).chunk(2)
        eps = cond.clone()
        eps[:, :3] = uncond[:, :3] + 1.5 * (cond - uncond)[:, :3]
        bar, before = bars[times[i]], bars[times[i - 1]] if i else 1.0
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    return x


def test_the_public_dit_drives_the_public_samplers_ode(public_dit):
    model, about = load_network(public_dit, "teacher")
    assert model.null_class == 1000 and about["model"]["learn_sigma"]
    x, y = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 999])
    t = torch.tensor([999, 42])
    expected = plain(public_weights(), x, t, y)
    with torch.no_grad():
        output = model(x[:, None], t[:, None], y)[:, 0]
    assert expected.norm() > 1 and (output - expected).norm() < 1e-5 * expected.norm()

    _, states, _ = solve(model, about, x, y)
    assert states.shape[1] == 26
    expected = plain_ddim(public_weights(), x, y)
    assert (states[:, -1] - expected).norm() < 3e-5 * expected.norm() and (expected - x).norm() > 0.1 * x.norm()


@pytest.mark.parametrize("letters", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_all_twelve_sizes_are_recognised_by_their_shapes(letters, patch):
    from public import configuration
    settings = dict(image_size=32, channels=4, classes=1000, **size(f"{letters}/{patch}"), learn_sigma=True)
    with torch.device("meta"):
        weights = DiT(**settings).state_dict()
    assert configuration(weights) == settings | dict(step_heads=1) and letters in SIZES


def test_a_public_ard_training_checkpoint_samples(tmp_path, public_dit):
    """Four output heads, clean predictions, told times; `args` is a Namespace, which a safe load refuses unasked."""
    path = tmp_path / "0300000.pt"
    torch.save({"model": {}, "ema": public_weights(4), "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    student, about = load_network(path, "student")
    assert about["told"] == [999.0, 749.25, 499.5, 249.75] and student.history_layers == 6
    assert about["times"] == PATHS["ddpm"].grid(25)[[0, 10, 15, 20, 25]].tolist()
    x, y = torch.randn(2, 4, 32, 32), torch.tensor([0, 7])
    states = few_step(student, about, x, y)
    whole = student(states[:, :4], torch.tensor(about["told"]), y)  # what each step put out is the next state
    assert whole.norm() > 1 and (whole - states[:, 1:]).norm() < 1e-4 * whole.norm()


def test_the_recipe_of_imagenet256_starts_from_a_public_checkpoint(tmp_path, public_dit, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 2)
    teacher, about = load_network(public_dit, "teacher")
    given = argparse.Namespace(preset="imagenet256", iterations=2, batch=2, bf16=False)
    solver, preset = choose(TEACHERS, given), choose(STUDENTS, given)
    write_trajectories(teacher, about, tmp_path / "t", 2, torch.device("cpu"),
                       marks=solver["marks"], keep=solver["keep"])
    trajectories = data.Trajectories(tmp_path / "t", fingerprint(teacher.state_dict()), 4, preset["trajectory"])
    student, about = make_student(teacher, about, preset)
    for head in student.head_names:  # each step starts with a copy of the teacher's output layer
        assert torch.equal(getattr(student, head).linear.weight, teacher.final_layer.linear.weight)
    before = {name: w.clone() for name, w in student.state_dict().items()}
    student, about, [(_, loss)] = distill(student, about, trajectories, preset, tmp_path / "student.pt",
                                          torch.device("cpu"))
    changed = [name for name, w in student.state_dict().items() if not torch.equal(w, before[name])]
    assert loss > 0 and {f"{head}.linear.weight" for head in student.head_names} <= set(changed)
    again, about = load_network(tmp_path / "student.pt", "student")
    assert (about["told"], about["times"]) == (TOLD, TIMES) and about["guided_channels"] == 3
    x, y = data.noise_and_labels(about, 0, range(2))
    assert few_step(again, about, x, y)[:, 1:].std() > 0


NO_DIT = "neither a checkpoint of this project nor a public DiT"
PROJ = "blocks.3.attn.proj.weight"


@pytest.mark.parametrize("content, says", [
    (lambda w: {"weights": torch.zeros(3)}, NO_DIT),
    (lambda w: {"ema": 3}, NO_DIT),
    (lambda w: [w], "lacks the fields"),
    (lambda w: w | {"x_embedder.proj.weight": torch.zeros(3)}, NO_DIT),
    (lambda w: w | {"pos_embed": torch.zeros(5)}, NO_DIT),
    (lambda w: public_weights(width=96), NO_DIT),  # of no known size
    (lambda w: public_weights(depth=11), NO_DIT),
    (lambda w: {name: x for name, x in w.items() if name != "t_embedder.mlp.2.bias"}, "t_embedder.mlp.2.bias"),
    (lambda w: {name: x for name, x in w.items() if name != PROJ}, PROJ),
    (lambda w: w | {"blocks.3.attn.extra": torch.zeros(3)}, "blocks.3.attn.extra"),
    (lambda w: w | {PROJ: torch.zeros(384, 383)}, PROJ),
    (lambda w: public_weights(3), "has 3 output layers: a public DiT has 1, the authors' student 4"),
    (lambda w: public_weights(4), "holds a student, and a teacher is needed"),
])
def test_what_is_no_public_dit_is_refused(tmp_path, content, says):
    torch.save(content(public_weights()), tmp_path / "a.pt")
    with pytest.raises(Fault, match=says) as fault:
        load_network(tmp_path / "a.pt", "teacher")
    assert str(tmp_path / "a.pt") in str(fault.value) and "\n" not in str(fault.value)


def test_a_diffusers_folder_is_the_same_network(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="optional package diffusers is not installed")
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=32,
        patch_size=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    for block in theirs.transformer_blocks[1:]:  # the copies of the embeddings are equal in published weights
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.eval().save_pretrained(tmp_path / "dit")
    model, _ = load_network(tmp_path / "dit", "teacher")
    x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([0, 0]), torch.tensor([3, 8])
    with torch.no_grad():
        # at t = 0 the two agree on the sinusoids, whose frequencies differ a little in diffusers (127 in place of 128)
        expected = theirs(x, timestep=t, class_labels=y).sample[:, :4]
        output = model(x[:, None], t[:, None], y)[:, 0]
    assert expected.norm() > 1 and (output - expected).norm() < 1e-4 * expected.norm()

    with pytest.raises(Fault, match="holds a teacher, and a student is needed"):
        load_network(tmp_path / "dit", "student")
    file = tmp_path / "dit/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name, other in (("transformer_blocks.3.attn1.to_q.weight", {}), ("proj_out_2.bias", {"proj_out_2.bias": x})):
        save_file({key: w for key, w in weights.items() if key != name} | other, file)  # missing; of another shape
        with pytest.raises(Fault, match=name) as fault:
            load_network(tmp_path / "dit", "teacher")
        assert "\n" not in str(fault.value)
