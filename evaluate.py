"""Evaluation: how good few steps are, where their errors come from, and what they cost.

All methods start from the same held-out noises, which no network was trained on. For each method
there are:

    calls       network evaluations for an image. Guidance takes two for each Euler step
    error       mean squared error to the image that the teacher makes of the same noise
    distance    Fréchet distance to held-out real images in the features of a small classifier,
                trained on the same data. It compares methods on one data set. It is not the FID
                of papers, which takes the features of another network
    above       the paper's *degradation*: distance minus that of the teacher at full steps
    chance      two standard deviations of `above` when images are resampled
    precision   the fraction of images that lie among the real ones; recall: the reverse
    accuracy    how often the classifier finds the class that was asked for

The images of `scenes` are also read back and compared with their captions (scenes.py). That gives
the fraction of images in which all of the caption is right: for each category of captions; for all
captions; for captions with a pair of colour and shape that no training caption has ("held out");
and, as a control, for the caption of another image.

The paper sums up its Table 1 in one ratio: the degradation of step distillation is 5.1 times that
of ARD. The same ratio is printed here, or a bound where ARD's degradation is within chance.

Each student that reads its history is also sampled with *another sample's* history. If the student
makes use of its history, its images get worse. Exposure bias is the difference between two errors
at each step: one when the student reads its own states, as in sampling, and one when it reads the
teacher's, as in training.

    python evaluate.py                            the shipped student
    python evaluate.py runs/textures runs/other   students of one teacher, side by side

Results go into runs/evaluation: evaluation.json, samples.png, exposure.png and attention.png.
"""

import startup  # noqa: F401  before the large packages

import hashlib
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

import data
from command_line import (
    add_prompts_flag,
    add_teacher_kind,
    make_parser,
    number,
    run_program,
)
from config import ODE, ClassifierRecord, ModelConfig, Student, StudentRecord, Training
from figures import draw_curves, draw_losses, new_figure, plain, save_figure
from files import (
    UserError,
    fingerprint,
    load_checkpoint,
    load_weights,
    output_folder,
    replace_file,
    save_json,
)
from machine import Progress, Runtime, add_machine_flags, runtime_from, synchronise
from metrics import coverage, frechet, moments
from model import history_mask
from pixart import use_prompts
from pretrained import ASSETS, load_network
from sample import few_step, predict_all
from scenes import (
    CATEGORIES,
    adherence,
    caption_list,
    caption_weights,
    indexed_captions,
    read_scene,
)
from teacher import solve
from text import prompt_length
from training import learning_rate, make_optimizer

REPORT_IMAGES = 1000  # of each method, at the end of a training
FEATURES = 64  # of the classifier
ERROR_IMAGES = 256  # of each method, where only errors are measured
HELD_OUT_IMAGES = 256  # of each method, of captions that name a held-out pair
RESAMPLES = 20  # for `chance`
EXPOSURE_SAMPLES = 128
ATTENTION_SAMPLES = 8  # whose attention weights are computed as matrices, which takes memory
PICTURES = 12  # in a row of samples.png
PATHS = 100  # in a panel of samples.png, for points

# ---- 1. The methods that are compared ------------------------------------------------------------


@torch.no_grad()
def few_step_with_shuffled_history(model, student: Student, x_T, y):
    """A control: as `few_step`, but each step reads its own current state after the earlier states
    of *another sample* of the batch. (It runs without the cache, on all states so far. The noise
    shortcut carries the other sample's noise, too.) x_T: (b, c, h, w); y: (b,). Returns
    (b, S + 1, c, h, w). Raises ValueError for a single sample."""
    if len(x_T) < 2:
        raise ValueError("a single sample has no other sample's history to read")
    states = x_T[:, None]                                                   # (b, 1, c, h, w)
    for _ in range(student.steps):
        others = states[:, :-1].roll(1, dims=0)
        read = torch.cat([others, states[:, -1:]], dim=1)
        following = predict_all(model, student, read, y)[:, -1:]
        states = torch.cat([states, following], dim=1)
    return states


@dataclass(frozen=True)
class Method:
    """A way from noise to image."""

    sample: Callable  # (x_T, y) -> states (b, s + 1, c, h, w); the last is the image
    calls: int  # network evaluations for an image
    macs: int  # multiply-accumulates for an image

    def images(self, x_T, y):
        return self.sample(x_T, y)[:, -1]


def teacher_method(teacher, ode: ODE) -> Method:
    calls = ode.euler_steps * ode.calls_per_step
    return Method(
        lambda x_T, y: solve(teacher, ode, x_T, y)[0],
        calls,
        calls * count_macs(teacher.config),
    )


def student_methods(name: str, model, record: StudentRecord) -> dict[str, Method]:
    """A student and, where it reads its history, its control."""
    student, config = record.student, record.model
    methods = {
        student_label(name, record): Method(
            lambda x_T, y: few_step(model, student, x_T, y),
            student.steps,
            count_macs(config, student.steps),
        )
    }
    if record.reads_history:
        methods[f"{name}, another sample's history"] = Method(
            lambda x_T, y: few_step_with_shuffled_history(model, student, x_T, y),
            student.steps,
            sum(count_macs(config, states) for states in range(1, student.steps + 1)),
        )
    return methods


def student_label(name: str, record: StudentRecord) -> str:
    """The label of a student's row."""
    reads = "reads its history" if record.reads_history else "no history"
    return f"{name}, {record.student.steps} steps ({reads})"


def make_methods(teacher, students: dict) -> dict[str, Method]:
    """All methods by their labels: the teacher at full steps, the teacher at the students' numbers
    of steps, then the students, those without history first.
    students: {name: (model, StudentRecord)}, all of this teacher."""
    first, later = {}, {}
    for name, (model, record) in students.items():
        ode = record.student.ode
        for steps in (ode.euler_steps, record.student.steps):
            method = teacher_method(teacher, replace(ode, euler_steps=steps))
            first[f"teacher, {steps} steps"] = method
        group = later if record.reads_history else first
        group |= student_methods(name, model, record)
    return first | later


# ---- 2. Features ---------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (b, c, h, w) to 64 features, and these to the logits of classes: a small convolutional
    network that halves the side until it is 4 or less. (For points, 1×1 images, it is an MLP.)"""

    def __init__(self, channels: int, image_size: int, classes: int):
        super().__init__()
        width, side = 128 if image_size == 1 else 32, image_size
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.GELU()]
        while side > 4:
            wider, side = min(2 * width, 128), (side + 1) // 2
            layers += [
                nn.Conv2d(width, wider, 3, stride=2, padding=1),
                nn.GroupNorm(8, wider),
                nn.GELU(),
            ]
            width = wider
        self.body = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(width * side**2, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x):
        return self.head(self.body(x))


CLASSIFIER_TRAINING = Training(iterations=800, batch=128, lr=2e-3, ema_decay=0.0)


def make_classifier(config, classes: tuple[str, ...], runtime: Runtime) -> Classifier:
    """An untrained classifier for a DataConfig, always with the same random weights."""
    torch.manual_seed(0)
    model = Classifier(config.channels, config.image_size, len(classes))
    return model.to(runtime.device)


def shipped_classifier(config, classes: tuple[str, ...], runtime: Runtime) -> Classifier | None:
    """The classifier in assets/ for a DataConfig, or None. It can be shipped because a procedural
    data set is the same everywhere."""
    file = ASSETS / f"{data.file_name(config.source)}-classifier.pt"
    if not file.exists():
        return None
    saved = load_checkpoint(file, "classifier")
    record = saved["record"]
    if record.data != config or record.classes != classes:
        return None
    model = make_classifier(config, classes, runtime)
    load_weights(model, saved["ema"], file)
    return model


def find_classifier(dataset: data.Dataset, config, runtime: Runtime) -> Classifier:
    """The classifier of a data set, trained if need be. It is kept in runs/classifiers, in a file
    that is named by the content of the data.

    Where all images are of one class, or each has a caption of its own, there is nothing to train
    for. Then the weights stay random: the features of a random convolutional network tell images
    apart, too, if less well."""
    model = make_classifier(config, dataset.classes, runtime)
    if len(dataset.classes) == 1 or dataset.prompts is not None:
        print("there are no classes to tell apart: distances are in features of a random network")
        return model
    record = ClassifierRecord(config, dataset.classes, len(dataset), CLASSIFIER_TRAINING)
    key = content_key(dataset, record)
    file = Path("runs/classifiers") / f"{data.file_name(Path(config.source).name)}-{key}.pt"
    try:
        load_weights(model, load_checkpoint(file, "classifier")["ema"], file)
    except UserError:  # there is none, or it is damaged
        train_classifier(model, dataset, record, file)
    return model


def content_key(dataset: data.Dataset, record: ClassifierRecord) -> str:
    """16 hexadecimal digits that tell these images, labels and settings from others."""
    return hashlib.sha256(repr((record, dataset.content_key())).encode()).hexdigest()[:16]


def train_classifier(model, dataset: data.Dataset, record: ClassifierRecord, file: Path):
    """Train a classifier, in place, and write its checkpoint."""
    device = next(model.parameters()).device
    training = record.training
    optimizer = make_optimizer(model, training.lr)
    iterations = range(training.iterations)
    for i in Progress("classifier", iterations, unit="images", size=training.batch):
        optimizer.param_groups[0]["lr"] = learning_rate(i, training)
        rng = data.stream(1, i)
        images, labels = dataset.draw(training.batch, rng)
        logits = model(images.to(device))
        loss = F.cross_entropy(logits, labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    content = dict(kind="classifier", record=asdict(record), ema=model.state_dict())
    replace_file(file, lambda opened: torch.save(content, opened))


@torch.no_grad()
def features(classifier: Classifier, images, batch: int = 500):
    """Images (N, c, h, w) in [-1, 1] to features (N, 64), float64, and to the classes that the
    classifier finds, (N,); on the CPU. Pictures are first rounded to 8 bits, as real ones are."""
    device = next(classifier.parameters()).device
    found, classes = [], []
    for x in images.split(batch):
        if x.shape[1] in (1, 3):
            pixels = torch.from_numpy(data.to_uint8(x))                     # (b, h, w, c)
            x = rearrange(pixels, "b h w c -> b c h w") / 127.5 - 1
        feature = classifier.body(x.to(device))
        logits = classifier.head(feature)
        found.append(feature.cpu().double())
        classes.append(logits.argmax(dim=1).cpu())
    return torch.cat(found), torch.cat(classes)


# ---- 3. The evaluator ----------------------------------------------------------------------------


class Evaluator:
    """Compares methods with the teacher's images of the same noises, and with real images.

    teacher, ode    whose images all others are compared with, and how they are made
    record          a TeacherRecord or StudentRecord: shape, classes and data. Where the source of
                    its data is None, there are no real images, and only errors are measured
    count           images of each method; fewer where the data set has fewer
    cache           a file that keeps the teacher's images, which take long to make
    test            a folder of real images, instead of the held-out ones of the data

    Raises UserError where the data set is missing, is another one than the network's, or is too
    small."""

    def __init__(
        self,
        teacher,
        record,
        ode: ODE,
        count: int,
        runtime: Runtime,
        cache: Path | None = None,
        test: str | None = None,
    ):
        self.record, self.runtime, self.count = record, runtime, count
        self.classifier, self.real_images = None, None
        self.real_row = {}  # of other real images
        self.has_classes = len(record.classes) > 1 and not record.model.reads_text
        self.has_captions = record.data.source == "scenes"
        if record.data.source is None:
            self.count = min(count, ERROR_IMAGES)
        else:
            self.load_real_images(test)  # there may be fewer than `count`
        _, labels = self.noise(range(self.count))
        self.labels = labels.cpu()
        self.teacher_images, ms = self.make_teacher_images(teacher, ode, cache)
        self.teacher_row = dict(ms=ms, error=0.0)
        if self.classifier is not None:
            self.teacher_features, predicted = features(self.classifier, self.teacher_images)
            distances = self.distances(self.teacher_features, predicted, self.labels)
            self.teacher_row |= distances | dict(above=0.0, chance=0.0)
            run = teacher_method(teacher, ode).images
            self.teacher_row |= self.adherence(run, self.teacher_images, "teacher")

    def load_real_images(self, test: str | None):
        config, classes = self.record.data, self.record.classes
        shipped = shipped_classifier(config, classes, self.runtime)
        needs_all = shipped is None and not self.has_captions  # to train a classifier on
        train_set = data.load(config, count=None if needs_all else self.count)
        if test is None:
            held_out = data.load(config, "test", self.count)
        else:
            held_out = data.load(replace(config, source=test), "all")
        check_same_classes(classes, train_set, held_out)
        self.count = min(self.count, len(train_set))  # as many images in all rows
        self.real_images, real_labels = held_out.some(self.count)
        if min(len(self.real_images), self.count) < data.LEAST_IMAGES:
            raise UserError(
                f"distances need at least {data.LEAST_IMAGES} images of each kind: here are "
                f"{len(self.real_images):,} held-out real images (evaluate.py --test DIR takes "
                f"others), and {self.count:,} to compare (--count; ablation.py: --images)"
            )
        self.classifier = shipped or find_classifier(train_set, config, self.runtime)
        self.real_features, predicted = features(self.classifier, self.real_images)
        if self.has_classes:
            right = (predicted == real_labels).double().mean().item()
            count = len(predicted)
            print(f"the classifier is right on {right:.2%} of {count:,} held-out real images")
        images, labels = train_set.some(self.count)
        found, predicted = features(self.classifier, images)
        self.real_row = self.distances(found, predicted, labels)
        if self.has_captions:
            self.real_row |= caption_scores(images, labels)

    def noise(self, indices):
        """The held-out noises x_T (b, c, h, w) and labels (b,) with these indices."""
        x_T, y = data.noise_and_labels(self.record, data.EVALUATION_SEED, indices)
        return x_T.to(self.runtime.device), y.to(self.runtime.device)

    def generate(self, run, title: str, y=None):
        """The images (N, c, h, w) that run(x_T, y) makes of the held-out noises, and how many
        milliseconds an image took: the median over batches. y: labels (N,), if they are not those
        of the noises."""
        device, at_once = self.runtime.device, self.runtime.samples_at_once
        made, ms = [], []
        # The batches are of about equal size: none is a single sample, which has no other history.
        total = self.count if y is None else len(y)
        batches = torch.arange(total).tensor_split(math.ceil(total / at_once))
        progress = Progress(
            title,
            batches,
            unit="images",
            size=at_once,
            amount=total,
        )
        for indices in progress:
            x_T, labels = self.noise(indices.tolist())
            if y is not None:
                labels = y[indices].to(device)
            synchronise(device)
            began = time.perf_counter()
            with self.runtime.autocast():
                images = run(x_T, labels)
            synchronise(device)
            seconds = time.perf_counter() - began
            ms.append(1000 * seconds / len(indices))
            made.append(images.cpu())
            if not images.isfinite().all():
                raise UserError(
                    f"{title}: some images are not finite. Was the training cut short, or its "
                    "--lr too high?"
                )
        return torch.cat(made), statistics.median(ms)

    def make_teacher_images(self, teacher, ode: ODE, cache: Path | None):
        """The teacher's images, as `generate` returns them: from the cache, if those there were
        made in the same way."""
        weights = fingerprint(teacher.state_dict())
        settings = [weights, ode, self.count, self.record.class_weights, self.runtime]
        key = repr(settings)
        if cache is not None:
            with suppress(Exception):  # there is no such file, or it is damaged
                saved = torch.load(cache, weights_only=True)
                if saved["key"] == key:
                    return saved["images"], saved["ms"]
        method = teacher_method(teacher, ode)
        images, ms = self.generate(method.images, f"teacher, {ode.euler_steps} steps")
        if cache is not None:
            content = dict(key=key, images=images, ms=ms)
            replace_file(cache, lambda opened: torch.save(content, opened))
        return images, ms

    def distances(self, found, predicted, labels) -> dict:
        """The measures of images of which the classifier found the features (N, 64) and predicted
        the classes (N,)."""
        row = dict(
            distance=frechet(moments(found), moments(self.real_features)),
            precision=coverage(found, by=self.real_features),
            recall=coverage(self.real_features, by=found),
        )
        if self.has_classes:
            row["accuracy"] = (predicted == labels).double().mean().item()
        return row

    def __call__(self, run, title: str) -> dict:
        """The row of a method: its error and, where there are real images, the other measures.
        run(x_T, y) -> images (b, c, h, w)."""
        images, ms = self.generate(run, title)
        squares = (images - self.teacher_images).square()
        row = dict(ms=ms, error=squares.mean().item())
        if self.classifier is None:
            return row
        found, predicted = features(self.classifier, images)
        row |= self.distances(found, predicted, self.labels)
        row["above"] = row["distance"] - self.teacher_row["distance"]
        row["chance"] = chance_of(found, self.teacher_features, self.real_features)
        return row | self.adherence(run, images, title)

    def adherence(self, run, images, title: str) -> dict:
        """How well scenes follow their captions, and captions that name a held-out pair. {} for
        other data."""
        if not self.has_captions:
            return {}
        first = len(caption_list())  # index of the first held-out caption
        rng = data.stream(data.EVALUATION_SEED, 0)
        weights = caption_weights(caption_list(held_out=True))
        y = torch.from_numpy(first + rng.choice(len(weights), HELD_OUT_IMAGES, p=weights))
        others, _ = self.generate(run, f"{title}, held-out captions", y)
        row = caption_scores(images, self.labels)
        return row | {"held out": caption_scores(others, y)["all right"]}


def caption_scores(images, y) -> dict[str, float]:
    """Those of scenes.adherence, for images in [-1, 1] of the captions with the indices y. As a
    control, "another's" is the fraction in which all of *another image's* caption is right."""
    known = indexed_captions()
    captions = [known[index] for index in y]
    pixels = rearrange(data.to_uint8(images), "b h w c -> b c h w")
    scenes = [read_scene(image) for image in pixels]
    shifted = captions[1:] + captions[:1]
    return adherence(scenes, captions) | {"another's": adherence(scenes, shifted)["all right"]}


def check_same_classes(classes: tuple[str, ...], *data_sets: data.Dataset):
    """Raises UserError where a data set has other classes than the network. Names are compared only
    where the network has real ones: public networks number their classes, and a single class is
    named after its folder."""
    has_names = len(classes) > 1 and classes[0] != "0"
    for dataset in data_sets:
        other_names = has_names and dataset.classes != classes
        if len(dataset.classes) != len(classes) or other_names:
            raise UserError(
                "the real images are of other classes than the network's: check --data and --test"
            )


def chance_of(found, teacher, real) -> float:
    """Two standard deviations of the degradation over bootstrap samples of the images. found,
    teacher: features (N, 64) of images from the same noises; real: (M, 64)."""
    degradations = []
    for i in range(RESAMPLES):
        rng = data.stream(2, i)
        rows = rng.integers(len(found), size=len(found))  # the same noises in both
        real_rows = rng.integers(len(real), size=len(real))
        reference = moments(real[real_rows])
        distance = frechet(moments(found[rows]), reference)
        teacher_distance = frechet(moments(teacher[rows]), reference)
        degradations.append(distance - teacher_distance)
    return 2 * statistics.stdev(degradations)


def compare(methods: dict[str, Method], evaluator: Evaluator) -> dict[str, dict]:
    """The rows of all methods, of which the first is the teacher at full steps."""
    rows = {}
    for label, method in methods.items():
        row = evaluator(method.images, label) if rows else evaluator.teacher_row
        rows[label] = dict(calls=method.calls, gmacs=method.macs / 1e9) | row
    return rows


def compare_degradations(rows: dict[str, dict], students: dict) -> list[str]:
    """A sentence for each two students of the same steps, targets and training, one with history
    and one without: the degradation without it over the degradation with it."""
    sentences = []
    for name, (_, record) in students.items():
        for other, (_, other_record) in students.items():
            with_history = rows[student_label(name, record)]
            without = rows[student_label(other, other_record)]
            differ = record.reads_history and not other_record.reads_history
            same_student = record.student == other_record.student
            same_training = record.training == other_record.training
            if differ and same_student and same_training and "above" in without:
                ratio = degradation_ratio(without, with_history)
                sentences.append(
                    f"degradation of {other} / degradation of {name}: {ratio} "
                    "(paper, on ImageNet: 5.1)"
                )
    return sentences


def degradation_ratio(without: dict, with_history: dict) -> str:
    """Of two rows. Where the denominator is within chance, a bound."""
    if without["above"] <= without["chance"]:
        return "not known, since the first is within chance"
    if with_history["above"] > with_history["chance"]:
        return f"{without['above'] / with_history['above']:.1f}"
    largest = max(0.0, with_history["above"]) + with_history["chance"]
    return f"> {without['above'] / largest:.1f}, since the second is within chance"


# ---- 4. Exposure bias, and what the history is used for ------------------------------------------


def teacher_trajectory(teacher, student: Student, x_T, y):
    """The teacher's trajectory as the student learns it, (b, S + 1, c, h, w): x_T (b, c, h, w),
    then states or x0 predictions."""
    states, x0 = solve(teacher, student.ode, x_T, y, keep=student.target_steps)
    if student.targets == "states":
        return states
    return torch.cat([x_T[:, None], x0], dim=1)


@torch.no_grad()
def exposure_bias(model, student: Student, trajectory, y) -> dict[str, list[float]]:
    """The student's mean squared error to the teacher's next state at each of its S steps: when it
    reads the teacher's states ("teacher", (S,)), and when it reads its own ("own", (S,)).
    trajectory: (b, S + 1, c, h, w), of `teacher_trajectory`; y: (b,)."""
    predictions = {
        "teacher": predict_all(model, student, trajectory[:, :-1], y),
        "own": few_step(model, student, trajectory[:, 0], y)[:, 1:],
    }
    errors = {}
    for name, states in predictions.items():
        squares = (states - trajectory[:, 1:]).square()
        errors[name] = reduce(squares, "b s c h w -> s", "mean").tolist()
    return errors


@torch.no_grad()
def attention_shares(model, student: Student, states, y) -> list:
    """Where attention goes when a student reads the states (b, S, c, h, w): the mean over samples,
    heads and tokens, (N, S, S), for each history layer, state that reads and state that is read."""
    layers = []

    def watch(module, inputs, output):
        """Compute the weights again, which scaled_dot_product_attention does not return."""
        x, mask, _ = inputs
        S, n = x.shape[1:3]
        qkv = module.qkv(x)                                                 # (b, S, n, 3·width)
        qkv = rearrange(qkv, "b s n (three h d) -> three b h (s n) d", three=3, h=module.heads)
        q, k, _ = qkv
        scores = q @ k.mT / q.shape[-1] ** 0.5                              # (b, h, S·n, S·n)
        visible = history_mask(mask, S, n).to(x.device)
        weights = scores.float().masked_fill(~visible, -math.inf).softmax(dim=-1)
        # Summed over the n keys of a state, and averaged over all else.
        shares = n * reduce(weights, "b h (i n) (j m) -> i j", "mean", n=n, m=n)
        layers.append(shares.tolist())

    blocks = model.blocks[: model.config.history_layers]
    hooks = [block.attn.register_forward_hook(watch) for block in blocks]
    predict_all(model, student, states, y)
    for hook in hooks:
        hook.remove()
    return layers


def measure_curves(teacher, students: dict, evaluator: Evaluator):
    """`exposure_bias` of each student, {name: …}, and `attention_shares` of those that have history
    layers, when they read their own states."""
    curves, shares = {}, {}
    x_T, y = evaluator.noise(range(EXPOSURE_SAMPLES))
    few = slice(ATTENTION_SAMPLES)
    trajectories = {}  # what a student learns -> the teacher's trajectory
    for name, (model, record) in students.items():
        student = record.student
        with evaluator.runtime.autocast():
            key = student.ode, student.target_steps, student.targets
            if key not in trajectories:
                trajectories[key] = teacher_trajectory(teacher, student, x_T, y)
            curves[name] = exposure_bias(model, student, trajectories[key], y)
            if model.config.history_layers > 0 and record.reads_history:
                states = few_step(model, student, x_T[few], y[few])[:, :-1]
                shares[name] = attention_shares(model, student, states, y[few])
    return curves, shares


# ---- 5. Cost -------------------------------------------------------------------------------------


def count_macs(config: ModelConfig, states: int = 1) -> int:
    """Multiply-accumulates when the network reads that many states of a trajectory, in one pass or
    one by one with a cache. DiT-XL/2 and one state: 118.6 G, which papers call FLOPs."""
    n, d = config.tokens, config.width
    values = config.channels * config.patch**2
    outputs = 2 * values if config.learn_sigma else values
    # The patch embedding; in a layer, qkv has 3·d² weights, proj 1 and the MLP 8; the output.
    per_token = values * d + config.depth * 12 * d * d + d * outputs
    # The modulation of each layer and of the output; in a text network, all layers share one.
    modulation = 6 * d * d if config.reads_text else (6 * config.depth + 2) * d * d
    per_state = 256 * d + d * d + modulation  # with the timestep's 256 sinusoids and its MLP
    # A state attends to itself in all layers, and to earlier ones in the history layers.
    earlier = {
        "none": 0,
        "window": states - 1,
        "anchor": states - 1,
        "causal": states * (states - 1) // 2,
    }[config.mask]
    pairs = config.depth * states + config.history_layers * earlier
    per_pair = 2 * n * n * d  # q·k, and the weighted sum of values
    shortcut = n * d * d if config.noise_shortcut else 0  # for x_T only
    prompt = 0
    if config.reads_text:
        # Cross-attention has as many weights for a token (q, proj) as for a word (k and v), and
        # each token attends to each word.
        words = prompt_length(config.text_width)
        per_token += config.depth * 2 * d * (d + words)
        prompt = words * d * (config.text_width + d + config.depth * 2 * d)  # once for all states
    return states * (n * per_token + per_state) + pairs * per_pair + shortcut + prompt


# ---- 6. Tables and figures -----------------------------------------------------------------------


def table(rows: dict[str, dict], columns: dict[str, str]) -> str:
    """Rows {label: {column: value}} as text. `columns` gives the format of each column that is
    shown. A value that a row does not have is left blank, a column without any is left out."""
    used = set().union(*rows.values())
    columns = {column: kind for column, kind in columns.items() if column in used}
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f" {column:>10}" for column in columns)]
    for label, row in rows.items():
        line = f"{label:{width}}"
        for column, kind in columns.items():
            text = format(row[column], kind) if column in row else ""
            line += f" {text:>10}"
        lines.append(line)
    return "\n".join(lines)


def draw_paths(paths: dict[str, torch.Tensor], y, real, file: Path):
    """Draw points: a panel for each method. `paths` has a method's paths from noise to image,
    (b, s + 1, 2, 1, 1), which are coloured by class, over real points (M, 2, 1, 1) in grey. A red
    line leads from the end of each path to the end of the first method's path from the same
    noise."""
    figure, axes = new_figure(3.4 * len(paths), 3.8, columns=len(paths))
    goals = next(iter(paths.values()))[:, -1, :, 0, 0]
    for axis, (label, states) in zip(axes, paths.items(), strict=True):
        axis.plot(*real[:, :, 0, 0].T, ".", color="0.85", markersize=2)
        for path, goal, k in zip(states[..., 0, 0], goals, y.tolist(), strict=True):
            axis.plot(*path.T, f"C{k}.-", linewidth=0.7, markersize=2, alpha=0.35)
            axis.plot(*path[-1], f"C{k}o", markersize=3.5)
            axis.plot(*torch.stack([path[-1], goal]).T, "r-", linewidth=2)
        axis.set_title(plain(label).replace(" (", "\n("), fontsize=9)
        axis.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[])
    save_figure(figure, file)


def draw_samples(methods: dict[str, Method], evaluator: Evaluator, file: Path):
    """The first held-out noises through all methods: their images, or of points their paths."""
    is_points = evaluator.record.model.image_size == 1
    x_T, y = evaluator.noise(range(PATHS if is_points else PICTURES))
    states = {}
    for label, method in methods.items():
        with evaluator.runtime.autocast():
            states[label] = method.sample(x_T, y).cpu()
    if is_points:
        draw_paths(states, y, evaluator.real_images[:1500], file)
    else:
        images = {label: sample[:, -1] for label, sample in states.items()}
        data.draw_images(images, file, title="same noise and class in a column")


def draw_exposure(errors: dict[str, dict], file: Path):
    """errors: {name of a student: what `exposure_bias` returns}."""
    curves = []
    for i, (name, both) in enumerate(errors.items()):
        steps = range(1, len(both["own"]) + 1)
        curves.append((steps, both["teacher"], f"C{i}o--", f"{name}, reads the teacher's states"))
        curves.append((steps, both["own"], f"C{i}o-", f"{name}, reads its own states"))
    draw_curves(
        curves,
        file,
        title="Exposure bias is the gap between solid and dashed",
        xlabel="step",
        ylabel="mean squared error to the teacher's next state",
    )


def draw_attention(shares: dict[str, list], file: Path):
    """Which states the last step reads, layer by layer, for each student, {name: (N, S, S)}."""
    figure, axes = new_figure(4.4 * len(shares), 3.8, columns=len(shares))
    for axis, (name, layers) in zip(axes, shares.items(), strict=True):
        cells = 100 * np.array(layers)[:, -1]                               # (N, S)
        axis.imshow(
            cells,
            vmin=0,
            vmax=100,
            cmap="Blues",
            origin="lower",
            aspect="auto",
        )
        for (layer, state), cell in np.ndenumerate(cells):
            axis.text(
                state,
                layer,
                f"{cell:.0f}",
                color="C3",
                ha="center",
                va="center",
            )
        states = ["x_T", *(f"state {i}" for i in range(1, cells.shape[1]))]
        axis.set_xticks(range(len(states)), states)
        axis.set_yticks(range(len(layers)))
        axis.set_ylabel("layer, counted from 0")
        axis.set_title(f"{plain(name)}: what the last step reads, %")
    save_figure(figure, file)


# ---- 7. The comparison, at the end of a training and as a program --------------------------------

COLUMNS = {"calls": "d", "error": ".6f", "distance": ".3f", "above": ".3f", "chance": ".3f"}
ADHERENCE_COLUMNS = dict.fromkeys((*CATEGORIES, "all right", "held out", "another's"), ".3f")
MORE_COLUMNS = dict(gmacs=".4f", ms=".2f", precision=".3f", recall=".3f", accuracy=".3f")
LEGEND = """
calls: network evaluations for an image. error: mean squared error to the teacher's full-step image
of the same noise. distance: Fréchet distance to real images in the features of a small classifier
(not FID). above: distance minus the teacher's. chance: two standard deviations of that.
"""
ADHERENCE_LEGEND = """
one, two, relation, count: the fraction of images in which all of the caption is right, for captions
of each kind. held out: of captions that name a pair of colour and shape which no training caption
names. another's: of the caption of another image, by chance.
"""


def show_comparison(
    teacher, students: dict, evaluator: Evaluator, file: Path, full: bool, losses=None
):
    """The whole comparison: writes its numbers, and the losses of the training, into a JSON file,
    prints the table, and draws figures beside the file. `full`: with all columns, and a row of
    other real images."""
    methods = make_methods(teacher, students)
    rows = compare(methods, evaluator)
    ratios = compare_degradations(rows, students)
    columns = COLUMNS | MORE_COLUMNS if full else COLUMNS
    if full and evaluator.real_row:
        rows["other real images"] = evaluator.real_row
    errors, shares = measure_curves(teacher, students, evaluator)
    content = dict(
        images=evaluator.count,
        device=str(evaluator.runtime.device),
        rows=rows,
        ratios=ratios,
        exposure_bias=errors,
        attention=shares,
        students={name: asdict(record) for name, (_, record) in students.items()},
        losses=losses,
    )
    save_json(file, content)
    legend = LEGEND
    if evaluator.has_captions:
        columns, legend = columns | ADHERENCE_COLUMNS, LEGEND + ADHERENCE_LEGEND
    print(f"\n{evaluator.count:,} images of each method, from the same noises\n")
    print(table(rows, columns), legend, *ratios, "", sep="\n")

    draw_samples(methods, evaluator, file.with_name("samples.png"))
    draw_exposure(errors, file.with_name("exposure.png"))
    if shares:
        draw_attention(shares, file.with_name("attention.png"))
    print(f"wrote {file.name}, samples.png and other figures into {file.parent}")


def report(teacher, students: dict, losses: dict[str, list], out: Path, runtime: Runtime):
    """The end of a training: the comparison as a table, result.json and figures in `out`.
    students: {name: (model, StudentRecord)}, all of this teacher and of one ODE;
    losses: {name: [(iteration, mean loss, …), …]}."""
    _, record = next(iter(students.values()))
    ode = record.student.ode
    try:
        evaluator = Evaluator(teacher, record, ode, REPORT_IMAGES, runtime)
    except UserError as error:
        print(f"there are no distances to real images: {error}")
        record = replace(record, data=replace(record.data, source=None))
        evaluator = Evaluator(teacher, record, ode, REPORT_IMAGES, runtime)
    file = out / "result.json"
    show_comparison(teacher, students, evaluator, file, full=False, losses=losses)
    draw_losses(losses, out / "loss.png")


def image_shape(record) -> tuple[int, ...]:
    """What a student and its teacher have in common."""
    config = record.model
    return config.channels, config.image_size, config.classes


def find_students(runs: list[Path], device) -> dict:
    """{name: (model, StudentRecord)} of run folders and files. A folder stands for its student.pt
    and, where there is one, its no-history.pt. Raises UserError where two have one name, and where
    their teachers or ODEs differ."""
    files = []
    for run in runs:
        is_file = run.is_file() or run.suffix == ".pt"
        files.append(run if is_file else run / "student.pt")
        if (run / "no-history.pt").exists():
            files.append(run / "no-history.pt")
    students, teachers = {}, set()
    for file in files:
        folder = file.resolve().parent.name
        names = {"student": folder, "no-history": f"{folder}, no-history.pt"}
        name = names.get(file.stem, file.stem)
        if name in students:
            raise UserError(f"two students are called {name}: rename a folder or file")
        model, record = load_network(file, "student", device=device)
        students[name] = model, record
        teachers.add((record.teacher, record.student.ode, image_shape(record)))
    if len(teachers) > 1:
        raise UserError(
            "these students have learned from different teachers, or with different guidance, "
            "Euler steps or images: evaluate them one at a time"
        )
    return students


def find_teacher_of(
    record: StudentRecord, run: Path, file: Path | None, device, teacher_kind: str | None = None
):
    """The teacher of a student: `file`, or else one with the right weights beside the student, in
    runs/ or in assets/. Raises UserError where there is none, or `file` is another one."""
    if file is not None:
        model, its = load_network(file, "teacher", device=device, teacher_kind=teacher_kind)
        # A public student does not say who its teacher was.
        is_other = record.teacher not in ("", fingerprint(model.state_dict()))
        if is_other or (record.teacher == "" and image_shape(its) != image_shape(record)):
            raise UserError(f"{file} is not the teacher of {run}")
        return model
    places = [run / "teacher.pt", run.parent / "teacher.pt"]
    places += Path("runs").glob("*/teacher.pt")
    places += ASSETS.glob("*-teacher.pt")
    for place in places:
        with suppress(UserError):  # there is none, or it is damaged: another may be right
            model, _ = load_network(place, "teacher", device=device, teacher_kind=teacher_kind)
            if record.teacher == fingerprint(model.state_dict()):
                return model
    raise UserError(f"the teacher of {run} was not found: name its checkpoint with --teacher")


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    shipped = ASSETS / "textures-student.pt"
    add("runs", type=Path, nargs="*", default=[shipped], metavar="RUN", help="folders or students")
    add("--teacher", type=Path, metavar="FILE", help="checkpoint (default: found by its weights)")
    add_teacher_kind(parser)
    add_prompts_flag(parser)
    folder = dict(metavar="DIR", type=data.data_source)
    add("--data", **folder, help="the data set, if it is not where the teacher saw it")
    add("--test", **folder, help="real images to compare with (default: the held-out ones)")
    add("--count", type=number(int, 2), default=5000, help="images of each (default: 5000)")
    add("--out", type=Path, default=Path("runs/evaluation"), help="default: runs/evaluation")
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    if flags.teacher_kind and flags.teacher is None:
        raise UserError("--teacher-kind says what a published --teacher is: name that, too")
    runtime = runtime_from(flags)
    out = output_folder(flags.out, "evaluation.json", "samples.png")
    students = find_students(flags.runs, runtime.device)
    for name, (model, record) in students.items():
        students[name] = model, use_prompts(model, record, flags.prompts)
    model, record = next(iter(students.values()))
    teacher = find_teacher_of(
        record, flags.runs[0], flags.teacher, runtime.device, flags.teacher_kind
    )
    teacher.prompts = model.prompts
    if flags.data:
        record = replace(record, data=replace(record.data, source=flags.data))
    ode = record.student.ode
    evaluator = Evaluator(teacher, record, ode, flags.count, runtime, test=flags.test)
    show_comparison(teacher, students, evaluator, out / "evaluation.json", full=True)


if __name__ == "__main__":
    run_program(main)
