"""Trajectories on disk, compared with the states that the solver passes in memory. The teacher is a
tiny DiT with random weights."""

import json
import multiprocessing
import re
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_pretrained import public_weights
from tiny import CPU, SETTINGS, TEACHER, random_dit, write_teacher

import data
import pretrained
import trajectories
from config import ODE, TrajectorySettings, evenly
from files import UserError, fingerprint
from teacher import solve
from trajectories import (
    Trajectories,
    choose_targets,
    describe,
    open_trajectories,
    scale_steps,
    write_trajectories,
)

RECORD = replace(TEACHER, ode=ODE("flow", "v", euler_steps=16, guidance_scale=2.0))
KEPT = TrajectorySettings(count=24, kept_steps=evenly(16, 8))
SEED = 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(trajectories, "SHARD", 8)


@pytest.fixture(scope="module")
def teacher():
    return random_dit().eval()


def write(teacher, folder, count=24, record=RECORD, settings=KEPT, seed=SEED, worker=(0, 1)):
    """Returns the trajectories' own record."""
    own = describe(teacher, record, settings, seed)
    write_trajectories(teacher, record, own, folder, count, CPU, worker)
    return own


def with_ode(**changes):
    return replace(RECORD, ode=replace(RECORD.ode, **changes))


def student(steps: int, targets="states"):
    return replace(SETTINGS, steps=steps, targets=targets)


def by_hand(teacher, count=24):
    """Noise, labels and all 17 states from noise to image, in one batch."""
    x_T, y = data.noise_and_labels(RECORD, SEED, range(count))
    states, _ = solve(teacher, RECORD.ode, x_T, y)
    assert (states[:, -1] - x_T).std() > 0.1  # the random teacher does move things
    return x_T, y, states


def assert_close_in_half(stored, exact, atol=1e-4):
    """Equal up to rounding to float16, 2⁻¹¹ of the value (and the error of a float32 sum)."""
    torch.testing.assert_close(stored, exact, rtol=2**-11, atol=atol)


def shards_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}


# ---- What is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_stored_states_are_the_solver_s(teacher, tmp_path, steps):
    own = write(teacher, tmp_path, count=20)  # rounded up to three shards
    x_T, y, states = by_hand(teacher)
    stored = Trajectories(tmp_path, own, student(steps), 24)
    x, labels = stored.batch(range(24))
    taken = [16 * i // steps for i in range(steps + 1)]
    assert len(stored) == 24 and x.shape == (24, steps + 1, 3, 8, 8) and x.dtype == torch.float32
    assert stored.target_steps == tuple(taken[1:])
    assert (stored.ode, stored.seed) == (RECORD.ode, SEED)
    assert torch.equal(x[:, 0], x_T) and torch.equal(labels, y)
    assert_close_in_half(x, states[:, taken])
    some, _ = stored.batch(np.array([23, 8, 0]))
    assert torch.equal(some, x[[23, 8, 0]])
    assert len(Trajectories(tmp_path, own, student(steps), 10)) == 10


def test_stored_x0_predictions_are_where_the_steps_aimed(teacher, tmp_path):
    own = write(teacher, tmp_path)
    x_T, y, states = by_hand(teacher)
    x, labels = Trajectories(tmp_path, own, student(4, "x0"), 24).batch(range(24))
    assert x.shape == (24, 5, 3, 8, 8)
    assert torch.equal(x[:, 0], x_T) and torch.equal(labels, y)
    for step, x0 in zip((4, 8, 12, 16), x[:, 1:].unbind(1), strict=True):
        before, after = 1 - (step - 1) / 16, 1 - step / 16  # times of flow matching
        # The straight line through two states reaches the time 0 there.
        aim = (before * states[:, step] - after * states[:, step - 1]) / (before - after)
        assert_close_in_half(x0, aim, atol=1e-3)
    images = Trajectories(tmp_path, own, student(4), 24).batch(range(24))[0][:, -1]
    assert torch.equal(x[:, -1], images)
    assert (x[:, 1] - x[:, -1]).std() > 0.01  # earlier ones are guesses


@pytest.mark.parametrize("keep, other", [("states", "x0"), ("x0", "states")])
def test_what_is_kept_can_be_chosen(teacher, tmp_path, keep, other):
    own = write(teacher, tmp_path / "whole")
    some = TrajectorySettings(count=24, kept_steps=(4, 6, 16), keep=keep)
    own_some = write(teacher, tmp_path / "some", settings=some)
    some = Trajectories(tmp_path / "some", own_some, student(3, keep), 24)
    whole = Trajectories(tmp_path / "whole", own, student(8, keep), 24)
    x, whole = (found.batch(range(24))[0] for found in (some, whole))
    assert torch.equal(x, whole[:, [0, 2, 3, 8]])  # after 0, 4, 6 and 16 of 2, 4, …, 16 steps
    size = (tmp_path / "some" / "00000.npy").stat().st_size
    size_of_whole = (tmp_path / "whole" / "00000.npy").stat().st_size
    assert size / size_of_whole == pytest.approx(4 / 17, rel=0.02)  # states of a trajectory
    with pytest.raises(UserError, match=f"only the {keep} are kept: use --targets {keep}, or"):
        Trajectories(tmp_path / "some", own_some, student(3, other), 24)


def test_noise_is_rounded_before_the_ode_is_solved(teacher, tmp_path, monkeypatch):
    noises = []

    def spy(model, ode, x_T, y, keep):
        noises.append(x_T)
        return solve(model, ode, x_T, y, keep)

    monkeypatch.setattr(trajectories, "solve", spy)
    own = write(teacher, tmp_path)
    x, _ = Trajectories(tmp_path, own, student(1), 24).batch(range(24))
    assert torch.equal(torch.cat(noises), x[:, 0])


def test_meta_says_what_the_trajectories_are(teacher, tmp_path):
    record = replace(RECORD, class_weights=(0.5, 0.125, 0.125, 0.125, 0.125))
    own = write(teacher, tmp_path, record=record)
    assert json.loads((tmp_path / "meta.json").read_text()) == dict(
        teacher=fingerprint(teacher.state_dict()),
        ode=asdict(RECORD.ode),
        kept_steps=[2, 4, 6, 8, 10, 12, 14, 16],
        keep="both",
        shape=[3, 8, 8],
        class_weights=[0.5, 0.125, 0.125, 0.125, 0.125],
        seed=3,
    )
    _, labels = Trajectories(tmp_path, own, student(1), 24).batch(range(24))
    assert labels.tolist() == data.noise_and_labels(record, SEED, range(24))[1].tolist()
    assert labels.tolist() != data.noise_and_labels(RECORD, SEED, range(24))[1].tolist()


# ---- Writers -------------------------------------------------------------------------------------


def test_two_workers_write_what_one_does(teacher, tmp_path):
    write(teacher, tmp_path / "one")
    write(teacher, tmp_path / "two", worker=(1, 2))
    assert list(shards_of(tmp_path / "two")) == ["00001.npy"]
    write(teacher, tmp_path / "two", worker=(0, 2))
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


def test_more_are_added_and_damaged_ones_replaced(teacher, tmp_path):
    write(teacher, tmp_path)
    before = shards_of(tmp_path)
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.npy")}
    (tmp_path / "00001.npy").write_bytes(before["00001.npy"][:-100])
    write(teacher, tmp_path, count=25)
    after = shards_of(tmp_path)
    assert len(before) == 3 and len(after) == 4 and before.items() <= after.items()
    for name in ("00000.npy", "00002.npy"):
        assert (tmp_path / name).stat().st_mtime_ns == written[name]
    assert {file.name for file in tmp_path.iterdir()} == {"meta.json", *after}


def test_a_writer_killed_ten_times_writes_what_an_undisturbed_one_does(teacher, tmp_path):
    """SIGKILL at a random moment, ten times: no more than the shard in flight is lost."""
    threads, random = torch.get_num_threads(), np.random.default_rng(0)
    torch.set_num_threads(1)  # after a fork, only one thread works
    began = time.time()
    write(teacher, tmp_path / "whole", count=160)
    seconds, folder, counts = time.time() - began, tmp_path / "killed", [0]
    for _ in range(10):
        before = shards_of(folder)
        fork = multiprocessing.get_context("fork")
        writer = fork.Process(target=write, args=(teacher, folder, 160))
        writer.start()
        writer.join(seconds * random.uniform(0.05, 0.3))
        writer.kill()
        writer.join()
        after = shards_of(folder)
        assert before.items() <= after.items()
        counts.append(len(after))
    write(teacher, folder, count=160)
    torch.set_num_threads(threads)
    assert counts == sorted(counts) and counts[-1] > 0
    assert shards_of(folder) == shards_of(tmp_path / "whole") and len(shards_of(folder)) == 20


def test_values_that_are_not_finite_are_refused(teacher, tmp_path):
    too_much = with_ode(guidance_scale=1e9)
    with pytest.raises(UserError, match="leads to infinite values"):
        write(teacher, tmp_path, record=too_much)
    assert not shards_of(tmp_path)


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(4, 17), (6, 4, 16), (4, 6), (4, 4, 16), (0, 16)])
def test_kept_steps_must_be_steps_of_the_ode(teacher, kept):
    with pytest.raises(UserError, match="must rise and end with 16, the ODE's last, but"):
        describe(teacher, RECORD, TrajectorySettings(8, kept))


def test_a_folder_takes_one_kind_of_trajectory(teacher, tmp_path):
    write(teacher, tmp_path)
    fewer = replace(KEPT, kept_steps=evenly(8, 8))
    changes = [
        (dict(record=with_ode(guidance_scale=3.0)), "guidance_scale is 2.0 there and 3.0 here"),
        (dict(record=with_ode(noise_path="ddpm")), "noise_path"),
        (dict(record=with_ode(euler_steps=8), settings=fewer), "euler_steps is 16 there and 8"),
        (dict(record=replace(RECORD, class_weights=(0.2,) * 5)), "class_weights"),
        (dict(settings=replace(KEPT, keep="x0")), "keep"),
        (dict(seed=4), "seed is 3 there and 4 here"),
    ]
    before = shards_of(tmp_path)
    for change, says in changes:
        with pytest.raises(UserError, match=says):
            write(teacher, tmp_path, **change)
    with pytest.raises(UserError, match="teacher"):
        write(random_dit(seed=1), tmp_path)
    assert shards_of(tmp_path) == before


def test_target_steps(teacher):
    own = describe(teacher, RECORD, KEPT, SEED)
    assert choose_targets(own, student(8)) == (2, 4, 6, 8, 10, 12, 14, 16)
    assert choose_targets(own, student(2)) == (8, 16)
    assert choose_targets(own, student(1)) == (16,)
    for steps in (3, 5, 16):
        with pytest.raises(UserError, match=f"{steps} steps: choose --steps from 1, 2, 4, 8"):
            choose_targets(own, student(steps))


# ---- open_trajectories ---------------------------------------------------------------------------


def open_folder(teacher, folder, record=RECORD, settings=KEPT, chosen=SETTINGS):
    return open_trajectories(teacher, record, settings, chosen, folder, CPU)


def test_trajectories_are_written_where_there_are_none(teacher, tmp_path, capsys):
    opened = open_folder(teacher, tmp_path / "new")
    assert (len(opened), opened.ode, opened.seed) == (24, RECORD.ode, 0)
    assert opened.target_steps == (4, 8, 12, 16)
    said = "learning from 24 trajectories in .*new: 16 Euler steps, guidance scale 2\n"
    assert re.search(said, capsys.readouterr().out)
    before = shards_of(tmp_path / "new")
    assert len(open_folder(teacher, tmp_path / "new", settings=replace(KEPT, count=30))) == 30
    assert len(before) == 3 and before.items() < shards_of(tmp_path / "new").items()


def test_trajectories_that_are_there_keep_their_own_ode(teacher, tmp_path):
    """Those of a user who chose another guidance, other steps and another seed."""
    ode = ODE("flow", "v", euler_steps=6, guidance_scale=1.0)
    settings = TrajectorySettings(count=8, kept_steps=(1, 2, 4, 6), keep="states")
    own = write(teacher, tmp_path / "own", 8, replace(RECORD, ode=ode), settings)
    opened = open_folder(teacher, tmp_path / "own")  # asks for 24, of 16 steps
    assert (opened.ode, opened.target_steps, opened.seed) == (ode, (1, 2, 4, 6), SEED)
    write(teacher, tmp_path / "all", 24, replace(RECORD, ode=ode), settings)
    assert shards_of(tmp_path / "own") == shards_of(tmp_path / "all")
    same, _ = Trajectories(tmp_path / "all", own, SETTINGS, 24).batch(range(24))
    assert torch.equal(opened.batch(range(24))[0], same)


def test_what_a_student_cannot_learn_is_refused_before_the_work(teacher, tmp_path, monkeypatch):
    write(teacher, tmp_path / "x0", settings=replace(KEPT, keep="x0"), count=8)

    def work(*words):
        raise AssertionError("there is work")

    monkeypatch.setattr(trajectories, "write_trajectories", work)
    for name in ("x0", "new"):
        with pytest.raises(UserError, match="3 steps: choose --steps from 1, 2, 4, 8"):
            open_folder(teacher, tmp_path / name, chosen=student(3, "x0"))
    with pytest.raises(UserError, match="only the x0 are kept"):
        open_folder(teacher, tmp_path / "x0")
    with pytest.raises(UserError, match="only the x0 are kept"):
        open_folder(teacher, tmp_path / "new", settings=replace(KEPT, keep="x0"))
    assert not (tmp_path / "new").exists()


def test_trajectories_of_others_are_refused(teacher, tmp_path):
    write(teacher, tmp_path / "mine", count=8)
    with pytest.raises(UserError, match="something else: teacher is .* there and"):
        open_folder(random_dit(seed=1), tmp_path / "mine")
    for content in ("{", '{"a": 1}', '{"teacher": 3}', '["ab"]'):
        (tmp_path / "mine" / "meta.json").write_text(content)
        with pytest.raises(UserError, match="mine/meta.json (is damaged|describes no traj)") as e:
            open_folder(teacher, tmp_path / "mine")
        assert "\n" not in str(e.value)


# ---- The program ---------------------------------------------------------------------------------


def run(monkeypatch, words: str):
    monkeypatch.setattr(sys, "argv", ["trajectories.py", *words.split()])
    trajectories.main()


def test_the_program_writes_what_its_flags_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_teacher("t.pt")
    flags = "--preset shapes --teacher t.pt --euler-steps 6 --no-bf16 --device cpu"
    more = "--count 16 --kept-steps 3 6 --keep x0 --guidance-scale 1.5 --seed 2 --worker 2/2"
    run(monkeypatch, f"{flags} {more}")
    folder = tmp_path / "runs/shapes/trajectories"
    assert list(shards_of(folder)) == ["00001.npy"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["ode"] == asdict(ODE("flow", "v", euler_steps=6, guidance_scale=1.5))
    assert (meta["kept_steps"], meta["keep"], meta["seed"]) == ([3, 6], "x0", 2)
    with pytest.raises(UserError, match="with 6, the ODE's last, but they are 3 6 9 12 15"):
        run(monkeypatch, flags)


def test_the_kind_of_a_published_teacher_can_be_given(monkeypatch, tmp_path):
    """One of random weights behaves like none, so that its kind is not recognised."""
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": public_weights()}, "public.pt")
    flags = "--preset imagenet256 --teacher public.pt --no-bf16 --device cpu --count 8"
    with pytest.raises(UserError, match="behaves on noise like none .* --teacher-kind"):
        run(monkeypatch, flags)
    for kind in ("sit", "repa", "dit"):
        run(monkeypatch, f"{flags} --teacher-kind {kind} --folder {kind}")
        meta = json.loads((tmp_path / kind / "meta.json").read_text())
        assert meta["ode"] == asdict(pretrained.ODES[kind])


def test_the_help_is_short(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert len(capsys.readouterr().out.splitlines()) <= 60


def test_a_presets_places_serve_teachers_of_other_numbers_of_steps():
    assert scale_steps((6, 12, 18, 24), 24) == (6, 12, 18, 24)
    assert scale_steps((6, 12, 18, 24), 8) == (2, 4, 6, 8)
    assert scale_steps((2, 8, 16, 24), 48) == (4, 16, 32, 48)
