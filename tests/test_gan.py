"""The second stage: the discriminator and the losses against their formulas; what each network's
step computes and what its gradients reach; trainings that are interrupted, split, or lost; the
program."""

import copy
import os
import signal
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import (
    CPU,
    TEACHER,
    FewTrajectories,
    random_dit,
    random_weights,
    student_of,
)
from tiny import SETTINGS as STUDENT

import data
import gan
import training
from config import GAN, PRESETS, Training
from distill import make_student
from files import UserError, fingerprint, load_checkpoint
from gan import (
    Discriminator,
    DiscriminatorHead,
    GANTrainer,
    adaptive_weight,
    check_balance,
    check_settings,
    hinge_loss,
    train_gan,
)
from machine import Runtime
from model import DiT
from sample import few_step, predict_all

ROOT = Path(gan.__file__).parent
SETTINGS = GAN(discriminator_lr=3e-3, hidden=16, noise_level=0.1, weight=1.0, warmup=2)
TRAINING = Training(iterations=6, batch=8, lr=1e-4, ema_decay=0.9, on_policy=1.0)


def few_images() -> data.Dataset:
    images = torch.arange(12 * 192).reshape(12, 3, 8, 8).remainder(251).to(torch.uint8)
    labels = torch.arange(12).remainder(5)
    return data.Dataset(images.numpy(), labels.numpy(), TEACHER.classes)


def make_record(record, gan=None, **changes):
    """A record of the second stage, with some fields of TRAINING changed."""
    settings = replace(TRAINING, **changes)
    return replace(record, gan=gan or SETTINGS, gan_training=settings)


def run(file, trajectories=None, runtime=CPU, gan=None, **changes):
    student, record = student_of(random_dit(), history_layers=2)
    record = make_record(record, gan, **changes)
    return train_gan(
        student, record, random_dit(), trajectories or FewTrajectories(), few_images(), file,
        runtime,
    )


def read(file) -> dict:
    return torch.load(file, weights_only=True)


# ---- The discriminator ---------------------------------------------------------------------------


def test_features_are_what_the_teachers_layers_give():
    teacher, images, noise = random_dit(), torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    y = torch.tensor([0, 4, 2, 1] * 2)
    found, c = Discriminator(teacher, TEACHER.ode, SETTINGS).features(images, noise, y)
    expected = []
    for block in teacher.blocks:
        block.register_forward_hook(lambda layer, inputs, output: expected.append(output[:, 0]))
    teacher((0.9 * images + 0.1 * noise)[:, None], torch.tensor([100.0]), y)
    assert len(found) == len(expected) == 6 and found[0].std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c, teacher.condition(torch.tensor([100.0]), y)[:, 0])


def test_times_of_ddpm_are_whole():
    ode = replace(TEACHER.ode, noise_path="ddpm", predicts="eps")
    assert Discriminator(random_dit(), ode, replace(SETTINGS, noise_level=0.0204)).time == 20


def test_a_logit_for_every_token_of_every_layer():
    discriminator = Discriminator(random_dit(), TEACHER.ode, SETTINGS).eval()
    images, noise = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)
    y = torch.tensor([0, 4, 2, 1] * 4)
    logits = discriminator(images, noise, y)
    assert logits.shape == (16, 6, 4) and logits.std() > 1e-3
    assert (discriminator(images, noise, y.flip(0)) - logits).abs().mean() > 1e-3
    alone = discriminator(images[8:], noise[8:], y[8:])  # a group does not see the others
    torch.testing.assert_close(alone, logits[8:], rtol=1e-4, atol=1e-5)
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}


def test_local_batch_norm():
    x = torch.randn(24, 6, 4) * 3 + 5
    found = gan.local_batch_norm(x)
    for group in (slice(0, 8), slice(8, 16), slice(16, 24)):
        tokens = x[group].reshape(-1, 4)
        expected = (x[group] - tokens.mean(0)) / (tokens.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(found[group], expected, rtol=1e-4, atol=1e-5)


def test_spectral_norm_bounds_the_layers():
    torch.manual_seed(0)
    head = DiscriminatorHead(64, 16)
    for _ in range(30):
        head(torch.randn(8, 4, 64), torch.randn(8, 64))  # a pass is a step of the power iteration
    for layer in (head.input, head.convolution, head.output):
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.05)


def test_a_discriminator_learns_to_tell_two_kinds_of_images_apart():
    """Shapes from canvases of their mean colour, with the features of the shipped teacher."""
    checkpoint = load_checkpoint(ROOT / "assets" / "shapes-teacher.pt", "teacher")
    teacher = DiT(checkpoint["record"].model)
    teacher.load_state_dict(checkpoint["ema"])
    before, losses = fingerprint(teacher.state_dict()), []
    torch.manual_seed(0)
    discriminator = Discriminator(teacher, TEACHER.ode, replace(SETTINGS, hidden=32))
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=5e-3)
    images, labels = data.shapes(640, 16).batch(slice(None))
    for x, y in zip(images.split(16), labels.split(16), strict=True):
        flat = x.mean((2, 3), keepdim=True).expand_as(x)
        noise = torch.randn(2, *x.shape)
        loss = hinge_loss(discriminator(x, noise[0], y), discriminator(flat, noise[1], y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.8 and losses[-1] < 0.6, losses[::8]
    assert fingerprint(teacher.state_dict()) == before


# ---- The losses ----------------------------------------------------------------------------------


def test_losses_are_their_formulas():
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    generated = torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    expected = (0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0) / 4
    assert hinge_loss(real, generated) == pytest.approx(expected)
    assert gan.adversarial_loss(generated) == pytest.approx(-(-3 + 0 + 1 - 1) / 4)


def test_the_adaptive_weight_balances_the_gradients():
    torch.manual_seed(0)
    weight, a, b = (torch.randn(5, requires_grad=True) for _ in range(3))
    distillation, adversarial = (weight * a).sum(), (weight**2 * b).sum()
    expected = 3 * a.norm() / (2 * weight * b).norm()
    found = adaptive_weight(distillation, adversarial, weight, factor=3.0)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert adaptive_weight(distillation, adversarial * 1e-9, weight, factor=3.0) == 1e4


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_the_students_loss_and_gradients(on_policy):
    """They equal those of the plain formula, whose graph leads through the discriminator. The GAN
    loss has weight 10, so that its gradient counts."""
    first, record = student_of(random_dit(seed=1), history_layers=2)
    record = make_record(record, replace(SETTINGS, weight=10.0), on_policy=on_policy)
    teacher = random_dit()
    trainer = GANTrainer(first, record, teacher, CPU, {})
    trainer.iteration = SETTINGS.warmup
    trainer.discriminator.eval()  # no power iteration: the same function at each call
    batch = gan.draw_batch(FewTrajectories(), few_images(), TRAINING, 0)
    trajectory, y, noise, *_ = batch
    model, student = trainer.model, record.student
    loss, (distillation, adversarial, weight), images = trainer.student_loss(model, *batch)
    assert distillation > 0 and weight > 0
    loss.backward()

    read = few_step(model, student, trajectory[:, 0], y) if on_policy else trajectory
    prediction = predict_all(model, student, read[:, :-1], y)
    expected = (prediction - trajectory[:, 1:]).square().mean()
    torch.testing.assert_close(distillation, expected)
    torch.testing.assert_close(images, prediction[:, -1].detach())
    logits = trainer.discriminator(prediction[:, -1], noise, y)
    torch.testing.assert_close(adversarial, -logits.mean())
    plain = expected - weight * logits.mean()
    weights = dict(model.named_parameters())
    trained = [name for name, w in weights.items() if w.requires_grad]
    gradients = torch.autograd.grad(plain, [weights[name] for name in trained])
    for name, gradient in zip(trained, gradients, strict=True):
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(weights[name].grad, gradient, rtol=1e-3, atol=1e-5)
    assert set(weights) - set(trained) == {"pos_embed"}
    others = [*trainer.discriminator.parameters(), *teacher.parameters()]
    assert all(w.grad is None for w in others)


def test_the_discriminators_loss_and_gradients():
    first, record = student_of(random_dit(seed=1), history_layers=2)
    teacher = random_dit()
    trainer = GANTrainer(first, make_record(record), teacher, CPU, {})
    trainer.discriminator.eval()
    batch = gan.draw_batch(FewTrajectories(), few_images(), TRAINING, 0)
    _, y, noise, real, real_y, real_noise = batch
    generated = torch.randn(8, 3, 8, 8)
    discriminator = trainer.discriminator
    loss, (logged, accuracy), _ = trainer.discriminator_loss(discriminator, *batch, generated)
    of_real = discriminator(real, real_noise, real_y)
    of_generated = discriminator(generated, noise, y)
    torch.testing.assert_close(loss, hinge_loss(of_real, of_generated))
    right = (of_real > 0).float().mean() + (of_generated < 0).float().mean()
    assert logged == loss and accuracy == pytest.approx(right.item() / 2)
    loss.backward()
    assert all(w.grad.abs().sum() > 0 for w in discriminator.parameters())
    others = [*trainer.model.parameters(), *teacher.parameters()]
    assert all(w.grad is None for w in others)


# ---- The training --------------------------------------------------------------------------------


def test_compiled_layers_compute_the_same(monkeypatch):
    """Those of the student, on-policy, and those of the frozen teacher."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    first, record = student_of(random_dit(seed=1), history_layers=2)
    record = make_record(record, replace(SETTINGS, weight=10.0, warmup=0), on_policy=1.0)
    logged = []
    for use in (False, True):
        teacher = random_dit()
        trainer = GANTrainer(first, record, teacher, replace(CPU, compile=use), {})
        for iteration in range(3):
            batch = gan.draw_batch(FewTrajectories(), few_images(), TRAINING, iteration)
            trainer.step(batch)
        assert (trainer.model.compiled_blocks is not None) == use
        assert teacher.compiled_blocks is None
        logged.append(trainer.sums)
    assert logged[0].abs().min() > 0
    torch.testing.assert_close(logged[1], logged[0], rtol=1e-3, atol=0)


def test_the_discriminator_learns_from_the_images_that_the_student_has_just_made():
    """With two micro-batches, and before the student's step."""
    first, record = student_of(random_dit(seed=1), history_layers=2)
    record = make_record(record, batch=16, on_policy=0.0)
    trainer = GANTrainer(first, record, random_dit(), replace(CPU, accumulate=2), {})
    batch = gan.draw_batch(FewTrajectories(), few_images(), record.gan_training, 0)
    before, seen, loss_of = copy.deepcopy(trainer.model), [], trainer.discriminator_loss

    def watched(network, *micro_batch):
        seen.append(micro_batch)
        return loss_of(network, *micro_batch)

    trainer.discriminator_loss = watched
    trainer.step(batch)
    trajectory, y, *_ = batch
    expected = predict_all(before, record.student, trajectory[:, :-1], y)[:, -1]
    assert len(seen) == 2
    for i, given in enumerate((*batch, expected)):
        torch.testing.assert_close(torch.cat([few[i] for few in seen]), given, rtol=1e-5, atol=1e-5)
    after = predict_all(trainer.model, record.student, trajectory[:, :-1], y)[:, -1]
    assert (after - expected).abs().max() > 1e-4


def test_without_a_gan_loss_micro_batches_change_nothing(tmp_path):
    control = replace(SETTINGS, weight=0.0)
    one, losses = run(tmp_path / "1.pt", gan=control, batch=16)
    two, _ = run(tmp_path / "2.pt", gan=control, batch=16, runtime=replace(CPU, accumulate=2))
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-6)
    assert losses[0][3] == 0  # λ


def test_in_bfloat16_with_checkpointing(tmp_path):
    _, [expected] = run(tmp_path / "1.pt")
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, checkpointing=True)
    _, [found] = run(tmp_path / "2.pt", runtime=runtime)
    assert expected[3] > 0 and found[1] == pytest.approx(expected[1], rel=0.02)
    assert found[4:] == pytest.approx(expected[4:], rel=0.1)


class Interrupted(FewTrajectories):
    """Sends this process a signal, or raises an error, before batch 4."""

    def __init__(self, event):
        self.calls, self.event = 0, event

    def batch(self, indices):
        self.calls += 1
        if self.calls == 4:
            self.event()
        return super().batch(indices)


def crash():
    raise RuntimeError("the power went")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("event", [crash, press_ctrl_c])
def test_a_training_continues_to_the_bit(tmp_path, event, monkeypatch):
    run(tmp_path / "whole.pt")
    if event is crash:
        monkeypatch.setattr(training.SaveClock, "due", lambda clock: True)  # save each time
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run(tmp_path / "cut.pt", Interrupted(event))
    monkeypatch.undo()
    assert read(tmp_path / "cut.pt")["iteration"] == (3 if event is crash else 4)
    _, losses = run(tmp_path / "cut.pt")
    whole, cut = read(tmp_path / "whole.pt"), read(tmp_path / "cut.pt")
    for part in ("ema", "model", "discriminator"):
        assert whole[part].keys() == cut[part].keys()
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part]), part
    for part in ("optimizer", "discriminator_optimizer"):
        for i, moments in whole[part]["state"].items():
            assert all(torch.equal(cut[part]["state"][i][name], moments[name]) for name in moments)
    assert whole["losses"] == cut["losses"] == losses and len(losses[0]) == 6
    assert run(tmp_path / "cut.pt")[1] == losses  # a finished one is returned as it is


def test_another_training_is_not_continued(tmp_path):
    file = tmp_path / "student.pt"
    run(file)
    written = file.read_bytes()
    with pytest.raises(UserError, match="another training: lr is 0.0001 there and 0.0002 here"):
        run(file, lr=2e-4)

    class FewerTrajectories(FewTrajectories):
        def __len__(self):
            return 7

    with pytest.raises(UserError, match="trajectories is 8 there and 7 here"):
        run(file, FewerTrajectories())
    assert file.read_bytes() == written


@pytest.mark.parametrize(
    "change",
    [
        dict(inputs=3),
        dict(sums="ab"),
        dict(sums=[0.5]),
        dict(sums=[float("nan")] * 5),
        dict(losses=[(1, 0.5)]),
        dict(losses=[]),
        dict(optimizer={}),
        dict(discriminator_optimizer=dict(state={}, param_groups=[])),
    ],
)
def test_a_damaged_training_is_not_continued(tmp_path, change):
    file = tmp_path / "student.pt"
    run(file)
    torch.save(torch.load(file, weights_only=True) | change, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="student.pt is damaged"):
        run(file)
    assert file.read_bytes() == before


def test_the_first_student_stays_as_it_is(tmp_path):
    first, record = student_of(random_dit(), history_layers=2)
    first.eval().requires_grad_(False)
    before = fingerprint(first.state_dict())
    ema, _ = train_gan(
        first, make_record(record), random_dit(), FewTrajectories(), few_images(),
        tmp_path / "student.pt", CPU,
    )
    assert fingerprint(first.state_dict()) == before != fingerprint(ema.state_dict())
    assert not any(weight.requires_grad for weight in first.parameters())
    saved = load_checkpoint(tmp_path / "student.pt", "student")
    assert saved["record"] == make_record(record)


# ---- What is refused, and how a training is lost -------------------------------------------------


@pytest.mark.parametrize(
    "changes, runtime, message",
    [
        (dict(batch=12), CPU, "whole groups of 8"),
        (dict(batch=24), replace(CPU, accumulate=2), "2 micro-batches of whole groups of 8"),
        (dict(iterations=2), CPU, "the first 2 iterations have no GAN loss"),
        (dict(on_policy=0.5), CPU, "on_policy is 0 or 1"),
    ],
)
def test_settings_that_cannot_work(changes, runtime, message):
    check_settings(SETTINGS, TRAINING, CPU)
    with pytest.raises(UserError, match=message):
        check_settings(SETTINGS, replace(TRAINING, **changes), runtime)


def test_what_does_not_belong_to_the_student(tmp_path):
    teacher = random_dit()
    _, record = student_of(teacher)
    gan.check_student(record, teacher)
    gan.check_student(replace(record, teacher=""), random_dit(seed=5))  # a public file does not say
    with pytest.raises(UserError, match="another teacher"):
        gan.check_student(record, random_dit(seed=5))
    with pytest.raises(UserError, match="has had its second stage"):
        gan.check_student(make_record(record), teacher)

    class OtherTrajectories(FewTrajectories):
        ode = replace(FewTrajectories.ode, guidance_scale=2.0)

    with pytest.raises(UserError, match="of another ODE"):
        run(tmp_path / "student.pt", OtherTrajectories())
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        run(tmp_path / "student.pt", lr=float("inf"))
    assert not list(tmp_path.iterdir())


def test_a_discriminator_that_has_won_ends_the_training(tmp_path, monkeypatch):
    def rows(accuracy, weight, count=10):
        return [(50 * i, 0.1, 0.1, weight, 0.0, accuracy) for i in range(1, count + 1)]

    with pytest.raises(UserError, match="always right"):
        check_balance(rows(accuracy=1.0, weight=2.0))
    check_balance(rows(accuracy=0.98, weight=2.0))
    check_balance(rows(accuracy=1.0, weight=2.0, count=9))
    check_balance(rows(accuracy=1.0, weight=0.0))  # in the warm-up, or without a GAN loss
    monkeypatch.setattr(gan, "adaptive_weight", lambda *inputs: torch.tensor(1e4))
    with pytest.raises(UserError, match="λ is at its bound"):
        run(tmp_path / "student.pt")
    assert not list(tmp_path.iterdir())


# ---- The program ---------------------------------------------------------------------------------


def save(file, kind, record, model):
    torch.save(dict(kind=kind, record=asdict(record), ema=model.state_dict()), file)


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gan.py", *map(str, words), "--device", "cpu"])
    gan.main()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A teacher and its student, in a folder where the program is started, and 12 shapes."""
    monkeypatch.chdir(tmp_path)
    record = replace(TEACHER, model=replace(TEACHER.model, classes=10), classes=data.SHAPES)
    teacher = random_weights(DiT(record.model))
    student, student_record = make_student(
        teacher, record, STUDENT, FewTrajectories(), replace(TRAINING, on_policy=0.0)
    )
    save("teacher.pt", "teacher", record, teacher)
    save("student.pt", "student", student_record, student)
    draw = data.shapes
    monkeypatch.setattr(data, "shapes", lambda count, *more: draw(12, *more))
    return tmp_path


def test_the_program(folder, monkeypatch, capsys):
    reports = []
    monkeypatch.setattr(gan, "report", lambda *given: reports.append(given))
    words = ("--from", "student.pt", "--teacher", "teacher.pt", "--iterations", 3, "--warmup", 1)
    main(monkeypatch, *words, "--batch", 8, "--hidden", 8, "--on-policy", 0)
    [(teacher, students, losses, out, runtime)] = reports
    assert out == Path("runs/shapes-gan") and runtime.device.type == "cpu"
    saved = load_checkpoint(out / "student.pt", "student")
    ema, record = students["R + G"]
    assert saved["record"] == record and saved["iteration"] == 3
    assert record.gan == replace(PRESETS["shapes"].gan, warmup=1, hidden=8)
    assert record.gan_training.on_policy == 0 and record.gan_training.iterations == 3
    assert students["R"][1] == replace(record, gan=None, gan_training=None)
    assert losses == {"R + G": saved["losses"]} and len(saved["losses"]) == 1
    assert Image.open(out / "gan.png").width > 1000
    with pytest.raises(UserError, match="no student at runs/shapes/student.pt: python distill.py"):
        main(monkeypatch, "--teacher", "teacher.pt")
    with pytest.raises(UserError, match="has had its second stage"):
        main(monkeypatch, "--from", out / "student.pt", "--teacher", "teacher.pt")


def test_help_is_a_page(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(monkeypatch, "--help")
    page = capsys.readouterr().out
    assert "python gan.py --preset shapes" in page and page.count("\n") <= 60
