"""The two players' losses against their formulas, signs included; what gradients reach, and what they must not; heads
that learn; and the second stage as a whole, which can be interrupted and stops when a player has lost."""

import pytest
import torch
from PIL import Image

import data
import distill
from discriminator import Discriminator, Head, balance, draw, heads_loss, local_batch_norm, student_loss
from distill import ard_loss, predict, refine
from presets import COMMON, REFINERS
from sample import few_step
from teacher import ASSETS, load_network
from test_distill import FewTrajectories, random_dit, student_of
from training import Fault, fingerprint

SETTINGS = COMMON | REFINERS["shapes"] | dict(iterations=6, batch=8, alone=2, hidden=16, bf16=False)


def test_losses_are_their_formulas():
    real, generated = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    assert heads_loss(real, generated) == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0) / 4)
    assert student_loss(generated) == pytest.approx(-(-3 + 0 + 1 - 1) / 4)


def test_signs():
    """The heads raise the logits of real images and lower those of generated ones; the student raises its own."""
    real, generated = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    heads_loss(real, generated).backward()
    assert (real.grad < 0).all() and (generated.grad > 0).all()  # a descent goes the other way
    generated.grad = None
    student_loss(generated).backward()
    assert (generated.grad < 0).all()


def test_balance_equals_the_gradients():
    torch.manual_seed(0)
    weight, a, b = (torch.randn(5, requires_grad=True) for _ in range(3))
    copying, judged = (weight * a).sum(), (weight**2 * b).sum()
    expected = 3 * a.norm() / (2 * weight * b).norm()
    found = balance(copying, judged, weight, strength=3.0)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert balance(copying, judged * 1e-9, weight, strength=3.0) == 1e4  # bounded


def test_local_batch_norm():
    x = torch.randn(20, 6, 4) * 3 + 5
    found = local_batch_norm(x)
    for part in (slice(0, 8), slice(8, 16), slice(16, 20)):
        rows = x[part].reshape(-1, 4)
        expected = (x[part] - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(found[part], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(local_batch_norm(x[:8]), found[:8])  # whatever else is in the batch


def test_a_logit_for_every_token_of_every_layer_for_label_and_time():
    discriminator = Discriminator(random_dit(), hidden=16).eval()
    x, y, t = torch.randn(8, 3, 8, 8), torch.tensor([0, 4, 2, 1] * 2), torch.tensor(100.0)
    logits = discriminator(x, t, y)
    assert logits.shape == (8, 6, 4) and logits.std() > 1e-3
    assert (discriminator(x, t, y.flip(0)) - logits).abs().mean() > 1e-3
    assert (discriminator(x, t + 300, y) - logits).abs().mean() > 1e-3
    assert not [name for name, _ in discriminator.named_parameters() if "frozen" in name or "blocks" in name]


def test_spectral_norm_bounds_the_layers():
    torch.manual_seed(0)
    head = Head(64, 16)
    for _ in range(30):
        head(torch.randn(8, 4, 64), torch.randn(8, 64))  # power iteration, one step a pass
    for layer in (head.enter, head.mix, head.leave):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_the_heads_learn_to_tell_two_kinds_of_images_apart():
    """Shapes, and canvases of their mean colour, on the shipped teacher's features."""
    teacher, _ = load_network(ASSETS / "shapes-teacher.pt", "teacher")
    torch.manual_seed(0)
    discriminator, t = Discriminator(teacher, hidden=32), torch.tensor(100.0)
    optimiser = torch.optim.AdamW(discriminator.parameters(), lr=5e-3)
    before, losses = fingerprint(teacher.state_dict()), []
    real, labels = data.shapes(640, 16).batch(slice(None))
    for x, y in zip(real.split(16), labels.split(16), strict=True):
        loss = heads_loss(discriminator(x, t, y), discriminator(x.mean((2, 3), keepdim=True).expand_as(x), t, y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.8 and losses[-1] < 0.6, losses[::8]
    assert fingerprint(teacher.state_dict()) == before


# ---- the stage ------------------------------------------------------------------------------------------------------

LEARNED = dict(training=dict(iterations=1), teacher="-", classes=list("abcde"))


class Images(data.Dataset):
    def __init__(self):
        super().__init__(torch.arange(12 * 192).reshape(12, 3, 8, 8).remainder(251).to(torch.uint8).numpy(),
                         torch.arange(12).remainder(5).numpy(), list("abcde"))


def run(out, **changes):
    student, about = student_of(random_dit(), history_layers=2)
    student.requires_grad_(False)
    about |= LEARNED
    return refine(student, about, random_dit(), FewTrajectories(), Images(), SETTINGS | changes, out,
                  torch.device("cpu"))


def test_what_does_not_belong_to_the_student_is_refused(tmp_path):
    for wrong, words in ((dict(classes=list("abcdx")), "other classes"), (dict(guidance=2.0), "not the trajectories")):
        student, about = student_of(random_dit(), history_layers=2)
        with pytest.raises(Fault, match=words):
            refine(student, about | LEARNED | wrong, random_dit(), FewTrajectories(), Images(), SETTINGS,
                   tmp_path / "no.pt", torch.device("cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("judged", ["own", "forced"])
def test_gradients_reach_the_student_and_the_heads_and_not_the_teacher(tmp_path, monkeypatch, judged):
    """What each player's step changes. With strength 10 the discriminator has the last word on the student, too."""
    seen = {}

    def catch(title, model, batch_of, loss_of, out, about, *, rival, **settings):
        batch = x, y, _, _, noise, *_ = batch_of(5)
        rival.model.eval()  # no power iteration: the same function at every call
        loss, copying, told, weight = loss_of(model, *batch)
        assert copying > 0 and weight > 0
        loss.backward()
        history = x[:, :-1] if judged == "forced" else few_step(model, about, x[:, 0], y)[:, :-1]
        image = predict(model, about, history, y)[:, -1]
        direct = ard_loss(model, about, x, y) + weight * student_loss(
            rival.model(0.9 * image + 0.1 * noise, torch.tensor(100.0), y))
        assert loss.item() == pytest.approx(direct.item(), rel=1e-5)
        gradient = torch.autograd.grad(direct, model.blocks[0].attn.qkv.weight)[0]
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, gradient, rtol=1e-3, atol=1e-6)
        seen["student"] = [name for name, w in model.named_parameters()
                           if w.requires_grad and not w.grad.abs().sum() > 0]
        seen["heads"] = [name for name, w in rival.model.named_parameters() if w.grad is not None]
        model.zero_grad(set_to_none=True)
        rival.loss_of(rival.model, *batch)[0].backward()
        seen["student after"] = [name for name, w in model.named_parameters() if w.grad is not None]
        seen["heads after"] = [name for name, w in rival.model.named_parameters() if not w.grad.abs().sum() > 0]
        seen["teacher"] = [name for name, w in rival.model.frozen[0].named_parameters() if w.grad is not None]
        loss_of(model, *batch_of(0))  # while the heads learn alone
        return model, []

    monkeypatch.setattr(distill, "train", catch)
    run(tmp_path / "student.pt", judged=judged, strength=10.0)
    assert seen == {key: [] for key in seen}


def test_the_stage_goes_on_where_it_was_stopped(tmp_path):
    _, about, losses = run(tmp_path / "whole.pt")
    assert [len(row) for row in losses] == [7] and about["refined"]["strength"] == 1.0
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert {"rival_model", "rival_optimiser"} < set(state)
    draw(losses, tmp_path / "game.png")
    assert Image.open(tmp_path / "game.png").width > 1000

    class PowerCut(FewTrajectories):
        calls = 0

        def batch(self, indices):
            PowerCut.calls += 1
            if PowerCut.calls == 4:
                raise KeyboardInterrupt
            return super().batch(indices)

    student, about = student_of(random_dit(), history_layers=2)
    about |= LEARNED
    arguments = random_dit(), PowerCut(), Images(), SETTINGS, tmp_path / "cut.pt", torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        original = distill.train
        patch.setattr(distill, "train", lambda *args, **more: original(*args, **more, save_seconds=-1))
        with pytest.raises(KeyboardInterrupt):
            refine(student, about, *arguments)
    refine(student_of(random_dit(), history_layers=2)[0], about, *arguments)
    again = torch.load(tmp_path / "cut.pt", weights_only=True)
    for key in ("ema", "model", "rival_model"):
        assert all(torch.equal(again[key][name], value) for name, value in state[key].items()), key
    assert again["losses"] == state["losses"]


def test_a_lost_game_ends(tmp_path, monkeypatch):
    with pytest.raises(Fault, match="not finite"):
        run(tmp_path / "nan.pt", lr=float("inf"))
    rows, said = [(50 * i, 0, 0, 0, 0, 0, 1.0) for i in range(1, 12)], []  # the heads are right, always
    with monkeypatch.context() as patch:
        patch.setattr(distill, "train", lambda *args, verdict, **more: (None, said.append(verdict(rows))))
        run(tmp_path / "lost.pt")
        run(tmp_path / "alone.pt", alone=600)  # but the student does not play yet
    assert said[0].startswith("the heads are always right") and said[1] is None
    monkeypatch.setattr(distill, "balance", lambda *args: torch.tensor(1e4))
    with pytest.raises(Fault, match="λ is at its bound"):
        run(tmp_path / "bound.pt", alone=0)
    assert not list(tmp_path.iterdir())
