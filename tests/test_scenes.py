"""Scenes can be read back without a learned network. So the score of a generated image is exact: a
true scene fulfils its caption, and the caption of another scene is fulfilled by chance only."""

import math

import numpy as np
import pytest

from scenes import (
    CATEGORIES,
    HELD_OUT,
    Caption,
    SceneObject,
    adherence,
    caption_list,
    caption_weights,
    draw_scene,
    draw_scenes,
    fulfils,
    indexed_captions,
    place,
    read_scene,
    score,
)


def scenes(captions, seed=0):
    """Scenes of these captions, drawn and read back."""
    rng = np.random.default_rng(seed)
    return [read_scene(draw_scene(place(caption, rng))) for caption in captions]


@pytest.mark.parametrize("held_out", [False, True])
def test_true_scenes_are_read_back(held_out):
    captions = caption_list(held_out)
    rng = np.random.default_rng(1)
    chosen = [captions[i] for i in rng.choice(len(captions), 300, p=caption_weights(captions))]
    scores = adherence(scenes(chosen), chosen)
    assert min(scores.values()) >= 0.995
    assert set(CATEGORIES) < set(scores)


def test_shuffled_captions_are_fulfilled_by_chance_only():
    captions = caption_list()
    rng = np.random.default_rng(2)
    chosen = [captions[i] for i in rng.choice(len(captions), 300, p=caption_weights(captions))]
    scores = adherence(scenes(chosen), chosen[1:] + chosen[:1])
    assert scores["all right"] < 0.03 and scores["relation right"] < 0.03


def test_what_a_thing_is_and_where():
    objects = [
        SceneObject("red", "star", 3.6, 10.4, 2.5),
        SceneObject("blue", "ring", 17.4, 3.5, 2.7),
    ]
    found = sorted(read_scene(draw_scene(objects)), key=lambda one: one.x)
    assert [(one.colour, one.shape) for one in found] == [("red", "star"), ("blue", "ring")]
    for one, true in zip(found, objects, strict=True):
        assert math.hypot(one.x - true.x, one.y - true.y) < 0.5
        assert abs(one.radius - true.radius) < 0.4


RED_STAR, BLUE_RING = ("red", "star"), ("blue", "ring")


@pytest.mark.parametrize(
    "caption, expected",
    [
        (Caption("two", (RED_STAR, BLUE_RING)), dict(binding=1, count=1, all=1)),
        (Caption("two", (("red", "ring"), ("blue", "star"))), dict(binding=0, count=1, all=0)),
        (Caption("one", (RED_STAR,)), dict(binding=1, count=0, all=0)),
        (Caption("relation", (RED_STAR, BLUE_RING), "left of"), dict(relation=1, all=1)),
        (Caption("relation", (BLUE_RING, RED_STAR), "left of"), dict(relation=0, binding=1, all=0)),
        (Caption("relation", (RED_STAR, BLUE_RING), "above"), dict(relation=0, all=0)),
        (Caption("count", (RED_STAR,) * 2), dict(binding=0, count=1, all=0)),
    ],
)
def test_scores(caption, expected):
    objects = [
        SceneObject("red", "star", 3.5, 3.5, 2.5),
        SceneObject("blue", "ring", 17.5, 10.5, 2.5),
    ]
    found = score(caption, objects)
    assert {key: found[key] for key in expected} == expected


def test_a_relation_goes_further_in_its_direction_than_across():
    here = SceneObject("red", "star", 10, 10, 4)
    for x, y, left, above in ((20, 12, True, False), (12, 20, False, True), (2, 10, False, False)):
        there = SceneObject("blue", "ring", x, y, 4)
        assert fulfils("left of", here, there) == left
        assert fulfils("above", here, there) == above


def test_held_out_pairs_never_occur_in_training():
    named = {one for caption in caption_list() for one in caption.objects}
    assert named.isdisjoint(HELD_OUT) and len(named) + len(HELD_OUT) == 30
    colours, shapes = zip(*HELD_OUT, strict=True)
    assert set(colours) == {colour for colour, _ in named}  # each colour and each shape is seen
    assert set(shapes) <= {shape for _, shape in named}
    assert len(caption_list()) + len(caption_list(held_out=True)) == 2700
    assert len(set(map(str, indexed_captions()))) == 2700  # each has a text of its own


def test_all_categories_are_equally_frequent():
    captions = caption_list()
    weights = caption_weights(captions)
    for category in CATEGORIES:
        chosen = [caption.category == category for caption in captions]
        assert weights[chosen].sum() == pytest.approx(1 / 4)


def test_a_scene_depends_on_seed_and_number_only():
    images, labels = draw_scenes(6, seed=3)
    fewer, _ = draw_scenes(2, seed=3)
    others, _ = draw_scenes(2, seed=4)
    assert np.array_equal(images[:2], fewer) and not np.array_equal(fewer, others)
    captions = caption_list()
    for image, label in zip(images, labels, strict=True):
        assert score(captions[label], read_scene(image))["all"] == 1
