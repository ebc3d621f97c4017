"""PixArt-α: our network with converted weights against diffusers itself, and its prompts."""

import json
import math
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import random_dit

import distill
import evaluate
import sample
import text
import trajectories
from config import PRESETS
from files import UserError, save_json
from pixart import use_prompts
from pretrained import load_network
from shards import write_shard
from teacher import solve

SIDE, TEXT_WIDTH, LENGTH = 8, 20, 7
TOKENS = [3, 7, 1, 5, 2]  # of five prompts; the last is the empty one


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="optional package: diffusers")


def random_pixart(diffusers, folder, **changes):
    """A small PixArt of diffusers with random weights, in eval mode; it is saved into `folder`."""
    torch.manual_seed(0)
    settings = dict(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=24,
        sample_size=SIDE,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
    )
    model = diffusers.PixArtTransformer2DModel(**settings | changes).eval()
    with torch.no_grad():
        for weight in model.parameters():  # so that every weight matters
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder, safe_serialization=False)
    return model


def write_prompts(folder, width=TEXT_WIDTH):
    """A folder as text.py writes it, and its vectors, (5, LENGTH, width)."""
    vectors = np.random.default_rng(0).standard_normal((5, LENGTH, width)).astype(np.float16)
    meta = dict(kind="prompts", prompts="p", encoder="e", count=4, length=LENGTH, width=width)
    folder.mkdir(parents=True)
    save_json(folder / "meta.json", meta)
    record = text.prompt_record(LENGTH, width)
    write_shard(folder, 0, record, label=np.arange(5), tokens=TOKENS, vectors=vectors)
    return torch.from_numpy(vectors).float()


def run_diffusers(model, vectors, x, timestep, y):
    """The noise that their network predicts for the prompts y, (b,), padding masked."""
    mask = torch.arange(LENGTH)[None] < torch.tensor(TOKENS)[y][:, None]
    size = torch.full((len(x), 2), 8.0 * x.shape[-1])
    conditions = dict(resolution=size, aspect_ratio=torch.ones(len(x), 1))
    with torch.no_grad():
        output = model(
            x,
            encoder_hidden_states=vectors[y],
            timestep=torch.full((len(x),), timestep),
            encoder_attention_mask=mask.long(),
            added_cond_kwargs=conditions if model.use_additional_conditions else None,
        )
    return output.sample[:, :4]


NETWORKS = {
    "256 or 512 pixels": {},
    "resolution conditions": dict(use_additional_conditions=True, interpolation_scale=2),
    "1024 pixels": dict(sample_size=128, patch_size=16),  # these settings follow from the size
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_outputs_are_those_of_diffusers(tmp_path, diffusers, changes):
    theirs = random_pixart(diffusers, tmp_path / "p/transformer", **changes)
    vectors = write_prompts(tmp_path / "prompts")
    model, record = load_network(tmp_path / "p", "teacher")  # the whole pipeline
    assert record.ode == PRESETS["pixart256"].ode and record.ode.guided_channels is None
    record = use_prompts(model, record, tmp_path / "prompts")
    assert (record.model.classes, record.classes, len(model.prompts)) == (4, (), 4)
    side = theirs.config.sample_size
    x, y = torch.randn(5, 4, side, side), torch.tensor([0, 1, 2, 3, -1])
    for timestep in (999, 500, 3):
        expected = run_diffusers(theirs, vectors, x, timestep, y)
        output = model(x[:, None], torch.tensor([float(timestep)]), y)[:, 0]
        assert (output - expected).abs().max() < 1e-4 < 0.1 * expected.std()
    if theirs.use_additional_conditions:  # they matter, and so does the distance of positions
        assert (model.pos_embed[0, 1, 0] - math.sin(1 / 2)).abs() < 1e-6


@pytest.mark.parametrize("name", ["256 or 512 pixels", "resolution conditions"])
def test_25_ddim_steps_with_guidance_are_those_of_diffusers(tmp_path, diffusers, name):
    """Their scheduler takes steps of equal length. The public code, from which our times are, has
    steps of 41 and 42: so the scheduler is told the length of each step."""
    theirs = random_pixart(diffusers, tmp_path / "pixart", **NETWORKS[name])
    vectors = write_prompts(tmp_path / "prompts")
    model, record = load_network(tmp_path / "pixart", "teacher")
    use_prompts(model, record, tmp_path / "prompts")
    x_T, y = torch.randn(3, 4, SIDE, SIDE), torch.tensor([1, 0, 2])
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # with DiT's β by its defaults
    times = np.linspace(999, 0, 25).round().astype(int)
    x = x_T
    for time, next_time in zip(times, [*times[1:], -1], strict=True):
        cond = run_diffusers(theirs, vectors, x, int(time), y)
        uncond = run_diffusers(theirs, vectors, x, int(time), torch.full_like(y, -1))
        scheduler.num_inference_steps = Fraction(1000, int(time - next_time))
        x = scheduler.step(uncond + 4.5 * (cond - uncond), int(time), x).prev_sample
    states, _ = solve(model, record.ode, x_T, y)
    assert (states[:, -1] - x).norm() < 1e-4 * x.norm()


def test_files_that_are_not_whole_or_not_pixart(tmp_path, diffusers):
    folder = tmp_path / "p/transformer"
    random_pixart(diffusers, folder, use_additional_conditions=True)
    file, config = folder / "diffusion_pytorch_model.bin", folder / "config.json"
    weights, settings = torch.load(file), json.loads(config.read_text())

    def refused(says, changed=weights, **options):
        torch.save(changed, file)
        with pytest.raises(UserError, match=says):
            load_network(folder, options.pop("kind", "teacher"), **options)

    for name in weights:  # none may be missing
        refused("weights of another network", {n: w for n, w in weights.items() if n != name})
    refused("another network.*extra", weights | {"extra": torch.zeros(2)})
    for name in ("proj_out.bias", "adaln_single.emb.aspect_ratio_embedder.linear_2.bias"):
        refused("is damaged", weights | {name: weights[name] * math.nan})
    refused("a teacher, and a student", kind="student")
    refused("leave out --teacher-kind", teacher_kind="dit")
    for change, says in (
        (dict(norm_type="layer_norm"), "norm_type = layer_norm"),
        (dict(caption_channels=None), "does not describe a PixArt"),
        (dict(use_additional_conditions=False), "weights of another network"),
    ):
        save_json(config, settings | change)
        refused(says)
    # Early versions of diffusers had another name for the class, and one more tensor.
    save_json(config, settings | dict(_class_name="Transformer2DModel"))
    torch.save(weights | {"caption_projection.y_embedding": torch.zeros(LENGTH, TEXT_WIDTH)}, file)
    load_network(folder, "teacher")
    (tmp_path / "p/vae").mkdir()
    save_json(tmp_path / "p/vae/config.json", dict(scaling_factor=0.13025))
    refused("scales latents by 0.13025")


def test_networks_and_prompts_that_do_not_go_together(tmp_path, diffusers):
    random_pixart(diffusers, tmp_path / "pixart")
    write_prompts(tmp_path / "wide", width=24)
    write_prompts(tmp_path / "right")
    model, record = load_network(tmp_path / "pixart", "teacher")
    with pytest.raises(UserError, match="with --prompts"):
        model(torch.zeros(1, 1, 4, SIDE, SIDE), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(UserError, match="with --prompts"):
        use_prompts(model, record, None)
    with pytest.raises(UserError, match="vectors of 24 features, and this network reads 20"):
        use_prompts(model, record, tmp_path / "wide")
    classes = random_dit()
    record_of_classes = replace(record, model=classes.config)
    assert use_prompts(classes, record_of_classes, None) == record_of_classes
    with pytest.raises(UserError, match="given classes, not text"):
        use_prompts(classes, record_of_classes, tmp_path / "right")
    model.prompts = text.scene_prompts()
    with pytest.raises(UserError, match="captions of scenes.py"):
        use_prompts(model, record, tmp_path / "right")


def run(monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", [program.__name__, *words.split(), "--device", "cpu"])
    program.main()


def test_from_prompts_to_images(tmp_path, diffusers, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_pixart(diffusers, tmp_path / "pixart")
    write_prompts(tmp_path / "texts")
    monkeypatch.setattr(trajectories, "SHARD", 8)
    given = "--preset pixart256 --teacher pixart"
    with pytest.raises(UserError, match="with --prompts"):
        run(monkeypatch, trajectories, given)
    given += " --prompts texts --count 16"
    run(monkeypatch, trajectories, given)
    small = " --iterations 3 --batch 4 --history-layers 2 --no-control --out run"
    monkeypatch.setattr("evaluate.ERROR_IMAGES", 8)
    run(monkeypatch, distill, given + small)
    model, record = load_network(tmp_path / "run", "student")
    assert (record.model.classes, record.model.text_width) == (4, TEXT_WIDTH)
    assert record.student.ode == PRESETS["pixart256"].ode and record.model.output_layers == 4

    judging = "run --teacher pixart --count 8 --out judged"
    with pytest.raises(UserError, match="with --prompts"):
        run(monkeypatch, evaluate, judging)
    run(monkeypatch, evaluate, f"{judging} --prompts texts")
    rows = json.loads((tmp_path / "judged/evaluation.json").read_text())["rows"]
    assert rows["run, 4 steps (reads its history)"]["error"] > 0

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(4,) * 4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained("vae")
    drawing = "--vae vae --count 5 --png --out out"
    with pytest.raises(UserError, match="with --prompts"):
        run(monkeypatch, sample, f"run/student.pt {drawing}")
    run(monkeypatch, sample, f"run/student.pt --prompts texts {drawing}")
    names = sorted(file.name for file in (tmp_path / "out/images").iterdir())
    assert names == [f"0000{i}-{i % 4}.png" for i in range(5)]  # the prompts in turn
    with pytest.raises(UserError, match="text of T5"):
        run(monkeypatch, sample, f"run/student.pt --prompts texts --prompt star {drawing}2")

    meta = json.loads((tmp_path / "texts/meta.json").read_text())
    save_json(tmp_path / "texts/meta.json", meta | dict(prompts="others"))
    with pytest.raises(UserError, match="written for something else.*teacher"):
        run(monkeypatch, distill, given + small)
