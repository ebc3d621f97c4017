"""The noise paths, the solver and the trajectories, against formulas that can be checked on paper. The best test of an
ODE solver is an ODE whose solution is known: when the images are Gaussian, N(MU, SPREAD²) for every pixel, the perfect
network is a linear function of x_t, and the ODE carries x_T to an image by one affine map. So the "networks" here are
mostly a few lines that say exactly what a perfect one would. Only trajectories on disk are written with a real (tiny,
random) DiT; they are compared with the states that the solver passes in memory."""

import math
import multiprocessing
import time

import numpy as np
import pytest
import torch

import data
from model import DiT
from teacher import (
    DDPM,
    MARKS,
    PATHS,
    FlowMatching,
    estimate,
    euler,
    guided,
    solve,
    teacher_loss,
    write_trajectories,
)
from training import Fault, fingerprint

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # ᾱ as everybody computes it, without the clean end
PREDICTIONS = ("v", "eps", "x0")


def mixing(path, t):
    """(α, σ) at the time that the network is told, independently of teacher.py."""
    if path == "flow":
        return 1 - t / 1000, t / 1000
    return math.sqrt(ALPHAS_CUMPROD[int(t)]), math.sqrt(1 - ALPHAS_CUMPROD[int(t)])


class Network(torch.nn.Module):
    """A network that answers with a function of (x, t, y), x (b, 1, c, h, w), and remembers what it was asked."""
    null_class = 7

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x, t, y):
        assert x.ndim == 5 and x.shape[1] == 1 and t.shape in ((1,), (len(x), 1)) and y.shape == (len(x),)
        self.asked.append((x, t, y))
        return self.answer(x, t, y)


# ---- the solver -----------------------------------------------------------------------------------------------------

MU, SPREAD = 0.7, 0.3


def perfect(path, predicts):
    """The perfect network for images N(MU, SPREAD²): x_0, ε and x_t are jointly Gaussian, so E[x_0 | x_t] and
    E[ε | x_t] are linear regressions, each with slope covariance / variance."""
    def answer(x, t, y):
        alpha, sigma = mixing(path, t.item())
        surprise = (x - alpha * MU) / (alpha**2 * SPREAD**2 + sigma**2)
        x0, eps = MU + alpha * SPREAD**2 * surprise, sigma * surprise
        return {"v": eps - x0, "eps": eps, "x0": x0}[predicts]

    return Network(answer)


def distance_to_the_solution(path, predicts, steps):
    """Along the ODE the distribution stays N(α·MU, α²·SPREAD² + σ²), and in one dimension a flow that carries one
    Gaussian to another keeps (x − mean) / deviation. At the end, α = 1 and σ = 0, that is (x_0 − MU) / SPREAD."""
    torch.manual_seed(0)
    x_T, y = torch.randn(16, 1, 2, 2), torch.zeros(16).long()
    alpha, sigma = mixing(path, {"flow": 1000, "ddpm": 999}[path])
    exact = MU + SPREAD * (x_T - alpha * MU) / math.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    about = dict(path=path, predicts=predicts, guidance=1.0, steps=steps)
    _, states, _ = solve(perfect(path, predicts), about, x_T, y)
    return (states[:, -1] - exact).abs().mean().item()


@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_euler_converges_to_the_exact_solution_at_first_order(predicts):
    errors = [distance_to_the_solution("flow", predicts, steps) for steps in (16, 32, 64, 128)]
    assert errors[-1] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.8 < coarse / fine < 2.2  # twice the steps, half the error


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_same_on_the_ddpm_path(predicts):
    few, many = (distance_to_the_solution("ddpm", predicts, steps) for steps in (25, 250))
    assert many < 0.01 and many < few / 4


def test_one_step_on_the_flow_path_follows_the_velocity():
    torch.manual_seed(0)
    path = FlowMatching()
    x, v = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    for t, t_next in [(1.0, 0.75), (0.5, 0.1), (0.3, 0.0), (0.2, 0.6)]:
        step = euler(path, *estimate(path, "v", v, x, t), t_next)
        torch.testing.assert_close(step, x + (t_next - t) * v, rtol=1e-5, atol=1e-5)


def test_twenty_five_ddpm_steps_are_ddim():
    def answer(x, t, y):
        return torch.sin(3 * x + t / 100)

    torch.manual_seed(0)
    x_T = torch.randn(4, 1, 2, 2)
    network = Network(answer)
    times, states, clean = solve(network, dict(path="ddpm", predicts="eps", guidance=1.0, steps=25), x_T,
                                 torch.zeros(4).long())

    expected = [round(k * 41.625) for k in range(25)][::-1]  # Python rounds halves to even
    assert {166, 500, 832} < set(expected)  # 166.5, 499.5 and 832.5
    assert [t.item() for _, t, _ in network.asked] == expected
    assert times.tolist() == [*expected, -1]

    x = x_T.double()[:, None]
    for t, t_next in zip(expected, [*expected[1:], None], strict=True):
        now, then = ALPHAS_CUMPROD[t], 1.0 if t_next is None else ALPHAS_CUMPROD[t_next]  # the last goes to ᾱ = 1
        eps = answer(x, t, None)
        x = math.sqrt(then) * (x - math.sqrt(1 - now) * eps) / math.sqrt(now) + math.sqrt(1 - then) * eps
    assert x.std() > 0.1
    torch.testing.assert_close(states[:, -1], x[:, 0].float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states[:, -1], clean[:, -1])  # without noise, the state is the clean prediction


def test_marks_choose_states_and_the_clean_predictions_that_made_them():
    torch.manual_seed(0)
    x_T, y = torch.randn(3, 1, 2, 2), torch.zeros(3).long()
    about = dict(path="flow", predicts="v", guidance=1.0, steps=6)
    times, states, clean = solve(perfect("flow", "v"), about, x_T, y)
    assert times.tolist() == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert states.shape[:2] == (3, 7) and clean.shape[:2] == (3, 6)
    assert torch.equal(states[:, 0], x_T)
    some_times, some_states, some_clean = solve(perfect("flow", "v"), about, x_T, y, marks=[2, 5, 6])
    assert torch.equal(some_times, times[[0, 2, 5, 6]])
    assert torch.equal(some_states, states[:, [0, 2, 5, 6]])
    assert torch.equal(some_clean, clean[:, [1, 4, 5]])
    fewer = solve(perfect("flow", "v"), about, x_T, y, steps=2)[0]
    assert fewer.tolist() == [1, 0.5, 0]


# ---- paths and predictions ------------------------------------------------------------------------------------------

def test_ddpm_path_is_the_usual_one():
    path, t = DDPM(), torch.arange(1000)
    alpha, sigma = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    np.testing.assert_allclose(alpha.double().numpy() ** 2, ALPHAS_CUMPROD, rtol=1e-6)
    assert (path.alpha(path.clean), path.sigma(path.clean)) == (1, 0)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("path, times", [("flow", [0.9, 0.5, 0.1]), ("ddpm", [999, 500, 0])])
def test_the_exact_answer_gives_back_image_and_noise(path, times, predicts):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 3, 2, 2).unbind()  # (b, s, c, h, w) each
    told = [1000 * t if path == "flow" else t for t in times]
    alpha, sigma = (torch.tensor(v).view(-1, 1, 1, 1) for v in zip(*[mixing(path, t) for t in told], strict=True))
    output = {"v": eps - x0, "eps": eps, "x0": x0}[predicts]
    times = torch.tensor(times)
    for t in (times, times.expand(4, -1)):  # (s,), or (b, s)
        found = estimate(PATHS[path], predicts, output, alpha * x0 + sigma * eps, t)
        torch.testing.assert_close(found, (x0, eps), rtol=1e-3, atol=1e-3)  # at t = 999 errors grow by 1/α = 157


@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_pure_noise_needs_no_division_by_alpha(predicts):
    x0, eps = torch.randn(2, 4, 3, 2, 2).unbind()
    found = estimate(FlowMatching(), predicts, {"v": eps - x0, "x0": x0}[predicts], eps, 1.0)
    torch.testing.assert_close(found, (x0, eps))


def test_guidance_of_some_channels_leaves_the_others_conditional():
    answers = {0: 1.0, 7: 3.0}  # what the network says with a label, and with the null class
    network = Network(lambda x, t, y: torch.stack([torch.full((1, 4, 2, 2), answers[i]) for i in y.tolist()]))
    output = guided(network, torch.zeros(1, 4, 2, 2), torch.tensor(5.0), torch.tensor([0]), 1.5, channels=3)
    assert output[0, :, 0, 0].tolist() == [0.0, 0.0, 0.0, 1.0]  # 3 + 1.5·(1 − 3), three times


def test_guidance_moves_away_from_the_null_class():
    network = Network(lambda x, t, y: x * y.view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1))
    x, t, y = torch.randn(3, 1, 2, 2), torch.tensor(5.0), torch.tensor([0, 1, 2])
    cond, uncond = x * y.view(-1, 1, 1, 1) + 5, x * 7 + 5
    torch.testing.assert_close(guided(network, x, t, y, 2.5), uncond + 2.5 * (cond - uncond))
    assert [len(asked[0]) for asked in network.asked] == [6]  # both in one batch

    network.asked.clear()
    torch.testing.assert_close(guided(network, x, t, y, 1.0), cond)
    assert [len(asked[0]) for asked in network.asked] == [3]  # without guidance, half the work


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_teacher_loss_of_perfect_and_of_wrong_answers(path, predicts):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 4, 3, 2, 2).unbind()
    t = torch.tensor([0.9, 0.5, 0.25, 0.1]) if path == "flow" else torch.tensor([999.0, 500.0, 30.0, 0.0])
    y, dropped = torch.tensor([0, 1, 2, 3]), torch.tensor([False, True, False, True])
    target = {"v": noise - images, "eps": noise, "x0": images}[predicts][:, None]
    about = dict(path=path, predicts=predicts, model=dict(classes=7))

    network = Network(lambda x, t, y: target)
    assert teacher_loss(network, about, images, y, t, noise, dropped) == 0
    x, told, labels = network.asked[0]
    assert labels.tolist() == [0, 7, 2, 7]  # where dropped, the null class
    torch.testing.assert_close(told[:, 0], 1000 * t if path == "flow" else t)
    for i in range(4):
        alpha, sigma = mixing(path, told[i].item())
        torch.testing.assert_close(x[i, 0], alpha * images[i] + sigma * noise[i])
    assert teacher_loss(Network(lambda x, t, y: target + 3), about, images, y, t, noise, dropped).item() \
        == pytest.approx(9)


# ---- noise and labels -----------------------------------------------------------------------------------------------

ABOUT = dict(model=dict(image_size=4, channels=1, classes=3, patch=2, width=16, depth=2, heads=2),
             path="flow", predicts="v", guidance=2.0, steps=16)


def test_sample_i_is_the_same_in_any_batch():
    noise, labels = data.noise_and_labels(ABOUT, 5, range(600))
    some, some_labels = data.noise_and_labels(ABOUT, 5, [7, 123, 7])
    assert torch.equal(some, noise[[7, 123, 7]]) and torch.equal(some_labels, labels[[7, 123, 7]])
    assert not torch.equal(data.noise_and_labels(ABOUT, 6, range(600))[0], noise)
    assert len({tuple(x.flatten().tolist()) for x in noise}) == 600  # no two alike

    assert noise.shape == (600, 1, 4, 4) and noise.dtype == torch.float32
    assert torch.equal(noise.half().float(), noise)  # what is on disk is what was used
    assert abs(noise.mean()) < 0.05 and abs(noise.var() - 1) < 0.06  # four deviations of 9,600 normal numbers
    assert all(140 < count < 260 for count in labels.bincount(minlength=3)) and labels.max() == 2


# ---- trajectories on disk -------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def tiny_teacher(seed=0):
    torch.manual_seed(seed)
    model = DiT(**ABOUT["model"]).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.15)
    return model


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(teacher, folder): 20 trajectories asked for, in shards of 8, so 24 written."""
    monkeypatch.setattr(data, "SHARD", 8)
    teacher, folder = tiny_teacher(), tmp_path / "trajectories"
    write_trajectories(teacher, ABOUT, folder, 20, CPU, seed=3)
    return teacher, folder


def by_hand(teacher, count=24):
    """Noise, labels and all 17 states from T to 0, in one batch."""
    x_T, y = data.noise_and_labels(ABOUT, 3, range(count))
    states = solve(teacher, ABOUT, x_T, y)[1]
    assert (states[:, -1] - x_T).std() > 0.1  # the random teacher does move things
    return x_T, y, states


def close_in_half(stored, exact):
    """Equal to float16 rounding, 2⁻¹¹ of the value (and a float32 sum's error besides)."""
    torch.testing.assert_close(stored, exact, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("S", [1, 2, 4, 8])
def test_stored_states_are_the_solver_s(written, S):
    teacher, folder = written
    x_T, y, states = by_hand(teacher)
    trajectories = data.Trajectories(folder, fingerprint(teacher.state_dict()), S)
    x, labels = trajectories.batch(range(24))
    steps = [i * 16 // S for i in range(S + 1)]
    assert len(trajectories) == 24 and x.shape == (24, S + 1, 1, 4, 4)
    assert trajectories.times == [1 - step / 16 for step in steps]
    assert torch.equal(x[:, 0], x_T) and torch.equal(labels, y)
    close_in_half(x, states[:, steps])
    some, _ = trajectories.batch(np.array([23, 8, 0]))
    assert torch.equal(some, x[[23, 8, 0]])


def test_stored_clean_predictions_are_where_the_steps_aimed(written):
    teacher, folder = written
    x_T, y, states = by_hand(teacher)
    name = fingerprint(teacher.state_dict())
    x, labels = data.Trajectories(folder, name, 4, kind="clean").batch(range(24))
    assert x.shape == (24, 5, 1, 4, 4) and torch.equal(labels, y)
    assert torch.equal(x[:, 0], x_T)
    for mark, clean in zip((4, 8, 12, 16), x[:, 1:].unbind(1), strict=True):
        before, after = 1 - (mark - 1) / 16, 1 - mark / 16  # a straight line through two states meets t = 0 there
        aim = (before * states[:, mark] - after * states[:, mark - 1]) / (before - after)
        torch.testing.assert_close(clean, aim, rtol=2**-11, atol=1e-3)
    assert torch.equal(x[:, -1], data.Trajectories(folder, name, 4).batch(range(24))[0][:, -1])
    assert (x[:, 1] - x[:, -1]).std() > 0.01  # earlier ones are guesses


@pytest.mark.parametrize("kind, other", [("states", "clean"), ("clean", "states")])
def test_marks_and_what_is_kept_can_be_chosen(written, tmp_path, kind, other):
    teacher, folder = written
    name, some = fingerprint(teacher.state_dict()), tmp_path / kind
    write_trajectories(teacher, ABOUT, some, 24, CPU, seed=3, marks=[4, 6, 16], keep=kind)
    x, _ = data.Trajectories(some, name, 3, kind=kind).batch(range(24))
    whole, _ = data.Trajectories(folder, name, 8, kind=kind).batch(range(24))  # every second step
    assert torch.equal(x, whole[:, [0, 2, 3, 8]])
    assert (some / "00000.npy").stat().st_size < 0.6 * (folder / "00000.npy").stat().st_size
    with pytest.raises(Fault, match=f"keeps the {kind} alone"):
        data.Trajectories(some, name, 3, kind=other)
    for marks in ([4, 17], [6, 4, 16], [4, 6]):
        with pytest.raises(Fault, match="marks are rising numbers"):
            write_trajectories(teacher, ABOUT, tmp_path / "bad", 8, CPU, marks=marks)


def test_two_parts_make_the_whole(written, tmp_path):
    teacher, folder = written
    for part in ((1, 2), (0, 2)):
        write_trajectories(teacher, ABOUT, tmp_path / "shared", 24, CPU, seed=3, part=part)
    for shard in sorted(folder.glob("*.npy")):
        assert (tmp_path / "shared" / shard.name).read_bytes() == shard.read_bytes()


def test_count_limits_what_is_used(written):
    teacher, folder = written
    assert len(data.Trajectories(folder, fingerprint(teacher.state_dict()), 4, count=10)) == 10


@pytest.mark.parametrize("damage", [
    lambda shard: shard[:len(shard) // 2], lambda shard: shard + shard, lambda shard: b"",  # a wrong length
    lambda shard: bytes(40) + shard[40:], lambda shard: shard[:40] + bytes(len(shard) - 40),  # a wrong header
    lambda shard: b"PK\x03\x04" + shard[4:], lambda shard: shard.replace(b"<f2", b"<i2", 1),
])
def test_a_damaged_shard_is_written_again_and_others_are_left_alone(written, damage, capsys):
    teacher, folder = written
    shards = sorted(folder.glob("*.npy"))
    assert len(shards) == 3
    contents, written_at = [f.read_bytes() for f in shards], [f.stat().st_mtime_ns for f in shards]
    shards[1].write_bytes(damage(contents[1]))
    write_trajectories(teacher, ABOUT, folder, 24, CPU, seed=3)
    said = capsys.readouterr().out
    assert f"{shards[1]} is damaged: writing it again\nwriting 1 of 3 shards of 8, into {folder}" in said
    assert [f.read_bytes() for f in shards] == contents
    assert [shards[i].stat().st_mtime_ns for i in (0, 2)] == [written_at[i] for i in (0, 2)]
    assert sorted(f.name for f in folder.iterdir()) == ["00000.npy", "00001.npy", "00002.npy", "meta.json"]


def test_a_writer_killed_ten_times_writes_what_an_undisturbed_one_does(tmp_path, monkeypatch):
    """SIGKILL at a random moment, ten times: at most the shard in flight is lost."""
    monkeypatch.setattr(data, "SHARD", 8)
    teacher, threads, random = tiny_teacher(), torch.get_num_threads(), np.random.default_rng(0)
    torch.set_num_threads(1)  # in processes that are forked, one thread alone works
    began = time.time()
    write_trajectories(teacher, ABOUT, tmp_path / "whole", 160, CPU)
    whole, folder, there = time.time() - began, tmp_path / "killed", [0]
    for _ in range(10):
        before = {f: f.read_bytes() for f in folder.glob("[0-9]*.npy")}
        writer = multiprocessing.get_context("fork").Process(
            target=write_trajectories, args=(teacher, ABOUT, folder, 160, CPU))
        writer.start()
        writer.join(whole * random.uniform(0.05, 0.3))
        writer.kill()
        writer.join()
        assert all(f.read_bytes() == content for f, content in before.items())
        there.append(len(list(folder.glob("[0-9]*.npy"))))
    write_trajectories(teacher, ABOUT, folder, 160, CPU)
    torch.set_num_threads(threads)
    assert there == sorted(there) and 0 < there[-1]
    assert [(folder / f"{i:05d}.npy").read_bytes() for i in range(20)] == \
           [(tmp_path / f"whole/{i:05d}.npy").read_bytes() for i in range(20)]


def test_more_trajectories_are_added_to_those_there(written):
    teacher, folder = written
    first = (folder / "00000.npy").stat().st_mtime_ns
    write_trajectories(teacher, ABOUT, folder, 25, CPU, seed=3)
    assert (folder / "00000.npy").stat().st_mtime_ns == first and len(list(folder.glob("*.npy"))) == 4


@pytest.mark.parametrize("other", [dict(guidance=3.0), dict(steps=8), dict(path="ddpm")])
def test_a_folder_takes_one_kind_of_trajectory(written, other):
    teacher, folder = written
    with pytest.raises(Fault, match="other trajectories"):
        write_trajectories(teacher, ABOUT | other, folder, 24, CPU, seed=3)


def test_what_cannot_be_read_is_a_fault(written, tmp_path):
    teacher, folder = written
    name, stranger = fingerprint(teacher.state_dict()), tiny_teacher(seed=1)
    with pytest.raises(Fault, match="another teacher"):
        data.Trajectories(folder, fingerprint(stranger.state_dict()), 4)
    with pytest.raises(Fault, match="teacher"):
        write_trajectories(stranger, ABOUT, folder, 24, CPU, seed=3)
    with pytest.raises(Fault, match="3 steps: choose --steps from 1, 2, 4, 8"):
        data.Trajectories(folder, name, 3)
    with pytest.raises(Fault, match="no trajectories"):
        data.Trajectories(tmp_path / "nowhere", name, 4)
    with pytest.raises(Fault, match=f"multiple of {MARKS}"):
        write_trajectories(teacher, ABOUT | dict(steps=12), tmp_path / "twelve", 8, CPU)
    for shard in folder.glob("*.npy"):
        shard.unlink()
    with pytest.raises(Fault, match="holds 0 whole trajectories"):
        data.Trajectories(folder, name, 4)
