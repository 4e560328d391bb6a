"""Random crops and flips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bibau_jax import keys
from bibau_jax.data import augment
from bibau_jax.errors import UserError


@pytest.fixture(params=[np.uint8, np.float32])
def pixels(request):
    # Never 0, so that padding can be told from the picture.
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 8, 10, 3)).astype(request.param))


@functools.partial(jax.jit, static_argnames=("padding", "flip"))
def crop_and_flip(key, pixels, padding=2, flip=True):
    return augment.crop_and_flip(key, pixels, padding=padding, flip=flip)


def windows(image, padding, flip):
    """Every result there may be for one image, by slicing."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[top : top + height, left : left + width]
            yield (top, left, False), window
            if flip:
                yield (top, left, True), window[:, ::-1]


def draws(before, after, padding, flip):
    return [
        next(draw for draw, window in windows(x, padding, flip) if np.array_equal(window, y))
        for x, y in zip(np.asarray(before), np.asarray(after), strict=True)
    ]


def test_without_padding_and_flip_nothing_changes(pixels):
    result = crop_and_flip(keys.root(0), pixels, padding=0, flip=False)
    np.testing.assert_array_equal(result, pixels)


def test_every_result_is_a_window_of_the_zero_padded_image_of_the_same_type(pixels):
    result = crop_and_flip(keys.root(0), pixels)
    assert result.shape == pixels.shape and result.dtype == pixels.dtype
    found = draws(pixels, result, 2, True)
    assert len(set(found)) > 20  # of 50 possible ones: each image has its own draw


def test_flip_alone_mirrors_about_half_of_the_images_and_moves_none(pixels):
    result = np.asarray(crop_and_flip(keys.root(0), pixels, padding=0))
    flipped = [draw[2] for draw in draws(pixels, result, 0, True)]
    assert 16 < sum(flipped) < 48


def test_crops_reach_every_offset_about_equally_often():
    pixels = jnp.arange(1, 17, dtype=jnp.uint8).reshape(1, 4, 4, 1).repeat(2000, 0)
    found = draws(pixels, crop_and_flip(keys.root(3), pixels, padding=1, flip=False), 1, False)
    counts = np.unique([f"{top}{left}" for top, left, _ in found], return_counts=True)[1]
    assert len(counts) == 9 and counts.min() > 160 and counts.max() < 290


def test_the_same_key_gives_the_same_images_and_another_key_others(pixels):
    first, same, other = (crop_and_flip(keys.root(seed), pixels) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_turning_flips_off_leaves_the_crops_as_they_were(pixels):
    with_flips = draws(pixels, crop_and_flip(keys.root(0), pixels), 2, True)
    without = draws(pixels, crop_and_flip(keys.root(0), pixels, flip=False), 2, False)
    assert [d[:2] for d in with_flips] == [d[:2] for d in without]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_over_several_devices_gives_the_images_of_one_device(pixels, axis_type):
    count = max(n for n in (1, 2, 4, 8) if n <= jax.device_count())
    if count == 1:
        pytest.skip("needs several devices")
    mesh = jax.make_mesh((count,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:count])
    sharded = jax.device_put(pixels, NamedSharding(mesh, PartitionSpec("data")))
    program = crop_and_flip.lower(keys.root(0), sharded).compile()
    result = program(keys.root(0), sharded)
    np.testing.assert_array_equal(result, crop_and_flip(keys.root(0), pixels))
    assert result.sharding.is_equivalent_to(sharded.sharding, result.ndim)
    text = program.as_text()
    assert not any(f" {word}(" in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_a_negative_padding_is_an_error(pixels):
    with pytest.raises(UserError, match="padding must not be negative: -1"):
        augment.crop_and_flip(keys.root(0), pixels, padding=-1, flip=True)


@pytest.mark.parametrize("length", [1, 3, 4, 30])
def test_cutout_blackens_one_square_whose_centre_lies_in_the_image(pixels, length):
    found = np.asarray(augment.cutout(keys.root(0), pixels, length=length))
    assert found.dtype == pixels.dtype
    drawn = set()
    for before, after in zip(np.asarray(pixels), found, strict=True):
        hole = (after == 0).all(-1)
        np.testing.assert_array_equal(after, np.where(hole[:, :, None], 0, before))
        places = [np.flatnonzero(hole.any(axis)) for axis in (1, 0)]
        assert hole.sum() == len(places[0]) * len(places[1])  # a rectangle
        for of_axis, size in zip(places, hole.shape, strict=True):
            assert len(of_axis) == length or of_axis[0] == 0 or of_axis[-1] == size - 1  # cut off by an edge alone
            assert len(of_axis) >= min(length - length // 2, size)  # no more than half of it lies outside
        drawn.add(tuple((int(of_axis[0]), int(of_axis[-1])) for of_axis in places))
    assert len(drawn) > 30 or length == 30  # each image has its own; one of 30 covers everything


def test_no_cutout_is_none_and_a_negative_one_an_error(pixels):
    assert augment.cutout(keys.root(0), pixels, length=0) is pixels
    with pytest.raises(UserError, match="cutout must not be negative: -2"):
        augment.cutout(keys.root(0), pixels, length=-2)
