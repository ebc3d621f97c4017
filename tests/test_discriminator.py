"""The two players' losses against their formulas, signs included; what a head sees of a batch; heads that learn."""

import pytest
import torch
from test_distill import random_dit

import data
from discriminator import Discriminator, Head, balance, heads_loss, local_batch_norm, student_loss
from teacher import ASSETS, load_network
from training import fingerprint


def test_losses_are_their_formulas():
    real, generated = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    assert heads_loss(real, generated) == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0) / 4)
    assert student_loss(generated) == pytest.approx(-(-3 + 0 + 1 - 1) / 4)


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
    x = torch.randn(24, 6, 4) * 3 + 5
    found = local_batch_norm(x)
    for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
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
