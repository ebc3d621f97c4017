"""The second stage: a GAN loss beside the distillation loss, the paper's "R + G".

A student that only copies its teacher is no better than its teacher. It has never seen a real
image, and it learns the faults of the teacher's images, too. The paper therefore fine-tunes the
distilled student. Its distillation loss (R, regression) stays, and a GAN loss (G) is added, which
comes from a discriminator D. D learns to tell the student's images from those of the data set. On
ImageNet-256 this took FID from 4.32 to 1.84, below the teacher's 2.89.

In each iteration the student takes an optimizer step, and then the discriminator takes one:

    student         mean ‖ x̂_{τ_{s−1}} − x_{τ_{s−1}} ‖² over the S steps  −  λ · mean D(x̂_{τ_0})
    discriminator   mean max(0, 1 − D(real))  +  mean max(0, 1 + D(x̂_{τ_0}))

This is the hinge loss (arXiv 1705.02894). D judges the student's last prediction only, its image
x̂_{τ_0}. The weight λ is such that the gradients of the student's two losses at its output layer
are equally large, or have a chosen ratio.

The discriminator is the teacher, frozen, with a small trainable head on each of its layers. The
features of a network that can make images describe images, so that only the heads have to learn.

    the paper           distillation and hinge loss together; the frozen teacher with heads as D
    the authors' code   what a head consists of; how λ is found; no GAN loss in the first iterations
    our choices         the formulas of the hinge loss, which that code does not contain; narrower
                        heads; how noisy the images are that D sees (noise_level); the student reads
                        its own history, as in sampling, and not the teacher's (on_policy = 1)

    python distill.py --preset shapes            the first stage: runs/shapes/student.pt
    python gan.py --preset shapes                the second stage: runs/shapes-gan/student.pt
    python gan.py --weight 0 --out runs/control  as many iterations of the distillation loss alone

Results go into runs/PRESET-gan: student.pt, result.json and pictures. What was stopped is
continued.
"""

import startup  # noqa: F401  before the large packages

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import data
import training
from command_line import (
    add_teacher_flags,
    add_training_flags,
    fraction,
    make_parser,
    non_negative,
    non_negative_int,
    positive_int,
    run_program,
)
from config import (
    GAN,
    ODE,
    PRESETS,
    StudentRecord,
    Training,
    TrajectorySettings,
    override,
    override_parts,
)
from distill import own_inputs
from evaluate import check_same_classes, report
from figures import new_figure, save_figure
from files import (
    UserError,
    check_finite,
    fingerprint,
    first_difference,
    one_line,
    output_folder,
    replace_file,
)
from machine import Progress, Runtime, all_reduce, rank, runtime_from, wait_for_all, world_size
from model import DiT
from pretrained import find_teacher, load_network
from sample import predict_all
from teacher import NOISE_PATHS, add_noise
from trajectories import Trajectories, open_trajectories

GROUP = 8  # images that a head normalises together: all are real, or all are the student's
LARGEST_WEIGHT = 1e4  # bound of λ
# What is logged. The accuracy is the fraction of logits that have the right sign.
CURVES = ("distillation loss", "GAN loss", "λ", "discriminator's loss", "discriminator's accuracy")

# ---- 1. The discriminator ------------------------------------------------------------------------


def local_batch_norm(x):
    """Normalise each feature of tokens (b, n, d) over groups of 8 samples and all of their tokens.
    So a head compares the images of a group, and the size of the batch does not matter."""
    groups = rearrange(x.float(), "(g k) n d -> g d (k n)", k=GROUP)
    return rearrange(F.instance_norm(groups), "g d (k n) -> (g k) n d", k=GROUP)


class DiscriminatorHead(nn.Module):
    """The head on one layer, after StyleGAN-T (arXiv 2301.09515): a logit for each token, that is,
    for each patch of the image. The spectral norm bounds how steep the logits can become."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.input = spectral_norm(nn.Linear(width, hidden))
        convolution = nn.Conv1d(hidden, hidden, 9, padding=4, padding_mode="circular")
        self.convolution = spectral_norm(convolution)
        self.output = spectral_norm(nn.Linear(hidden, 64))
        self.condition = nn.Linear(width, 64)

    def forward(self, x, c):
        """x: features, (b, n, width); c: (b, width). Returns logits (b, n)."""
        x = F.leaky_relu(local_batch_norm(self.input(x)), 0.2)              # (b, n, hidden)
        mixed = self.convolution(rearrange(x, "b n d -> b d n"))            # along the tokens
        mixed = local_batch_norm(rearrange(mixed, "b d n -> b n d"))
        x = (x + F.leaky_relu(mixed, 0.2)) / 2**0.5
        # The logit is a scalar product with the condition: how real is this patch, for this label?
        product = self.output(x) * self.condition(c)[:, None]               # (b, n, 64)
        return product.float().sum(dim=-1) / product.shape[-1] ** 0.5


class Discriminator(nn.Module):
    """The frozen teacher with a head on each of its layers. Only the heads are trained and
    stored."""

    def __init__(self, teacher: DiT, ode: ODE, gan: GAN):
        super().__init__()
        # In a list, so that the teacher is no part of this module.
        self.frozen = [teacher.eval().requires_grad_(False)]
        self.ode = ode
        self.path = NOISE_PATHS[ode.noise_path]
        self.time = gan.noise_level * self.path.t_noise  # of the images that it is shown
        if ode.noise_path == "ddpm":
            self.time = round(self.time)
        width, depth = teacher.config.width, teacher.config.depth
        self.heads = nn.ModuleList(DiscriminatorHead(width, gan.hidden) for _ in range(depth))

    def features(self, images, noise, y):
        """images and noise: (b, c, h, w); y: (b,). Returns the tokens after each layer of the
        teacher, a list of (b, n, width), and the condition c = time + label, (b, width)."""
        [teacher] = self.frozen
        x = add_noise(self.ode, images, noise, self.time)
        timesteps = torch.full((len(x), 1), self.path.timestep(self.time), device=x.device)
        tokens = teacher.embed(x[:, None])                                  # (b, 1, n, width)
        c = teacher.condition(timesteps, y)                                 # (b, 1, width)
        features = []
        for i in range(teacher.config.depth):
            tokens = teacher.run_layer(i, tokens, c)
            features.append(tokens[:, 0])
        return features, c[:, 0]

    def forward(self, images, noise, y):
        """As `features`, with b a multiple of 8. Returns logits (b, layers, n)."""
        features, c = self.features(images, noise, y)
        logits = [head(x, c) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1)


# ---- 2. The losses -------------------------------------------------------------------------------


def hinge_loss(real, generated):
    """The discriminator's loss, of logits. Those above 1 for real images and those below −1 for the
    student's cost nothing."""
    return F.relu(1 - real).mean() + F.relu(1 + generated).mean()


def adversarial_loss(generated):
    """The student's GAN loss, of the logits of its images."""
    return -generated.mean()


def adaptive_weight(distillation, adversarial, last_layer, factor: float):
    """VQGAN's λ (arXiv 2012.09841): `factor` times the ratio of the norms of the two losses'
    gradients at the weights of the last layer. Under torchrun, the gradients are averaged first."""
    norms = []
    for loss in (distillation, adversarial):
        [gradient] = torch.autograd.grad(loss, last_layer, retain_graph=True)
        gradient = all_reduce(gradient) / world_size()
        norms.append(gradient.norm())
    ratio = norms[0] / (norms[1] + 1e-8)
    return (factor * ratio).clamp(max=LARGEST_WEIGHT).detach()


# ---- 3. One iteration ----------------------------------------------------------------------------


def draw_batch(trajectories: Trajectories, dataset: data.Dataset, settings: Training, iteration):
    """What an iteration learns from, a function of (seed, iteration):

    trajectory   (b, S + 1, c, h, w)   of the teacher, x_T first
    y            (b,)                  its label
    noise        (b, c, h, w)          added to the student's image before D sees it
    real         (b, c, h, w)          an image of the data set
    real_y       (b,)                  its label
    real_noise   (b, c, h, w)          added to the real image before D sees it
    """
    rng = data.stream(settings.seed, iteration)
    indices = rng.integers(len(trajectories), size=settings.batch)
    trajectory, y = trajectories.batch(indices)
    real, real_y = dataset.draw(settings.batch, rng)
    noises = rng.standard_normal((2, *real.shape), dtype=np.float32)
    noise, real_noise = torch.from_numpy(noises)
    return trajectory, y, noise, real, real_y, real_noise


def optimizer_step(network, optimizer, lr, loss_of, batches: list, runtime: Runtime):
    """A step on the mean of a loss over micro-batches. loss_of(network, *micro_batch) returns the
    loss, values to log, and a result. Returns the means of the values, and the list of results. If
    the gradient is not finite, the means are not finite either, so that GANTrainer.log notices."""
    values, results = [], []

    def loss_alone(network, *batch):
        loss, value, result = loss_of(network, *batch)
        values.append(torch.stack(value).detach())
        results.append(result)
        return loss

    training.accumulate_gradients(network, loss_alone, batches, runtime)
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(values).mean(dim=0) + 0 * norm, results


class GANTrainer:
    """The networks, and one iteration of their training. `first`: the student of the first stage,
    of which `model` begins as a copy. `record`: its record, with `gan` and `gan_training` set.
    `inputs`: what the training depends on beside the record (see train_gan)."""

    PARTS = ("ema", "model", "optimizer", "discriminator", "discriminator_optimizer")

    def __init__(
        self, first: DiT, record: StudentRecord, teacher: DiT, runtime: Runtime, inputs: dict
    ):
        self.record, self.runtime = record, runtime
        self.inputs = inputs
        gan, settings, device = record.gan, record.gan_training, runtime.device
        model = copy.deepcopy(first).to(device).train().requires_grad_(True)
        model.pos_embed.requires_grad_(False)
        model.checkpointing = runtime.checkpointing
        torch.manual_seed(settings.seed)
        teacher = copy.copy(teacher)  # it shares the weights, and can be compiled on its own
        discriminator = Discriminator(teacher, record.student.ode, gan).to(device)

        self.model, self.discriminator = model, discriminator
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        if runtime.compile:
            model.compile_layers()
            teacher.compile_layers()
        self.optimizer = training.make_optimizer(model, settings.lr)
        self.discriminator_optimizer = training.make_optimizer(discriminator, gan.discriminator_lr)
        # Under torchrun, these average their gradients over all processes.
        self.network = training.share_gradients(model, device)
        self.discriminator_network = training.share_gradients(discriminator, device)
        self.iteration, self.losses = 0, []
        self.sums = torch.zeros(len(CURVES), device=device)  # since the last row of `losses`

    def student_loss(self, network, trajectory, y, noise, *_):
        """Returns the loss, the first three values of CURVES, and the student's images."""
        student, gan = self.record.student, self.record.gan
        inputs, targets = trajectory[:, :-1], trajectory[:, 1:]             # (b, S, c, h, w) each
        if self.record.gan_training.on_policy:
            inputs = own_inputs(network, student, inputs[:, 0], y)
        predictions = predict_all(network, student, inputs, y)
        distillation = (predictions - targets).square().mean()

        images = predictions[:, -1]                                         # x̂_{τ_0}: (b, c, h, w)
        seen = images.detach().requires_grad_()
        adversarial = adversarial_loss(self.discriminator(seen, noise, y))
        # Let g = ∂adversarial/∂images, a constant. The scalar product of the images and g has the
        # same gradient with respect to the student's weights as the GAN loss, but its graph does
        # not contain the discriminator. So D is run backward once only, for g. λ needs gradients at
        # the output layer, and the layers below are run backward once, in loss.backward().
        [g] = torch.autograd.grad(adversarial, seen)
        product = (images * g).sum()
        factor = gan.weight if self.iteration >= gan.warmup else 0.0
        last_layer = getattr(self.model, self.model.output_layer_names[-1])
        balance = adaptive_weight(distillation, product, last_layer.linear.weight, factor)  # λ
        loss = distillation + balance * product
        return loss, (distillation, adversarial, balance), images.detach()

    def discriminator_loss(self, network, _, y, noise, real, real_y, real_noise, generated):
        """generated: the student's images. Returns the loss, the last two values of CURVES, and
        None."""
        images = torch.cat([real, generated])
        noise = torch.cat([real_noise, noise])
        logits = network(images, noise, torch.cat([real_y, y]))
        of_real, of_generated = logits.chunk(2)
        loss = hinge_loss(of_real, of_generated)
        right = torch.cat([of_real > 0, of_generated < 0])
        return loss, (loss, right.float().mean()), None

    def step(self, batch):
        """One iteration: a step of the student, then one of the discriminator, on the images that
        the student has just made."""
        settings = self.record.gan_training
        batches = training.micro_batches(batch, self.runtime)
        student_values, generated = optimizer_step(
            self.network,
            self.optimizer,
            training.learning_rate(self.iteration, settings),
            self.student_loss,
            batches,
            self.runtime,
        )
        schedule = replace(settings, lr=self.record.gan.discriminator_lr)
        discriminator_values, _ = optimizer_step(
            self.discriminator_network,
            self.discriminator_optimizer,
            training.learning_rate(self.iteration, schedule),
            self.discriminator_loss,
            [(*batch, images) for batch, images in zip(batches, generated, strict=True)],
            self.runtime,
        )
        training.update_ema(self.ema, self.model, settings.ema_decay, self.iteration)
        self.sums += torch.cat([student_values, discriminator_values])
        self.iteration += 1

    def log(self) -> str:
        """Average `sums` over all processes. At the end of a period of training.LOG_EVERY
        iterations, add a row to `losses`: (iteration, the means of CURVES over the period). Returns
        the last row in words. Raises UserError where a mean is not finite, and where the
        discriminator has won."""
        self.sums = all_reduce(self.sums) / world_size()
        if not self.sums.isfinite().all():
            raise UserError(
                f"a loss is not finite at iteration {self.iteration}: try a smaller --lr or "
                "--discriminator-lr. What was saved before stays"
            )
        period = (self.iteration - 1) % training.LOG_EVERY + 1  # iterations since the last row
        is_last = self.iteration == self.record.gan_training.iterations
        if is_last or period == training.LOG_EVERY:
            means = (self.sums / period).tolist()
            self.losses.append((self.iteration, *means))
            self.sums = torch.zeros_like(self.sums)
            check_balance(self.losses)
        if not self.losses:
            return ""
        _, distillation, *_, accuracy = self.losses[-1]
        return f"distillation loss {distillation:.5f}, accuracy of D {accuracy:.2f}"

    def save(self, file: Path):
        if rank() > 0:
            return
        content = {name: getattr(self, name).state_dict() for name in self.PARTS}
        content |= dict(
            kind="student",
            record=asdict(self.record),
            inputs=self.inputs,
            iteration=self.iteration,
            losses=self.losses,
            sums=self.sums.tolist(),
        )
        replace_file(file, lambda opened: torch.save(content, opened))

    def resume(self, file: Path):
        """Continue what a file holds, if it exists. Raises UserError for another training."""
        saved = training.load_training(file, "student", self.record)
        if saved is None:
            return
        try:
            inputs, sums = dict(saved["inputs"]), torch.tensor(saved["sums"])
            rows = [sums, *(row[1:] for row in saved["losses"])]
            if any(len(row) != len(CURVES) for row in rows):
                raise ValueError("its losses are not those of this stage")
            if inputs != self.inputs:
                difference = first_difference(inputs, self.inputs)
                raise UserError(f"{file} has other inputs: {difference}. Choose another --out")
            settings = self.record.gan_training
            is_finished = saved["iteration"] == settings.iterations
            if not sums.isfinite().all() or (is_finished and not saved["losses"]):
                raise ValueError("its losses are missing, or not finite")
            for name in self.PARTS:
                if "optimizer" in name:
                    training.load_optimizer(getattr(self, name), saved[name])
                else:
                    check_finite(saved[name], file)
                    getattr(self, name).load_state_dict(saved[name])
            self.sums += sums.to(self.sums.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is damaged ({one_line(error)}): choose another --out, or remove it"
            ) from None
        self.iteration, self.losses = saved["iteration"], saved["losses"]


# ---- 4. The training -----------------------------------------------------------------------------


def check_settings(gan: GAN, settings: Training, runtime: Runtime):
    """Raises UserError for settings with which this stage cannot work."""
    pieces = world_size() * runtime.accumulate
    if settings.batch % (GROUP * pieces):
        raise UserError(
            f"a batch of {settings.batch} cannot be split into {pieces} micro-batches of whole "
            f"groups of {GROUP}, whose images D compares: choose another --batch or --accumulate"
        )
    if settings.iterations <= gan.warmup:
        raise UserError(
            f"the first {gan.warmup} iterations have no GAN loss, and there are only "
            f"{settings.iterations}: choose a smaller --warmup or more --iterations"
        )
    if settings.on_policy not in (0, 1):
        raise UserError("in this stage on_policy is 0 or 1: all samples read histories of one kind")


def check_student(record: StudentRecord, teacher: DiT):
    """Raises UserError for a student that is not from the first stage, or has another teacher."""
    if record.gan is not None:
        raise UserError("this student has had its second stage: name one of the first with --from")
    if record.teacher not in ("", fingerprint(teacher.state_dict())):
        raise UserError("this student has another teacher: name its own with --teacher")


def check_balance(losses: list[tuple]):
    """Raises UserError where the discriminator has won: the student then learns nothing from it."""
    recent = [accuracy for _, _, _, balance, _, accuracy in losses[-10:] if balance > 0]
    advice = "What was saved before stays; try again with another --out"
    if len(recent) == 10 and min(recent) > 0.99:
        raise UserError(
            "the discriminator is always right, so that nothing can be learned from it: choose a "
            f"higher --noise-level or a lower --discriminator-lr. {advice}"
        )
    _, _, _, balance, _, _ = losses[-1]
    if balance >= 0.9 * LARGEST_WEIGHT:  # a mean: it was at the bound nearly all the time
        raise UserError(
            "λ is at its bound, since the gradient of the GAN loss has vanished: choose a lower "
            f"--discriminator-lr. {advice}"
        )


def train_gan(
    first: DiT,
    record: StudentRecord,
    teacher: DiT,
    trajectories: Trajectories,
    dataset: data.Dataset,
    file: Path,
    runtime: Runtime,
):
    """Fine-tune a copy of the student of the first stage, into the checkpoint `file`. If it exists,
    its training is continued. `record`: the student's record, with `gan` and `gan_training` set.
    Returns (the EMA of the new student, the rows of GANTrainer.log). Raises UserError where
    settings or trajectories do not fit, where a loss is not finite, and where the discriminator
    wins."""
    settings, device = record.gan_training, runtime.device
    check_settings(record.gan, settings, runtime)
    learned = (record.student.ode, record.student.target_steps)
    if (trajectories.ode, trajectories.target_steps) != learned:
        raise UserError("the student has learned from trajectories of another ODE than these")
    inputs = dict(
        first_student=fingerprint(first.state_dict()),
        images=len(dataset),
        trajectories=len(trajectories),
        trajectory_seed=trajectories.seed,
    )
    trainer = GANTrainer(first, record, teacher, runtime, inputs)
    trainer.resume(file)
    print(
        f"fine-tuning with a GAN loss, from iteration {trainer.iteration:,} to "
        f"{settings.iterations:,}, in batches of {settings.batch} on {device} in "
        f"{runtime.precision}, into {file}"
    )
    todo = range(trainer.iteration, settings.iterations)
    progress = Progress("GAN", todo, start=todo.start, unit="images", size=settings.batch)
    clock = training.SaveClock()
    with training.lock_checkpoint(file), training.interrupts() as interrupted:
        for iteration in progress:
            trainer.step(draw_batch(trajectories, dataset, settings, iteration))
            stop = training.any_process(interrupted(), device)
            is_last = trainer.iteration == settings.iterations
            save_now = is_last or stop or training.any_process(clock.due(), device)
            if save_now or trainer.iteration % training.LOG_EVERY == 0:
                progress.note = trainer.log()
            if save_now:
                clock.timed(partial(trainer.save, file))
                wait_for_all()
            if stop:
                raise KeyboardInterrupt(
                    f"{file} holds {trainer.iteration:,} of {settings.iterations:,} iterations; "
                    "the same command continues from there."
                )
    return trainer.ema, trainer.losses


# ---- 5. The program ------------------------------------------------------------------------------


def draw_gan_curves(losses: list[tuple], file: Path):
    """Write a picture of what train_gan returns: a panel for each of CURVES."""
    iterations, *curves = zip(*losses, strict=True)
    figure, axes = new_figure(16, 2.8, columns=len(CURVES))
    for axis, curve, title in zip(axes, curves, CURVES, strict=True):
        axis.plot(iterations, curve)
        axis.set(title=title, xlabel="iteration")
    save_figure(figure, file)


def parse_flags():
    parser = make_parser(__doc__)
    with_gan = [name for name, preset in PRESETS.items() if preset.gan]
    add = parser.add_argument
    add("--preset", choices=with_gan, default="shapes", help="sets everything (default: shapes)")
    add("--from", dest="first", type=Path, metavar="FILE", help="default: runs/PRESET/student.pt")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET-gan)")
    add_teacher_flags(parser)
    add("--trajectories", dest="folder", type=Path, metavar="DIR", help="read or written there")
    add("--data", dest="source", type=data.data_source, help="the real images, if moved")
    add = parser.add_argument_group("the GAN loss").add_argument
    add("--weight", type=non_negative, help="factor of λ; 0: no GAN loss")
    add("--warmup", type=non_negative_int, help="first iterations, without a GAN loss")
    add("--noise-level", type=fraction, help="of the images that D sees; 1 is the noise x_T")
    add("--discriminator-lr", type=non_negative, help="highest learning rate of the discriminator")
    add("--hidden", type=positive_int, help="width of its heads")
    add(
        "--on-policy",
        type=int,
        choices=(0, 1),
        help="the student reads the teacher's history (0) or its own (1)",
    )
    add_training_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    preset = override_parts(PRESETS[flags.preset], flags, "gan", "gan_training")
    runtime = runtime_from(flags, preset.bf16, preset.checkpointing)
    if runtime.dtype == torch.float16:  # λ needs gradients that no scaler has touched
        runtime = replace(runtime, dtype=torch.float32)
    check_settings(preset.gan, preset.gan_training, runtime)
    runs = Path("runs") / flags.preset
    out = output_folder(flags.out or f"{runs}-gan", "result.json", "samples.png")
    first_file = flags.first or runs / "student.pt"
    if not first_file.exists():
        raise UserError(
            f"no student at {first_file}: python distill.py --preset {flags.preset} makes one, and "
            "--from names another"
        )
    first_folder = first_file if first_file.is_dir() else first_file.parent
    teacher, teacher_record = find_teacher(
        flags.teacher_file, flags.preset, first_folder, runtime.device, flags.teacher_kind
    )
    first, record = load_network(first_file, "student", device=runtime.device)
    students = {"R": (first, record)}
    check_student(record, teacher)
    data_config = override(record.data, flags)
    record = replace(record, data=data_config, gan=preset.gan, gan_training=preset.gan_training)
    dataset = data.load(record.data)
    check_same_classes(record.classes, dataset)
    home = first_folder if (first_folder / "trajectories").exists() else runs
    trajectories = open_trajectories(
        teacher,
        replace(teacher_record, ode=record.student.ode),
        TrajectorySettings(
            count=record.trajectories or preset.trajectories.count,  # 0: a public file's, not known
            kept_steps=record.student.target_steps,
            keep=record.student.targets,
        ),
        record.student,
        flags.folder or home / "trajectories",
        runtime,
    )
    ema, losses = train_gan(
        first, record, teacher, trajectories, dataset, out / "student.pt", runtime
    )
    name = "R + G" if preset.gan.weight else "R, longer"
    students[name] = (ema, record)
    if rank() > 0:
        return
    draw_gan_curves(losses, out / "gan.png")
    report(teacher, students, {name: losses}, out, runtime)


if __name__ == "__main__":
    run_program(main)
