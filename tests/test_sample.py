"""Few-step sampling against its definition, x̂_{τ_{s−1}} = G(x_T, …, x̂_{τ_s}), computed without a
cache; and the files that sample.py writes, read back with numpy and Pillow."""

import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_pretrained import public_weights

import data
import sample
from config import MASKS, ODE, DataConfig, Student, parse_size
from files import UserError, export
from pretrained import load_network
from sample import few_step, implied_x0, parse_labels, predict_all, student_times
from text import TEXT_WIDTH
from tiny import TEACHER, random_dit, student_of

TIMESTEPS = torch.tensor([1000.0, 750.0, 500.0, 250.0])


def noises(count=3):
    torch.manual_seed(0)
    return torch.randn(count, 3, 8, 8), torch.tensor([0, 4, 2])[:count]


@pytest.mark.parametrize("output", ["direction", "state"])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("layer_per_step", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_few_step_is_the_papers_loop(mask, layer_per_step, shortcut, output):
    settings = dict(mask=mask, output_layer_per_step=layer_per_step, output=output)
    model, record = student_of(random_dit(), noise_shortcut=shortcut, **settings)
    if shortcut:
        torch.nn.init.normal_(model.noise_shortcut.weight, std=0.08)
    x_T, y = noises()
    states = [x_T]
    with torch.no_grad():
        for s in range(4):
            out = model(torch.stack(states, 1), TIMESTEPS[: s + 1], y)[:, -1]
            states.append(out if output == "state" else states[-1] - 0.25 * out)
    assert (states[-1] - x_T).abs().mean() > 0.1
    found = few_step(model, record.student, x_T, y)
    torch.testing.assert_close(found, torch.stack(states, 1), rtol=1e-5, atol=1e-5)
    three = few_step(model, record.student, x_T, y, steps=3)
    assert torch.equal(three, found[:, :4])


@pytest.mark.parametrize("mask", MASKS)
def test_one_pass_over_a_students_own_states_predicts_the_same_states(mask):
    model, record = student_of(random_dit(), mask=mask)
    x_T, y = noises()
    own = few_step(model, record.student, x_T, y)
    with torch.no_grad():
        predicted = predict_all(model, record.student, own[:, :-1], y)
    torch.testing.assert_close(predicted, own[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ode, targets, times",
    [
        (ODE("flow", "v", euler_steps=24), (6, 12, 18, 24), [1, 0.75, 0.5, 0.25, 0]),
        (ODE("ddpm", "eps", euler_steps=25), (10, 15, 20, 25), [999, 583, 375, 166, -1]),
    ],
)
def test_the_times_of_a_students_states(ode, targets, times):
    student = Student(ode, targets, "states", "state", timesteps=(4.0, 3.0, 2.0, 1.0))
    assert student.steps == 4 and student_times(student).tolist() == times


@pytest.mark.parametrize("noise_path, times", [("flow", [1, 0.75, 0]), ("ddpm", [999, 500, -1])])
def test_implied_x0_finds_the_image_behind_the_states(noise_path, times):
    torch.manual_seed(0)
    image, noise = torch.randn(2, 2, 3, 4, 4)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    states = []
    for t in times:
        kept = alpha_bar[int(t)] if t >= 0 else 1.0
        alpha, sigma = (1 - t, t) if noise_path == "flow" else (kept**0.5, (1 - kept) ** 0.5)
        states.append(alpha * image + sigma * noise)
    ode = ODE(noise_path, "v", euler_steps=2)
    found = implied_x0(ode, torch.stack(states, 1), torch.tensor(times, dtype=torch.float32))
    assert found.shape == (2, 2, 3, 4, 4)
    torch.testing.assert_close(found, image[:, None].expand_as(found), atol=1e-3, rtol=1e-3)


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture
def student_file(tmp_path):
    model, record = student_of(random_dit())
    export(tmp_path / "student.pt", "student", asdict(record), model.state_dict())
    return tmp_path / "student.pt"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words), "--device", "cpu"])
    sample.main()


def pixels(folder):
    return np.load(folder / "samples.npz")["arr_0"].astype(int)


def test_files(student_file, tmp_path, monkeypatch):
    flags = ("--npz", "--png", "--draw-trajectory", "--out", tmp_path / "a")
    run(monkeypatch, student_file, "--count", 6, "--labels", "dog", 0, *flags)
    images = np.load(tmp_path / "a/samples.npz")["arr_0"]
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8 and images.std() > 10
    singles = sorted((tmp_path / "a/images").iterdir())
    names = [f"{i:05d}-{'ant' if i % 2 else 'dog'}.png" for i in range(6)]
    assert [path.name for path in singles] == names
    assert np.array_equal(np.asarray(Image.open(singles[3])), images[3])

    sheet = np.asarray(Image.open(tmp_path / "a/grid.png"))  # 3 × 2 images, enlarged eight times
    assert sheet.shape[:2] == (2 * 68 + 4, 3 * 68 + 4)
    assert np.array_equal(sheet[4:68:8, 4:68:8], images[0])
    way = Image.open(tmp_path / "a/trajectory.png")  # five states, and the four x̂_0 of the steps
    assert way.size == (6 * 68 + 4, (5 + 4) * 68 + 4)

    with pytest.raises(UserError, match="holds files"):  # which would be mixed with ours
        run(monkeypatch, student_file, "--png", "--out", tmp_path / "a")


def test_a_teacher_is_sampled_with_the_ode_that_was_asked_for(tmp_path, monkeypatch):
    weights = random_dit().state_dict()
    export(tmp_path / "teacher.pt", "teacher", asdict(TEACHER), weights)
    for euler_steps in (8, 3):
        flags = ("--euler-steps", euler_steps, "--draw-trajectory", "--count", 2)
        run(monkeypatch, tmp_path / "teacher.pt", *flags, "--out", tmp_path / "a")
        rows = euler_steps + 1 + euler_steps
        assert Image.open(tmp_path / "a/trajectory.png").height == rows * 68 + 4


def test_the_same_seed_gives_the_same_images_at_any_batch_size(
    student_file, tmp_path, monkeypatch
):
    for name, more in (("a", ("--batch", 5)), ("b", ("--batch", 2)), ("c", ("--seed", 1))):
        run(monkeypatch, student_file, "--count", 5, "--npz", "--out", tmp_path / name, *more)
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert abs(a - b).max() <= 1  # to rounding
    assert abs(a - c).mean() > 5


def test_no_image_is_made_from_a_noise_that_students_learn_from(
    student_file, tmp_path, monkeypatch
):
    run(monkeypatch, student_file, "--count", 5, "--npz", "--out", tmp_path / "a")
    model, record = load_network(student_file, "student", device="cpu")
    for seed in (0, data.EVALUATION_SEED):  # of trajectories, and of evaluation
        x_T, y = data.noise_and_labels(record, seed, range(5))
        images = data.to_uint8(few_step(model, record.student, x_T, y)[:, -1])
        assert abs(pixels(tmp_path / "a") - images).mean() > 5


def test_labels_are_names_or_numbers():
    classes = ("ant", "bee", "10")
    assert parse_labels(["bee", "0", "10"], classes) == [1, 0, 2]  # a name goes before a number
    for wrong in ("wasp", "3", "-1"):
        with pytest.raises(UserError, match="from 0 to 2"):
            parse_labels([wrong], classes)


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    model, record = student_of(random_dit())
    model.final_layer.linear.weight.data[:] = float("nan")
    content = dict(kind="student", record=asdict(record), ema=model.state_dict())
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="not finite"):
        run(monkeypatch, tmp_path / "nan.pt", "--count", 1, "--out", tmp_path / "a")


def test_channels_that_cannot_be_shown_are_refused(tmp_path, monkeypatch):
    """Such as latents of an autoencoder with 16 channels, which are no picture."""
    model = random_dit(channels=16)
    record = replace(TEACHER, model=model.config)
    export(tmp_path / "t.pt", "teacher", asdict(record), model.state_dict())
    with pytest.raises(UserError, match="16 channels are neither an image nor latents"):
        run(monkeypatch, tmp_path / "t.pt", "--out", tmp_path / "a")


def test_the_kind_of_a_published_teacher_can_be_given(tmp_path, monkeypatch):
    torch.save(public_weights(), tmp_path / "public.pt")
    monkeypatch.setattr(sample, "load_vae", lambda name, device: "an autoencoder")
    monkeypatch.setattr(sample, "decode", lambda vae, latents: latents[:, :3])
    words = ("--count", 2, "--euler-steps", 3, "--out", tmp_path / "a")
    with pytest.raises(UserError, match="behaves on noise like none"):
        run(monkeypatch, tmp_path / "public.pt", *words)
    run(monkeypatch, tmp_path / "public.pt", *words, "--teacher-kind", "sit")
    assert (tmp_path / "a/grid.png").exists()


def test_a_row_of_images_for_each_prompt(tmp_path, monkeypatch, capsys):
    text = dict(image_size=21, classes=1, text_width=TEXT_WIDTH, **parse_size("N/7"))
    model = random_dit(**text)
    record = replace(TEACHER, model=model.config, data=DataConfig("scenes", 21, 3), classes=("",))
    export(tmp_path / "t.pt", "teacher", asdict(record), model.state_dict())
    prompts = ("--prompt", "a red star", "--prompt", "two blue rings", "--out", tmp_path / "a")
    run(monkeypatch, tmp_path / "t.pt", *prompts, "--count", 5)
    width, height = Image.open(tmp_path / "a/grid.png").size
    assert width > 2 * 64 and height > 2 * 64
    assert "4 of 5 images" in capsys.readouterr().out  # as many of each
    with pytest.raises(UserError, match="no more prompts than --count"):
        run(monkeypatch, tmp_path / "t.pt", *prompts, "--count", 1)
    for more in (("--labels", 5), prompts):
        with pytest.raises(UserError, match="each --prompt once, and no --labels beside it"):
            run(monkeypatch, tmp_path / "t.pt", *prompts, *more, "--count", 8)
