"""The discriminator of the second stage: the frozen teacher, and a small head on each of its layers.

What tells real images from a student's (refine.py) is already known to the teacher, whose layers describe an image from
fine to coarse. So the discriminator is the teacher, frozen, reading an image at a small time t, and only its heads
learn. A head gives every token of every layer a logit: how real does this patch look, for this label and time?

The hinge losses of the two players (1705.02894), with D the logits:

    the heads'      mean max(0, 1 − D(real)) + mean max(0, 1 + D(generated))
    the student's   − mean D(generated)

The heads follow the authors' recipe (in turn that of StyleGAN-T, 2301.09515), but are narrower: at width 1152 theirs
have half the teacher's weights.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from training import everywhere, world

GROUP = 8  # images that a head sees together: all real, or all generated
MOST = 1e4  # bound of the adaptive weight


def local_batch_norm(x):
    """Tokens (b, n, d), normalised for each channel over GROUP samples at a time and all of their tokens: a head
    compares the images of a group, and what it sees does not depend on the size of the batch."""
    groups = F.instance_norm(rearrange(x.float(), "(g k) n d -> g d (k n)", k=GROUP))
    return rearrange(groups, "g d (k n) -> (g k) n d", k=GROUP)


class Head(nn.Module):
    """The features of one layer (b, n, width) and the condition c = time + label (b, width), to logits (b, n)."""

    def __init__(self, width: int, hidden: int, projected: int = 64):
        super().__init__()
        self.enter = spectral_norm(nn.Linear(width, hidden))
        self.mix = spectral_norm(nn.Conv1d(hidden, hidden, 9, padding=4, padding_mode="circular"))
        self.leave = spectral_norm(nn.Linear(hidden, projected))
        self.condition = nn.Linear(width, projected)

    def forward(self, x, c):
        x = F.leaky_relu(local_batch_norm(self.enter(x)), 0.2)  # (b, n, hidden)
        mixed = rearrange(self.mix(rearrange(x, "b n d -> b d n")), "b d n -> b n d")  # along the sequence of tokens
        x = (x + F.leaky_relu(local_batch_norm(mixed), 0.2)) / 2**0.5
        projection = self.leave(x) * self.condition(c)[:, None]  # (b, n, projected)
        return projection.sum(-1) / projection.shape[-1] ** 0.5


class Discriminator(nn.Module):
    """Heads on all the layers of a `teacher`, a DiT that stays as it is and is not part of this module's weights.
    `hidden`: the width of a head."""

    def __init__(self, teacher, hidden: int):
        super().__init__()
        self.frozen = [teacher.requires_grad_(False).eval()]  # in a list: no submodule
        self.heads = nn.ModuleList([Head(teacher.width, hidden) for _ in teacher.blocks])

    def forward(self, x, t, y):
        """Images x (b, c, h, w), noisy as the time t () says; labels y (b,). Returns logits (b, layers, n)."""
        [teacher], features = self.frozen, []
        t = t.expand(len(x), 1)
        teacher(x[:, None], t, y, features=features)
        c = teacher.condition(t, y)[:, 0]  # (b, width)
        return torch.stack([head(x[:, 0], c) for head, x in zip(self.heads, features, strict=True)], 1)


def heads_loss(real, generated):
    """Hinge: logits above 1 for real images and below −1 for generated ones cost nothing."""
    return F.relu(1 - real).mean() + F.relu(1 + generated).mean()


def student_loss(generated):
    """The student's images should look real."""
    return -generated.mean()


def balance(copying, judged, weight, strength: float):
    """The adaptive weight λ of VQGAN (2012.09841): `strength` times the ratio of the gradients that the two losses have
    at the last layer's `weight`, so that neither drowns the other. Of several processes, the gradients' means."""
    gradients = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (copying, judged))
    norms = [(everywhere(gradient) / world()).norm() for gradient in gradients]
    return (strength * norms[0] / (norms[1] + 1e-8)).clamp(max=MOST).detach()
