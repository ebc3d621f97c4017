"""The noise paths and the solver, against formulas that can be checked on paper.

The best test of an ODE solver is an ODE whose solution is known. When images are Gaussian,
N(MEAN, SPREAD²) for every pixel, the perfect network is a linear function of x_t, and the ODE
carries x_T to an image by one affine map. So most "networks" here are a few lines that predict
exactly what a perfect network would.
"""

import argparse
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import teacher
from config import ODE, PRESETS, DataConfig
from data import Dataset
from files import UserError
from teacher import (
    DDPM,
    NOISE_PATHS,
    check_ode,
    estimate,
    euler_step,
    guided_output,
    solve,
    teacher_loss,
    train_teacher,
)
from tiny import CPU, TEACHER, write_images

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # ᾱ, as everybody computes it
FLOW, DDPM_V = ODE("flow", "v", euler_steps=6), ODE("ddpm", "v", euler_steps=25)
DDPM_EPS = ODE("ddpm", "eps", euler_steps=25)
ODES = [FLOW, DDPM_V, DDPM_EPS]


def mixing(noise_path, timestep):
    """(α, σ) at the timestep that a network is given, without teacher.py."""
    if noise_path == "flow":
        return 1 - timestep / 1000, timestep / 1000
    return math.sqrt(ALPHA_BAR[int(timestep)]), math.sqrt(1 - ALPHA_BAR[int(timestep)])


class Network(torch.nn.Module):
    """A network that predicts a function of (x, timesteps, y), with x (b, 1, c, h, w), and
    remembers what it was given."""

    null_class = 7

    def __init__(self, predict):
        super().__init__()
        self.predict, self.given = predict, []

    def forward(self, x, timesteps, y):
        assert x.ndim == 5 and x.shape[1] == 1 and y.shape == (len(x),)
        assert timesteps.shape in ((1,), (len(x), 1))
        self.given.append((x, timesteps, y))
        return self.predict(x, timesteps, y)


# ---- the solver ----------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.3


def perfect(ode: ODE) -> Network:
    """The perfect network for images N(MEAN, SPREAD²): x_0, ε and x_t are jointly Gaussian, so that
    E[x_0 | x_t] and E[ε | x_t] are linear regressions, of slope covariance / variance."""

    def predict(x, timesteps, y):
        alpha, sigma = mixing(ode.noise_path, timesteps.item())
        deviation = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
        x0, eps = MEAN + alpha * SPREAD**2 * deviation, sigma * deviation
        return eps - x0 if ode.predicts == "v" else eps

    return Network(predict)


def distance_to_the_solution(ode: ODE, euler_steps: int) -> float:
    """Along the ODE the distribution stays N(α·MEAN, α²·SPREAD² + σ²), and in one dimension a flow
    that carries one Gaussian to another keeps (x − mean) / deviation. At the end, α = 1 and σ = 0,
    that is (x_0 − MEAN) / SPREAD."""
    torch.manual_seed(0)
    x_T, y = torch.randn(16, 1, 2, 2), torch.zeros(16).long()
    alpha, sigma = mixing(ode.noise_path, {"flow": 1000, "ddpm": 999}[ode.noise_path])
    deviation = math.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    exact = MEAN + SPREAD * (x_T - alpha * MEAN) / deviation
    states, _ = solve(perfect(ode), replace(ode, euler_steps=euler_steps), x_T, y)
    return (states[:, -1] - exact).abs().mean().item()


def test_euler_converges_to_the_exact_solution_at_first_order():
    errors = [distance_to_the_solution(FLOW, euler_steps) for euler_steps in (16, 32, 64, 128)]
    assert errors[-1] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.8 < coarse / fine < 2.2  # twice the steps, half the error


@pytest.mark.parametrize("ode", [DDPM_V, DDPM_EPS])
def test_the_same_on_the_ddpm_path(ode):
    few, many = (distance_to_the_solution(ode, euler_steps) for euler_steps in (25, 250))
    assert many < 0.01 and many < few / 4


def test_an_euler_step_of_flow_matching_follows_the_velocity():
    torch.manual_seed(0)
    x, v = torch.randn(2, 5, 3, 4, 4)
    for t, t_next in [(1.0, 0.75), (0.5, 0.1), (0.3, 0.0), (0.2, 0.6)]:
        found = euler_step(FLOW, v, x, t, t_next)
        torch.testing.assert_close(found, x + (t_next - t) * v, rtol=1e-5, atol=1e-5)


def test_twenty_five_ddpm_steps_are_ddim():
    def predict(x, timesteps, y):
        return torch.sin(3 * x + timesteps / 100)

    torch.manual_seed(0)
    x_T = torch.randn(4, 1, 2, 2)
    network = Network(predict)
    states, x0 = solve(network, DDPM_EPS, x_T, torch.zeros(4).long())

    times = [round(k * 41.625) for k in range(25)][::-1]  # Python rounds halves to even
    assert {166, 500, 832} < set(times)  # 166.5, 499.5 and 832.5
    assert [timesteps.item() for _, timesteps, _ in network.given] == times
    assert DDPM().times(25).tolist() == [*times, -1]

    x = x_T.double()[:, None]
    ends = [*ALPHA_BAR[times[1:]], 1.0]  # the last step goes to ᾱ = 1
    for t, after in zip(times, ends, strict=True):
        before, eps = ALPHA_BAR[t], predict(x, t, None)
        image = (x - math.sqrt(1 - before) * eps) / math.sqrt(before)
        x = math.sqrt(after) * image + math.sqrt(1 - after) * eps
    assert x.std() > 0.1
    torch.testing.assert_close(states[:, -1], x[:, 0].float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states[:, -1], x0[:, -1])  # without noise, the two are the same


def test_kept_states_and_the_x0_predictions_that_led_to_them():
    torch.manual_seed(0)
    x_T, y = torch.randn(3, 1, 2, 2), torch.zeros(3).long()
    assert NOISE_PATHS["flow"].times(6).tolist() == pytest.approx([k / 6 for k in range(6, -1, -1)])
    states, x0 = solve(perfect(FLOW), FLOW, x_T, y)
    assert states.shape == (3, 7, 1, 2, 2) and x0.shape == (3, 6, 1, 2, 2)
    assert torch.equal(states[:, 0], x_T)
    for step in range(6):  # a straight line through two states meets t = 0 at x̂_0
        t, t_next = 1 - step / 6, 1 - (step + 1) / 6
        meets = (t * states[:, step + 1] - t_next * states[:, step]) / (t - t_next)
        torch.testing.assert_close(x0[:, step], meets, rtol=1e-4, atol=1e-4)
    kept_states, kept_x0 = solve(perfect(FLOW), FLOW, x_T, y, keep=[2, 5, 6])
    assert torch.equal(kept_states, states[:, [0, 2, 5, 6]])
    assert torch.equal(kept_x0, x0[:, [1, 4, 5]])


# ---- noise paths and predictions -----------------------------------------------------------------


def test_the_ddpm_path_is_the_usual_one():
    path, t = DDPM(), torch.arange(1000)
    alpha, sigma = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    np.testing.assert_allclose(alpha.double().numpy() ** 2, ALPHA_BAR, rtol=1e-6)
    assert (path.alpha(path.t_image), path.sigma(path.t_image)) == (1, 0)


@pytest.mark.parametrize("ode", ODES)
def test_the_exact_prediction_gives_back_image_and_noise(ode):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 3, 2, 2)  # (b, s, c, h, w) each
    times = torch.tensor([0.9, 0.5, 0.1] if ode.noise_path == "flow" else [999.0, 500.0, 0.0])
    timesteps = 1000 * times if ode.noise_path == "flow" else times
    pairs = torch.tensor([mixing(ode.noise_path, t.item()) for t in timesteps])
    alpha, sigma = pairs.T.view(2, 3, 1, 1, 1)
    output = eps - x0 if ode.predicts == "v" else eps
    for t in (times, times.expand(4, -1)):  # (s,), or (b, s)
        found = estimate(ode, output, alpha * x0 + sigma * eps, t)
        # At t = 999, rounding errors grow by 1/α = 157.
        torch.testing.assert_close(found, (x0, eps), rtol=1e-3, atol=1e-3)


def test_pure_noise_needs_no_division_by_alpha():
    x0, eps = torch.randn(2, 4, 3, 2, 2)
    torch.testing.assert_close(estimate(FLOW, eps - x0, eps, 1.0), (x0, eps))
    with pytest.raises(UserError, match="use --predicts v, or --noise-path ddpm"):
        check_ode(replace(FLOW, predicts="eps"))
    for ode in ODES:
        check_ode(ode)


def test_guidance_moves_away_from_the_prediction_without_label():
    network = Network(lambda x, t, y: x * y.view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1))
    x, timestep, y = torch.randn(3, 1, 2, 2), torch.tensor(5.0), torch.tensor([0, 1, 2])
    cond, uncond = x * y.view(-1, 1, 1, 1) + 5, x * 7 + 5
    found = guided_output(network, replace(FLOW, guidance_scale=2.5), x, timestep, y)
    torch.testing.assert_close(found, uncond + 2.5 * (cond - uncond))
    assert [len(x) for x, _, _ in network.given] == [6]  # both in one batch

    network.given.clear()
    torch.testing.assert_close(guided_output(network, FLOW, x, timestep, y), cond)
    assert [len(x) for x, _, _ in network.given] == [3]  # without guidance, half the work


def test_guidance_of_some_channels_leaves_the_others_conditional():
    predictions = {0: 1.0, 7: 3.0}  # with a label, and with the null class

    def predict(x, timesteps, y):
        return torch.stack([torch.full((1, 4, 2, 2), predictions[label]) for label in y.tolist()])

    ode = replace(DDPM_EPS, guidance_scale=1.5, guided_channels=3)
    label = torch.tensor([0])
    output = guided_output(Network(predict), ode, torch.zeros(1, 4, 2, 2), torch.tensor(5.0), label)
    assert output[0, :, 0, 0].tolist() == [0.0, 0.0, 0.0, 1.0]  # 3 + 1.5·(1 − 3), three times


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ode", ODES)
def test_the_loss_of_perfect_and_of_wrong_predictions(ode):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 4, 3, 2, 2)
    flow = ode.noise_path == "flow"
    t = torch.tensor([0.9, 0.5, 0.25, 0.1] if flow else [999.0, 500.0, 30.0, 0.0])
    y = torch.tensor([0, 1, 2, 7])
    target = (noise - images if ode.predicts == "v" else noise)[:, None]

    network = Network(lambda x, timesteps, y: target)
    assert teacher_loss(network, ode, images, y, t, noise) == 0
    [(x, timesteps, labels)] = network.given
    assert torch.equal(labels, y)
    torch.testing.assert_close(timesteps[:, 0], 1000 * t if flow else t)
    for i in range(4):
        alpha, sigma = mixing(ode.noise_path, timesteps[i].item())
        torch.testing.assert_close(x[i, 0], alpha * images[i] + sigma * noise[i])
    network = Network(lambda x, timesteps, y: target + 3)
    assert teacher_loss(network, ode, images, y, t, noise).item() == pytest.approx(9)


@pytest.mark.parametrize("name", NOISE_PATHS)
def test_training_times_lie_on_the_path(name):
    t = NOISE_PATHS[name].draw_times(2000, np.random.default_rng(0), 0.0)
    if name == "ddpm":  # uniform over the integers
        assert torch.equal(t, t.round()) and t.min() >= 0 and t.max() <= 999
        assert abs(t.mean() - 499.5) < 30
    else:  # log(t / (1 − t)) is a standard normal number
        normal = torch.log(t / (1 - t))
        assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1


@pytest.fixture
def batches(monkeypatch, tmp_path):
    """What train_teacher hands to train(): a function from the iteration to its batch."""
    handed = {}

    def train(kind, model, loss_of, batch_at, *more):
        handed.update(batch_at=batch_at)
        return model, []

    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    dataset = Dataset(images, np.arange(50) % 5, TEACHER.classes)
    monkeypatch.setattr(teacher, "train", train)
    monkeypatch.setattr(teacher.data, "load", lambda config: dataset)
    preset = replace(PRESETS["shapes"], data=TEACHER.data)
    train_teacher(preset, tmp_path / "teacher.pt", CPU)
    return handed["batch_at"]


def test_a_tenth_of_the_labels_is_dropped_for_guidance(batches):
    labels = torch.cat([batches(iteration)[1] for iteration in range(20)])
    assert labels.max() == 5  # the null class: there are five classes
    assert 0.08 < (labels == 5).float().mean() < 0.12


def test_a_batch_is_a_function_of_the_iteration(batches):
    for first, again in zip(batches(3), batches(3), strict=True):
        assert torch.equal(first, again)
    for one, other in zip(batches(3), batches(4), strict=True):
        assert not torch.equal(one, other)


def test_other_images_of_the_same_number_are_another_training(tmp_path):
    """Someone has put other pictures into the folder, under the same names."""
    write_images(tmp_path / "images", each=20)
    data = DataConfig(str(tmp_path / "images"), image_size=8, channels=3)
    training = replace(TEACHER.training, iterations=2)
    preset = replace(PRESETS["cifar10"], data=data, size="N/4", teacher=training)
    train_teacher(preset, tmp_path / "teacher.pt", CPU)
    train_teacher(preset, tmp_path / "teacher.pt", CPU)  # it is finished
    for file in (tmp_path / "images" / "dog").iterdir():
        Image.new("RGB", (8, 8), "red").save(file)
    with pytest.raises(UserError, match="holds another training: content is"):
        train_teacher(preset, tmp_path / "teacher.pt", CPU)


def test_names_of_sizes_are_checked_before_the_work():
    assert teacher.model_size("XS/7") == "XS/7"
    with pytest.raises(argparse.ArgumentTypeError, match="no model size 'Q/1': write SIZE/PATCH"):
        teacher.model_size("Q/1")
