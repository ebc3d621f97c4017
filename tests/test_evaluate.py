"""The controls, exposure bias and attention against their definitions, costs against PyTorch's own
count, and the evaluator on data sets of every kind."""

import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from config import (
    MASKS,
    ODE,
    ClassifierRecord,
    DataConfig,
    ModelConfig,
    TeacherRecord,
    parse_size,
)
from data import SHAPES, Dataset, load
from evaluate import (
    Classifier,
    Evaluator,
    attention_shares,
    chance_of,
    check_same_classes,
    compare_degradations,
    content_key,
    count_macs,
    degradation_ratio,
    exposure_bias,
    features,
    few_step_with_shuffled_history,
    find_classifier,
    find_students,
    find_teacher_of,
    make_methods,
    report,
    table,
    teacher_trajectory,
)
from files import UserError, export, fingerprint, load_checkpoint
from model import DiT
from sample import few_step, predict_all
from scenes import caption_list, caption_weights, draw_scene, indexed_captions, place
from teacher import solve
from text import TEXT_WIDTH, prompt_length, scene_prompts
from tiny import CPU, FLOW_8, TRAINING, random_dit, random_weights, student_of


@pytest.fixture
def quick_classifier(tmp_path, monkeypatch):
    """Classifiers are trained for a moment, into an empty folder."""
    monkeypatch.chdir(tmp_path)
    training = replace(evaluate.CLASSIFIER_TRAINING, iterations=20)
    monkeypatch.setattr(evaluate, "CLASSIFIER_TRAINING", training)
    monkeypatch.setattr(evaluate, "EXPOSURE_SAMPLES", 16)
    monkeypatch.setattr(evaluate, "PATHS", 10)
    monkeypatch.setattr(evaluate, "REPORT_IMAGES", 80)


def trained_on(data: DataConfig, classes, **changes):
    """A teacher with random weights for a data set, and its record."""
    config = ModelConfig(
        image_size=data.image_size,
        channels=data.channels,
        classes=len(classes),
        **(parse_size("N/1" if data.image_size == 1 else "N/4") | changes),
    )
    record = TeacherRecord(
        model=config,
        ode=ODE("flow", "v", euler_steps=2),
        data=data,
        classes=tuple(classes),
        class_weights=(),
        images=9,
        training=TRAINING,
    )
    return random_weights(DiT(config)), record


def student_for(record, seed=0, **changes):
    """A student with random weights for such a teacher's record, and its own record."""
    _, like = student_of(random_dit(), **changes)
    config = replace(
        record.model,
        mask=like.model.mask,
        history_layers=like.model.history_layers,
        noise_shortcut=like.model.noise_shortcut,
    )
    own = replace(like, model=config, data=record.data, classes=record.classes)
    return random_weights(DiT(config), seed), own


# ---- the control ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("output_layer_per_step", [False, True])
def test_shuffled_history_is_that_of_another_sample(shortcut, output_layer_per_step):
    x_T, y = torch.randn(3, 3, 8, 8), torch.tensor([1, 1, 1])
    changes = dict(noise_shortcut=shortcut, output_layer_per_step=output_layer_per_step)
    model, record = student_of(random_dit(), **changes)
    random_weights(model)
    own = few_step(model, record.student, x_T, y)
    other = few_step_with_shuffled_history(model, record.student, x_T, y)
    torch.testing.assert_close(own[:, 1], other[:, 1])  # the first step has no history yet
    assert (own[:, -1] - other[:, -1]).abs().mean() > 1e-3

    # By hand, the second step of sample 1, which reads the noise of sample 0.
    read = torch.stack([x_T[0], own[1, 1]])[None]
    timesteps = torch.tensor(record.student.timesteps[:2])
    with torch.no_grad():
        v = model(read, timesteps, y[1:2])[0, 1]
    torch.testing.assert_close(other[1, 2], own[1, 1] - 0.25 * v, rtol=1e-4, atol=1e-5)

    same = x_T[:1].expand(3, -1, -1, -1)  # the neighbour's history is one's own
    torch.testing.assert_close(
        few_step_with_shuffled_history(model, record.student, same, y),
        few_step(model, record.student, same, y),
    )
    with pytest.raises(ValueError, match="no other sample"):
        few_step_with_shuffled_history(model, record.student, x_T[:1], y[:1])


def test_without_history_there_is_nothing_to_shuffle():
    x_T, y = torch.randn(3, 3, 8, 8), torch.tensor([1, 1, 1])
    model, record = student_of(random_dit(), history_layers=0)
    torch.testing.assert_close(
        few_step_with_shuffled_history(model, record.student, x_T, y),
        few_step(model, record.student, x_T, y),
    )


def test_the_noise_shortcut_alone_is_a_history():
    model, record = student_of(random_dit(), history_layers=0, noise_shortcut=True)
    random_weights(model)
    x_T, y = torch.randn(3, 3, 8, 8), torch.tensor([1, 1, 1])
    other = few_step_with_shuffled_history(model, record.student, x_T, y)
    assert (other - few_step(model, record.student, x_T, y))[:, -1].abs().mean() > 1e-3
    labels = list(make_methods(random_dit(), {"ARD": (model, record)}))
    assert labels[-1] == "ARD, another sample's history"


def test_the_methods_and_their_calls():
    teacher = random_dit()
    with_history, record = student_of(teacher)
    without, plain = student_of(teacher, history_layers=0)
    ode = replace(FLOW_8, guidance_scale=2.0)
    students = {}
    for name, model, one in (("ARD", with_history, record), ("step distillation", without, plain)):
        students[name] = (model, replace(one, student=replace(one.student, ode=ode)))
    methods = make_methods(teacher, students)
    assert {label: method.calls for label, method in methods.items()} == {
        "teacher, 8 steps": 16,
        "teacher, 4 steps": 8,
        "step distillation, 4 steps (no history)": 4,
        "ARD, 4 steps (reads its history)": 4,
        "ARD, another sample's history": 4,
    }
    x_T, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    states, _ = solve(teacher, ode, x_T, y)
    full = methods["teacher, 8 steps"]
    assert torch.equal(full.images(x_T, y), states[:, -1])
    one_state, causal = count_macs(teacher.config), count_macs(record.model, 4)
    assert full.macs == 16 * one_state
    assert methods["step distillation, 4 steps (no history)"].macs == 4 * one_state
    assert methods["ARD, 4 steps (reads its history)"].macs == causal > 4 * one_state
    shuffled = methods["ARD, another sample's history"].macs
    assert shuffled == sum(count_macs(record.model, s) for s in (1, 2, 3, 4)) > 10 * one_state


# ---- exposure bias and attention -----------------------------------------------------------------


def test_exposure_bias_starts_at_zero():
    teacher = random_dit()
    model, record = student_of(random_dit(seed=1))
    x_T, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    every, x0 = solve(teacher, FLOW_8, x_T, y)
    truth = teacher_trajectory(teacher, record.student, x_T, y)
    torch.testing.assert_close(truth, every[:, ::2])
    errors = exposure_bias(model, record.student, truth, y)
    assert len(errors["teacher"]) == len(errors["own"]) == 4
    assert errors["teacher"][0] == pytest.approx(errors["own"][0], rel=1e-4)  # both read x_T
    assert abs(errors["teacher"][3] - errors["own"][3]) > 1e-3

    own = few_step(model, record.student, x_T, y)
    wrong = (own[:, 4] - truth[:, 4]).square().mean().item()
    assert errors["own"][3] == pytest.approx(wrong, rel=1e-5)
    timesteps = torch.tensor(record.student.timesteps)
    with torch.no_grad():
        last = model(truth[:, :4], timesteps, y)[:, 3]
    wrong = (truth[:, 3] - 0.25 * last - truth[:, 4]).square().mean().item()
    assert errors["teacher"][3] == pytest.approx(wrong, rel=1e-5)

    student = replace(record.student, targets="x0", output="state")
    truth = teacher_trajectory(teacher, student, x_T, y)
    torch.testing.assert_close(truth, torch.cat([x_T[:, None], x0[:, 1::2]], dim=1))
    errors = exposure_bias(model, student, truth, y)
    with torch.no_grad():
        last = model(truth[:, :4], timesteps, y)[:, 3]
    wrong = (last - x0[:, 7]).square().mean().item()
    assert errors["teacher"][3] == pytest.approx(wrong, rel=1e-4)


@pytest.mark.parametrize("mask", ["window", "anchor", "causal"])
def test_attention_is_that_of_a_masked_softmax(mask):
    """The first layer's shares, from its queries and keys and a mask over all tokens."""
    model, record = student_of(random_dit(), mask=mask)
    states, y = torch.randn(3, 4, 3, 8, 8), torch.tensor([0, 4, 2])
    caught = {}
    attention = model.blocks[0].attn
    hook = attention.register_forward_pre_hook(lambda layer, args: caught.update(x=args[0]))
    shares = attention_shares(model, record.student, states, y)
    hook.remove()
    assert len(shares) == 2  # history layers
    assert not attention._forward_hooks

    with torch.no_grad():
        qkv = attention.qkv(caught["x"])  # 4 states of 4 tokens; 4 heads of 16 features
    q, k, _ = qkv.view(3, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    i = torch.arange(16) // 4
    seen = {
        "window": i[:, None] - i <= 1,
        "anchor": (i == 0) | (i == i[:, None]),
        "causal": True,
    }[mask]
    visible = (i <= i[:, None]) & seen
    scores = (q @ k.mT / math.sqrt(16)).masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).view(3, 4, 4, 4, 4, 4)  # b, h, s n, s n
    expected = weights.sum(-1).mean((0, 1, 3))
    assert 0.05 < expected[3, 3] < 0.95
    torch.testing.assert_close(torch.tensor(shares[0]), expected, rtol=1e-4, atol=1e-5)


# ---- cost ----------------------------------------------------------------------------------------


def counted(config: ModelConfig, states: int) -> float:
    """Multiply-accumulates as PyTorch counts them: a MAC is two FLOPs."""
    with torch.device("meta"):
        model = DiT(config)
        x = torch.empty(1, states, config.channels, config.image_size, config.image_size)
        y, timesteps = torch.empty(1, dtype=torch.long), torch.empty(1, states)
        if config.reads_text:
            length = prompt_length(config.text_width)
            model.prompts = {y: torch.empty(1, length, config.text_width)}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x, timesteps, y)
    assert torch.ops.aten.bmm in counter.get_flop_counts()["Global"]  # attention was seen
    return counter.get_total_flops() / 2


def network(**changes) -> ModelConfig:
    size = dict(patch=2, width=32, depth=3, heads=4)
    return ModelConfig(**dict(image_size=8, channels=3, classes=5, **size) | changes)


@pytest.mark.parametrize("mask", ["none", "window", "anchor", "causal"])
@pytest.mark.parametrize("states", [1, 4])
def test_macs_are_those_that_pytorch_counts(mask, states):
    plain = network(mask=mask, history_layers=2)
    assert count_macs(plain, states) == counted(plain, states)
    shortcut = replace(plain, noise_shortcut=True)
    assert count_macs(shortcut, states) == counted(shortcut, states)
    assert count_macs(shortcut, states) - count_macs(plain, states) == 16 * 32 * 32  # of x_T only
    more = replace(plain, learn_sigma=True, output_layers=states)
    assert count_macs(more, states) == counted(more, states) > count_macs(plain, states)
    for width in (TEXT_WIDTH, 100):  # prompts of 8 words, or of 120 tokens
        text = replace(plain, text_width=width)
        assert count_macs(text, states) == counted(text, states)


def test_the_papers_cost_of_history():
    public = ModelConfig(
        image_size=32, channels=4, classes=1000, learn_sigma=True, **parse_size("XL/2")
    )
    assert round(count_macs(public) / 1e9, 1) == 118.6
    assert count_macs(public) == counted(public, 1)
    giga = {}
    for mask in MASKS:
        giga[mask] = count_macs(replace(public, mask=mask, history_layers=6), 4) / 1e9
    assert giga["none"] == pytest.approx(474.6, abs=0.2)
    assert giga["causal"] == pytest.approx(479.9, abs=0.2)
    half = pytest.approx((474.6 + 479.9) / 2, abs=0.2)
    assert giga["window"] == half and giga["anchor"] == half


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size, channels", [(16, 3), (32, 1), (1, 2), (20, 3), (32, 4)])
def test_features(image_size, channels):
    torch.manual_seed(0)
    images = torch.randint(256, (7, channels, image_size, image_size)) / 127.5 - 1
    classifier = Classifier(channels, image_size, classes=4)
    found, predicted = features(classifier, images, batch=3)
    assert found.shape == (7, 64) and found.dtype == torch.float64 and predicted.shape == (7,)
    one, _ = features(classifier, images[4:5])
    torch.testing.assert_close(found[4:5], one, rtol=1e-4, atol=1e-5)
    nearly, _ = features(classifier, images + 1e-3, batch=3)  # pictures are rounded to 8 bits
    assert torch.equal(nearly, found) == (channels in (1, 3))


def some_images(count=40, classes=2, value=0):
    rng = np.random.default_rng(value)
    images = rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return Dataset(images, np.arange(count) % classes, [str(i) for i in range(classes)])


def test_a_classifier_is_kept_by_the_content_of_its_data(quick_classifier, tmp_path, capsys):
    """Another folder with as many images, or other labels, has another classifier."""
    config = DataConfig("some/folder", image_size=8, channels=3)
    first = find_classifier(some_images(), config, CPU)
    other = find_classifier(some_images(value=1), config, CPU)
    assert fingerprint(first.state_dict()) != fingerprint(other.state_dict())
    files = sorted((tmp_path / "runs/classifiers").iterdir())
    assert [file.name[:7] for file in files] == ["folder-", "folder-"]

    times = [file.stat().st_mtime_ns for file in files]
    again = find_classifier(some_images(), config, CPU)
    assert fingerprint(first.state_dict()) == fingerprint(again.state_dict())
    assert [file.stat().st_mtime_ns for file in files] == times  # it was read
    files[0].write_bytes(files[0].read_bytes()[:1000])  # damaged: it is trained again
    files[1].unlink()
    for value, model in ((0, first), (1, other)):
        again = find_classifier(some_images(value=value), config, CPU)
        assert fingerprint(again.state_dict()) == fingerprint(model.state_dict())

    swapped = some_images()
    swapped.labels = swapped.labels[::-1].copy()
    flipped = replace(config, flip=True)
    keys = set()
    for dataset, one in ((some_images(), config), (swapped, config), (some_images(), flipped)):
        record = ClassifierRecord(one, dataset.classes, len(dataset), TRAINING)
        keys.add(content_key(dataset, record))
    assert len(keys) == 3


def test_a_classifier_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = replace(evaluate.CLASSIFIER_TRAINING, iterations=400)
    monkeypatch.setattr(evaluate, "CLASSIFIER_TRAINING", training)
    config = DataConfig("points", image_size=1, channels=2)
    classifier = find_classifier(load(config, count=2000), config, CPU)
    images, labels = load(config, "test", count=500).some(500)
    _, predicted = features(classifier, images)
    assert (predicted == labels).double().mean() > 0.9


def test_one_class_has_random_features(quick_classifier, capsys):
    config = DataConfig("faces", image_size=8, channels=3)
    first = find_classifier(some_images(classes=1), config, CPU)
    second = find_classifier(some_images(classes=1, value=1), config, CPU)
    assert "features of a random network" in capsys.readouterr().out
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def test_classes_must_be_those_of_the_network():
    images = some_images(classes=3)
    check_same_classes(("0", "1", "2"), images)
    check_same_classes(("face",), some_images(classes=1))  # one class has any name
    images.classes = ("ant", "bee", "cat")
    check_same_classes(("0", "1", "2"), images)  # a public network does not name its classes
    for classes in (("ant", "bee", "dog"), ("ant", "bee"), ("0", "1")):
        with pytest.raises(UserError, match="other classes"):
            check_same_classes(classes, images)


# ---- the evaluator -------------------------------------------------------------------------------

EIGHT_PIXELS = DataConfig("shapes", image_size=8, channels=3)


def test_evaluator(tmp_path, quick_classifier, few_shapes, monkeypatch):
    """The teacher's images have no error, others have theirs; what is not finite is refused."""
    teacher, record = trained_on(EIGHT_PIXELS, SHAPES)
    ode = record.ode
    evaluator = Evaluator(teacher, record, ode, 300, CPU)
    assert len(evaluator.real_images) == evaluator.count == 300

    def full(x_T, y):
        return solve(teacher, ode, x_T, y)[0][:, -1]

    row = evaluator(full, "the same")
    assert row["error"] == row["above"] == row["chance"] == 0
    assert row | dict(ms=0) == evaluator.teacher_row | dict(ms=0)
    worse = evaluator(lambda x_T, y: full(x_T, y) + 0.5, "brighter")
    assert worse["error"] == pytest.approx(0.25, rel=1e-5)
    assert worse["above"] == pytest.approx(worse["distance"] - row["distance"]) != 0
    assert worse["chance"] > 0
    with pytest.raises(UserError, match="broken: some images are not finite"):
        evaluator(lambda x_T, y: x_T / 0, "broken")
    with pytest.raises(UserError, match="at least 70 images of each kind"):
        Evaluator(teacher, record, ode, 69, CPU)


def test_batches_are_never_a_single_sample(quick_classifier, few_shapes):
    teacher, record = trained_on(EIGHT_PIXELS, SHAPES)
    sizes = []

    def run(x_T, y):
        sizes.append(len(y))
        return x_T

    record = replace(record, data=replace(record.data, source=None))
    evaluator = Evaluator(teacher, record, record.ode, 65, CPU)
    row = evaluator(run, "any")
    assert sorted(sizes) == [21, 22, 22]
    assert set(row) == {"ms", "error"}  # without data, there are no distances


def test_the_cache_holds_the_images_of_this_teacher_only(
    tmp_path, quick_classifier, few_shapes, monkeypatch
):
    cache = tmp_path / "cache.pt"
    config = replace(EIGHT_PIXELS, source=None)
    teacher, record = trained_on(config, SHAPES)

    def target(teacher=teacher, ode=record.ode, count=80):
        return Evaluator(teacher, record, ode, count, CPU, cache=cache).teacher_images

    first = target()
    whole = cache.read_bytes()
    cache.write_bytes(whole[:1000])
    assert torch.equal(target(), first)  # damaged: it is made again
    with monkeypatch.context() as patch:
        patch.setattr("evaluate.solve", None)
        assert torch.equal(target(), first)  # it is read
    other_teacher = random_weights(DiT(record.model), seed=1)
    assert not torch.equal(target(teacher=other_teacher), first)
    assert not torch.equal(target(ode=replace(record.ode, euler_steps=3)), first)
    assert torch.equal(target(count=70), first[:70])


def write_folder(root, classes, count, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{seed}-{i}.png")


def test_a_small_folder_and_a_test_folder(tmp_path, quick_classifier):
    """All rows have as many images as the training set, where that is smaller than --count."""
    write_folder(tmp_path / "mine", ["ant", "bee"], 60)
    config = DataConfig(str(tmp_path / "mine"), image_size=8, channels=3)
    teacher, record = trained_on(config, ["ant", "bee"])
    with pytest.raises(UserError, match="at least 70 images of each kind: here are"):
        Evaluator(teacher, record, record.ode, 2000, CPU)  # too few are held out

    write_folder(tmp_path / "test", ["ant", "bee"], 36, seed=1)
    arguments = (teacher, record, record.ode, 2000, CPU)
    evaluator = Evaluator(*arguments, test=str(tmp_path / "test"))
    train_images = len(load(config))
    assert 70 <= train_images < 120
    assert len(evaluator.teacher_images) == evaluator.count == train_images
    assert len(evaluator.real_images) == 72  # all of the test folder
    assert {"distance", "precision", "recall", "accuracy"} == set(evaluator.real_row)
    (tmp_path / "test/bee").rename(tmp_path / "test/cat")
    with pytest.raises(UserError, match="other classes"):
        Evaluator(*arguments, test=str(tmp_path / "test"))


def test_images_of_one_class(tmp_path, quick_classifier, capsys):
    write_folder(tmp_path, ["faces"], 500)
    write_folder(tmp_path, ["others"], 400, seed=1)
    config = DataConfig(str(tmp_path / "faces"), image_size=8, channels=3)
    teacher, record = trained_on(config, ["faces"])
    evaluator = Evaluator(teacher, record, record.ode, 400, CPU, test=str(tmp_path / "others"))
    assert "features of a random network" in capsys.readouterr().out
    assert "accuracy" not in evaluator.teacher_row
    grey = evaluator(lambda x_T, y: 0.1 * x_T, "almost grey")
    assert grey["distance"] > 5 * evaluator.real_row["distance"] > 0


def test_a_shipped_classifier_is_used_for_its_own_data(
    tmp_path, quick_classifier, few_shapes, monkeypatch
):
    monkeypatch.setattr(evaluate, "ASSETS", tmp_path)
    training = evaluate.CLASSIFIER_TRAINING
    model = random_weights(Classifier(3, 8, 10))
    record = ClassifierRecord(EIGHT_PIXELS, SHAPES, 300, training)
    export(tmp_path / "shapes-classifier.pt", "classifier", asdict(record), model.state_dict())
    found = evaluate.shipped_classifier(EIGHT_PIXELS, SHAPES, CPU)
    assert found.head.bias.dtype == torch.float32
    torch.testing.assert_close(found.head.bias, model.head.bias, rtol=1e-3, atol=1e-3)
    others = (
        (replace(EIGHT_PIXELS, image_size=16), SHAPES),
        (EIGHT_PIXELS, SHAPES[::-1]),
        (replace(EIGHT_PIXELS, source="points"), SHAPES),
    )
    for config, classes in others:
        assert evaluate.shipped_classifier(config, classes, CPU) is None

    teacher, teacher_record = trained_on(EIGHT_PIXELS, SHAPES)
    Evaluator(teacher, teacher_record, teacher_record.ode, 100, CPU)
    assert not (tmp_path / "runs/classifiers").exists()  # none had to be trained


def test_what_is_shipped_recognises_its_data():
    """A classifier that was trained on another version of a procedural data set would be wrong."""
    for file in evaluate.ASSETS.glob("*-classifier.pt"):
        record = load_checkpoint(file, "classifier")["record"]
        classifier = evaluate.shipped_classifier(record.data, record.classes, CPU)
        images, labels = load(record.data, "test", count=300).some(300)
        _, predicted = features(classifier, images)
        assert (predicted == labels).double().mean() > 0.95
        assert record.training == evaluate.CLASSIFIER_TRAINING


# ---- degradation ---------------------------------------------------------------------------------


def test_the_ratio_of_degradations():
    """The paper's Table 1: (10.25 − 2.89) / (4.32 − 2.89) = 5.1. A bound, where the denominator may
    be nothing but chance."""
    without = dict(above=10.25 - 2.89, chance=0.1)
    assert degradation_ratio(without, dict(above=4.32 - 2.89, chance=0.1)) == "5.1"
    assert degradation_ratio(without, dict(above=0.1, chance=0.6)).startswith("> 10.5,")
    assert degradation_ratio(without, dict(above=-0.3, chance=0.5)).startswith("> 14.7,")
    unknown = degradation_ratio(dict(above=0.05, chance=0.1), dict(above=0.2, chance=0.1))
    assert unknown.startswith("not known")


def test_which_students_are_compared():
    teacher = random_dit()
    students = {
        "ARD": student_of(teacher),
        "step distillation": student_of(teacher, history_layers=0),
        "x0": student_of(teacher, history_layers=0, targets="x0", output="state"),
    }
    rows = {
        "ARD, 4 steps (reads its history)": dict(above=2.0, chance=0.1),
        "step distillation, 4 steps (no history)": dict(above=5.0, chance=0.1),
        "x0, 4 steps (no history)": dict(above=9.0, chance=0.1),
    }
    found = compare_degradations(rows, students)
    ratio = "degradation of step distillation / degradation of ARD: 2.5 (paper, on ImageNet: 5.1)"
    assert found == [ratio]
    errors_only = {label: dict(error=1.0) for label in rows}
    assert compare_degradations(errors_only, students) == []


def test_chance_is_the_spread_over_other_images():
    """Against the spread over independent sets of images."""
    def draw(seed, count=200):
        rng = np.random.default_rng(seed)
        teacher = rng.standard_normal((count, 4))
        student = teacher + 0.2 * rng.standard_normal((count, 4)) + 0.1  # the same noises
        return [torch.from_numpy(x) for x in (student, teacher, rng.standard_normal((count, 4)))]

    degradations, chances = [], []
    for seed in range(40):
        student, teacher, real = draw(seed)
        reference = evaluate.moments(real)
        above = evaluate.frechet(evaluate.moments(student), reference)
        degradations.append(above - evaluate.frechet(evaluate.moments(teacher), reference))
        chances.append(chance_of(student, teacher, real))
    assert np.mean(chances) == pytest.approx(2 * np.std(degradations), rel=0.35)
    assert chance_of(teacher, teacher, real) == 0


# ---- tables and the report -----------------------------------------------------------------------


def test_a_table_leaves_blanks():
    rows = {"one": dict(a=1, b=0.5), "two": dict(a=2)}
    lines = table(rows, {"a": "d", "b": ".2f", "c": "d"}).splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["one", "1", "0.50"], ["two", "2"]]
    assert len({len(line) for line in lines}) == 1


LOSSES = [(50, 0.1, 3.0), (100, 0.01, 2.0)]


def test_report(tmp_path, quick_classifier, few_shapes, capsys):
    teacher, record = trained_on(EIGHT_PIXELS, SHAPES)
    students = {
        "ARD": student_for(record),
        "step distillation": student_for(record, seed=1, history_layers=0),
    }
    report(teacher, students, dict.fromkeys(students, LOSSES), tmp_path, CPU)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert list(rows) == [
        "teacher, 8 steps",
        "teacher, 4 steps",
        "step distillation, 4 steps (no history)",
        "ARD, 4 steps (reads its history)",
        "ARD, another sample's history",
    ]
    assert [row["calls"] for row in rows.values()] == [8, 4, 4, 4, 4]
    assert rows["teacher, 8 steps"]["error"] == 0 < rows["teacher, 4 steps"]["error"]
    assert all(label in said for label in rows)
    assert "degradation of step distillation / degradation of ARD" in said
    assert result["losses"]["ARD"] == [list(entry) for entry in LOSSES]
    assert set(result["exposure_bias"]) == {"ARD", "step distillation"}
    assert set(result["attention"]) == {"ARD"}
    for name in ("samples", "exposure", "loss", "attention"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("channels, source", [(4, None), (3, "nowhere/images")])
def test_without_data_the_report_has_errors_only(
    channels, source, tmp_path, quick_classifier, capsys, monkeypatch
):
    """Of imagenet256, whose data set is not named, and of a folder that has been moved."""
    monkeypatch.setattr(evaluate, "ERROR_IMAGES", 33)
    data = DataConfig(source, image_size=8, channels=channels)
    teacher, record = trained_on(data, ["ant", "bee"])
    students = {"R + G": student_for(record, history_layers=0)}
    report(teacher, students, {"R + G": LOSSES}, tmp_path, CPU)
    said = capsys.readouterr().out
    assert ("there are no distances to real images: no such folder" in said) == (source is not None)
    table_head = next(line for line in said.splitlines() if "calls" in line)
    assert table_head.split() == ["calls", "error"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 33 and result["ratios"] == []


def test_points_are_drawn_as_paths(tmp_path, quick_classifier, monkeypatch):
    points = DataConfig("points", image_size=1, channels=2)
    teacher, record = trained_on(points, ["arm 0", "arm 1", "arm 2"])
    drawn = {}
    draw_paths = evaluate.draw_paths

    def watch(paths, y, real, file):
        drawn.update(paths=paths, real=real)
        draw_paths(paths, y, real, file)

    monkeypatch.setattr(evaluate, "draw_paths", watch)
    report(teacher, {"ARD": student_for(record)}, {"ARD": LOSSES}, tmp_path, CPU)
    assert drawn["paths"]["teacher, 8 steps"].shape == (10, 9, 2, 1, 1)
    assert drawn["paths"]["ARD, another sample's history"].shape == (10, 5, 2, 1, 1)
    assert drawn["real"].shape == (80, 2, 1, 1)
    assert (tmp_path / "samples.png").stat().st_size > 10_000


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two run folders of one teacher, which lies in a third."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "ASSETS", tmp_path / "nowhere")
    teacher, record = trained_on(EIGHT_PIXELS, SHAPES)
    export(tmp_path / "runs/t/teacher.pt", "teacher", asdict(record), teacher.state_dict())
    stored, _ = evaluate.load_network(tmp_path / "runs/t/teacher.pt", "teacher", device="cpu")
    for folder in ("a", "b", "c/a"):
        for name, layers in (("student", 2), ("no-history", 0)):
            model, own = student_for(record, seed=layers, history_layers=layers)
            own = replace(own, teacher=fingerprint(stored.state_dict()))
            file = tmp_path / "runs" / folder / f"{name}.pt"
            export(file, "student", asdict(own), model.state_dict())
    (tmp_path / "runs/b/no-history.pt").unlink()
    return tmp_path / "runs"


def test_students_of_several_runs(runs):
    students = find_students([runs / "a", runs / "b"], "cpu")
    assert list(students) == ["a", "a, no-history.pt", "b"]
    _, record = students["b"]
    for run in (runs / "b", runs / "b/student.pt"):
        teacher = find_teacher_of(record, run, None, "cpu")
        assert fingerprint(teacher.state_dict()) == record.teacher
    (runs / "b/teacher.pt").write_text("This is text.")  # it may be another's: the search goes on
    find_teacher_of(record, runs / "b", None, "cpu")
    with pytest.raises(UserError, match="cannot be read"):
        find_teacher_of(record, runs / "b", runs / "b/teacher.pt", "cpu")
    with pytest.raises(UserError, match="two students are called a"):
        find_students([runs / "a", runs / "c/a"], "cpu")

    other = replace(record, teacher="0" * 16)
    with pytest.raises(UserError, match="was not found: name its checkpoint"):
        find_teacher_of(other, runs / "b", None, "cpu")
    with pytest.raises(UserError, match="is not the teacher of"):
        find_teacher_of(other, runs / "b", runs / "t/teacher.pt", "cpu")
    public = replace(record, teacher="")
    find_teacher_of(public, runs / "b", runs / "t/teacher.pt", "cpu")
    smaller = replace(public, model=replace(record.model, image_size=4))
    with pytest.raises(UserError, match="is not the teacher of"):
        find_teacher_of(smaller, runs / "b", runs / "t/teacher.pt", "cpu")
    with pytest.raises(UserError, match="was not found"):
        find_teacher_of(public, runs / "b", None, "cpu")

    model, _ = students["b"]
    guided = replace(record, student=replace(record.student, ode=replace(FLOW_8, guidance_scale=3)))
    export(runs / "guided.pt", "student", asdict(guided), model.state_dict())
    with pytest.raises(UserError, match="different teachers, or with different guidance"):
        find_students([runs / "a", runs / "guided.pt"], "cpu")


def test_the_program(runs, quick_classifier, few_shapes, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [runs / "a", runs / "b", "--count", 80, "--device", "cpu", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert len(result["rows"]) == 2 + 2 + 1 + 2 + 1
    for label, row in result["rows"].items():
        assert label in said
        assert {"distance", "precision", "recall", "accuracy"} <= set(row)
    assert all(column in said for column in evaluate.COLUMNS | evaluate.MORE_COLUMNS)
    assert "degradation of a, no-history.pt / degradation of a:" in said
    assert set(result["attention"]) == {"a", "b"}
    for name in ("samples", "exposure", "attention"):
        assert (tmp_path / "out" / f"{name}.png").exists()

    write_folder(tmp_path / "test", ["ant"], 80)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--test", str(tmp_path / "test")])
    with pytest.raises(UserError, match="other classes"):
        evaluate.main()


def test_own_states_predict_themselves():
    """`predict_all` on a student's own states is what it made of them: the basis of both curves."""
    model, record = student_of(random_dit())
    x_T, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    own = few_step(model, record.student, x_T, y)
    with torch.no_grad():
        again = predict_all(model, record.student, own[:, :-1], y)
    torch.testing.assert_close(again, own[:, 1:], rtol=1e-4, atol=1e-5)


# ---- scenes and their captions -------------------------------------------------------------------


def test_scenes_are_compared_with_their_captions(tmp_path, monkeypatch, capsys):
    """A method that draws the scene of each caption, held-out ones too, has everything right. Of
    another image's caption it is right by chance only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "HELD_OUT_IMAGES", 80)
    scenes = DataConfig("scenes", image_size=21, channels=3)
    captions = tuple(map(str, caption_list()))
    weights = tuple(caption_weights(caption_list()).tolist())
    teacher, record = trained_on(scenes, captions, text_width=TEXT_WIDTH, patch=7)
    record = replace(record, class_weights=weights)
    teacher.prompts = scene_prompts()
    evaluator = Evaluator(teacher, record, record.ode, 80, CPU)
    by_text, texts = {str(caption): caption for caption in indexed_captions()}, []

    def draw(x_T, y):
        texts.extend(teacher.prompts.texts[number] for number in y)
        chosen = [by_text[text] for text in texts[-len(y) :]]
        pictures = [draw_scene(place(caption, np.random.default_rng(0))) for caption in chosen]
        return torch.from_numpy(np.stack(pictures)) / 127.5 - 1

    row = evaluator(draw, "perfect")
    assert row["all right"] == row["relation"] == row["held out"] == 1
    assert row["another's"] < 0.05
    held_out = [by_text[text].is_held_out for text in texts]
    assert held_out == [False] * 80 + [True] * 80
    assert evaluator.teacher_row["all right"] < 0.05  # noise, of random weights
    assert evaluator.real_row["all right"] == 1
