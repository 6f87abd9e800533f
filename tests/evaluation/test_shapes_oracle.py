"""The oracle reads what was drawn, refuses what was not, and says no to every single changed
attribute.
"""

import time
from dataclasses import replace

import numpy as np
import pytest

from evaluation.shapes_oracle import (
    ATTRIBUTES,
    PAIR_ATTRIBUTES,
    compare,
    judge,
    judge_all,
    legible,
    read,
    read_all,
)
from pipeline import shapes

RED, BLUE, WHITE = shapes.COLOURS["red"], shapes.COLOURS["blue"], shapes.BACKGROUNDS["white"]
VALUES = {
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "size": tuple(shapes.SIZES),
    "place": tuple(shapes.PLACES),
    "background": tuple(shapes.BACKGROUNDS),
}


def drawn(count, side, objects=1, seed=5):
    scenes = [shapes.scene(seed, index, objects) for index in range(count)]
    return np.stack([shapes.draw(it, side) for it in scenes]), [it.truth() for it in scenes]


def blurred(pictures, blur, noise, shift):
    """What an autoencoder does to a picture: soft edges, grain, and a tint of its own."""
    x, draws = pictures.astype(np.float64), np.random.default_rng(0)
    taps = np.exp(-(np.arange(-4, 5) ** 2) / (2 * blur**2))
    for axis in (1, 2):
        padded = np.pad(x, [(4, 4) if k == axis else (0, 0) for k in range(4)], mode="edge")
        parts = [t * np.take(padded, range(k, k + x.shape[axis]), axis) for k, t in enumerate(taps)]
        x = np.sum(parts, 0) / taps.sum()
    x = x + noise * draws.standard_normal(x.shape) + shift * draws.uniform(-1, 1, (len(x), 1, 1, 3))
    return x.clip(0, 255).round().astype(np.uint8)


def painted(*areas, ground=WHITE, side=32):
    """A picture of (inside(x, y), colour) areas, anti-aliased by sampling."""
    axis = (np.arange(side * 8) + 0.5) / (side * 8)
    picture = np.broadcast_to(np.float64(ground), (side, side, 3))
    for inside, colour in areas:
        cover = (
            inside(axis[None, :], axis[:, None]).reshape(side, 8, side, 8).mean((1, 3))[..., None]
        )
        picture = picture + cover * (np.float64(colour) - picture)
    return picture.round().astype(np.uint8)


def disc(x0, y0, radius):
    return lambda x, y: np.hypot(x - x0, y - y0) <= radius


@pytest.mark.parametrize(
    ("side", "count"), [(16, 1000), (24, 400), (32, 1000), (50, 200), (64, 300), (128, 100)]
)
def test_clean_drawings_are_read_right(side, count):
    verdict = judge_all(*drawn(count, side))
    assert set(verdict) == {*ATTRIBUTES, "all"}
    assert verdict["all"].mean() >= 0.999


@pytest.mark.parametrize(
    ("side", "blur", "noise", "shift"),
    [(32, 0.5, 4, 8), (32, 0.7, 8, 10), (32, 1.0, 6, 8), (64, 1.5, 10, 10)],
)
def test_blurred_noisy_tinted_drawings_are_read_right(side, blur, noise, shift):
    pictures, truths = drawn(400, side)
    assert judge_all(blurred(pictures, blur, noise, shift), truths)["all"].mean() >= 0.99


@pytest.mark.parametrize(("side", "blur"), [(32, 0.0), (64, 0.0), (32, 0.6)])
def test_two_objects_and_their_relation(side, blur):
    pictures, truths = drawn(150, side, objects=2)
    verdict = judge_all(blurred(pictures, blur, 6, 8) if blur else pictures, truths)
    assert set(verdict) == {*PAIR_ATTRIBUTES, "all"}
    assert verdict["all"].mean() >= 0.99


def test_each_single_changed_attribute_is_noticed():
    pictures, truths = drawn(200, 32)
    for scene, truth in zip(read_all(pictures), truths, strict=True):
        for name, values in VALUES.items():
            for value in set(values) - {truth[name]}:
                verdict = compare(scene, truth | {name: value})
                assert verdict == {other: other != name for other in ATTRIBUTES}, (
                    truth,
                    name,
                    value,
                )


def test_each_single_changed_attribute_of_a_pair_is_noticed():
    pictures, truths = drawn(100, 32, objects=2)
    for scene, truth in zip(read_all(pictures, objects=2), truths, strict=True):
        first, second = truth["objects"]
        for relation in set(shapes.RELATIONS) - {truth["relation"]}:
            assert not compare(scene, truth | {"relation": relation})["relation"]
        for colour in set(shapes.COLOURS) - {first["colour"]}:
            assert not all(
                compare(scene, truth | {"objects": [first | {"colour": colour}, second]}).values()
            )
        for shape in set(shapes.SHAPES) - {second["shape"]}:
            assert not all(
                compare(scene, truth | {"objects": [first, second | {"shape": shape}]}).values()
            )
        assert not all(compare(scene, truth | {"objects": [second, first]}).values())


def test_a_pair_is_not_read_where_one_is_missing_or_moved():
    scenes = [shapes.scene(5, index, objects=2) for index in range(60)]
    truths = [it.truth() for it in scenes]
    alone = np.stack([shapes.draw(replace(it, objects=it.objects[:1]), 32) for it in scenes])
    assert not judge_all(alone, truths)["all"].any()
    turned = np.stack([np.rot90(shapes.draw(it, 32)) for it in scenes])
    verdict = judge_all(turned, truths)
    assert verdict["background"].all() and verdict["first_colour"].all()
    assert not verdict["relation"].any()


def test_the_same_relation_told_from_the_other_side_is_true():
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    (picture,), (truth,) = drawn(1, 32, objects=2)
    told = {
        "objects": truth["objects"][::-1],
        "relation": inverse[truth["relation"]],
        "background": truth["background"],
    }
    assert all(judge(picture, told).values())
    assert not judge(picture, told | {"relation": truth["relation"]})["relation"]


@pytest.mark.parametrize(
    "areas",
    [
        [],
        [(disc(0.3, 0.3, 0.15), RED), (disc(0.7, 0.7, 0.15), RED)],
        [(disc(0.3, 0.3, 0.15), RED), (disc(0.7, 0.7, 0.08), BLUE)],
        [(disc(0.5, 0.5, 0.25), RED), (lambda x, y: disc(0.5, 0.5, 0.25)(x, y) & (x < 0.5), BLUE)],
        [(lambda x, y: disc(0.5, 0.5, 0.25)(x, y) & (x < 0.5), RED)],
        [(lambda x, y: (abs(x - 0.5) < 0.25) & (abs(y - 0.5) < 0.08), RED)],
        [(lambda x, y: (y > 0.3) & (abs(x - 0.5) < 0.27 * (1 - (y - 0.3) / 0.45)), RED)],
        [(disc(0.5, 0.5, 0.25), (225, 225, 225))],
    ],
    ids=[
        "nothing",
        "two",
        "clutter",
        "two colours",
        "half a disc",
        "bar",
        "triangle upside down",
        "faint",
    ],
)
def test_what_is_no_known_shape_is_not_named(areas):
    assert read(painted(*areas))["shape"] is None


def test_what_has_no_name_is_none():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert set(read(noise).values()) == {None}
    assert read(painted((disc(0.5, 0.5, 0.25), (120, 120, 120))))["colour"] is None
    assert read(painted((disc(0.5, 0.5, 0.42), RED)))["size"] is None
    assert read(painted((disc(0.5, 0.5, 0.06), RED)))["size"] is None
    split = painted(
        (lambda x, y: (x < 0.5) & (y > -1), shapes.BACKGROUNDS["black"]),
        (disc(0.5, 0.5, 0.25), RED),
    )
    assert read(split)["background"] is None
    assert not any(judge(noise, shapes.scene(0, 0).truth()).values())


def test_five_hundred_pictures_take_seconds():
    pictures, _ = drawn(512, 32)
    start = time.process_time()
    assert len(read_all(pictures)) == 512
    assert time.process_time() - start < 5


def test_wrong_pictures_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        read_all(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="squares"):
        read_all(np.zeros((2, 32, 24, 3), np.uint8))
    with pytest.raises(ValueError, match="objects"):
        read_all(np.zeros((2, 32, 32, 3), np.uint8), objects=3)
    with pytest.raises(ValueError, match="truth"):
        judge_all(np.zeros((2, 32, 32, 3), np.uint8), [])


def test_a_picture_is_legible_where_every_attribute_can_be_told():
    drawn = np.stack([shapes.draw(shapes.scene(3, index), 32) for index in range(8)])
    blank = np.full((2, 32, 32, 3), 255, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    found = legible(np.concatenate([drawn, blank, noise]))
    assert found.tolist() == [True] * 8 + [False] * 4
