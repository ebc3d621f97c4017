"""The second stage: what each player's step computes and what its gradients reach; a run that is interrupted goes on
where it was; and a lost game ends."""

import pytest
import torch
from PIL import Image
from test_distill import FewTrajectories, random_dit, student_of

import data
import refine as stage
from discriminator import student_loss
from distill import predict
from presets import COMMON, REFINERS
from refine import draw, fits, refine
from sample import few_step
from training import Fault

SETTINGS = COMMON | REFINERS["shapes"] | dict(iterations=6, batch=8, alone=2, hidden=16, level=0.1, bf16=False)
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
    for wrong, words in ((dict(classes=list("abcdx")), "other classes"), (dict(guidance=2.0), "another teacher or g")):
        student, about = student_of(random_dit(), history_layers=2)
        with pytest.raises(Fault, match=words):
            refine(student, about | LEARNED | wrong, random_dit(), FewTrajectories(), Images(), SETTINGS,
                   tmp_path / "no.pt", torch.device("cpu"))
    assert not list(tmp_path.iterdir())
    fits(about | dict(classes=list("01234")), Images(), SETTINGS)  # a public teacher's classes have no names


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
        direct = (predict(model, about, history, y) - x[:, 1:]).square().mean() + weight * student_loss(
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

    monkeypatch.setattr(stage, "train", catch)
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
        original = stage.train
        patch.setattr(stage, "train", lambda *args, **more: original(*args, **more, save_seconds=-1))
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
        patch.setattr(stage, "train", lambda *args, verdict, **more: (None, said.append(verdict(rows))))
        run(tmp_path / "lost.pt")
        run(tmp_path / "alone.pt", alone=600, iterations=601)  # but the student does not play yet
    assert said[0].startswith("the heads are always right") and said[1] is None
    monkeypatch.setattr(stage, "balance", lambda *args: torch.tensor(1e4))
    with pytest.raises(Fault, match="λ is at its bound"):
        run(tmp_path / "bound.pt", alone=0)
    assert not list(tmp_path.iterdir())
