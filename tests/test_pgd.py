"""Projected gradient ascent: the scan is the loop of the definition, and stays within its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import parallel
from bibau_jax.method import pgd

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 255, (5, 8, 10, 3)).astype(np.float32)
IMAGES[0, 0] = 0.0  # at the edges of the pixel range already
IMAGES[1, 1] = 255.0
PEAK = RNG.uniform(-100, 355, IMAGES.shape).astype(np.float32)
PULL = RNG.normal(size=(4, 12, 12, 3)).astype(np.float32)
NORMS = pytest.mark.parametrize("norm", pgd.NORMS)
STARTS = pytest.mark.parametrize("start", [None, "random"])
EPSILON = {"l2": 60.0, "linf": 20.0, "l1": 300.0}
STEP = {"l2": 25.0, "linf": 7.0, "l1": 110.0}


def objective(images):
    """Concave in every image, highest at PEAK, which is mostly out of reach."""
    return -jnp.sum((images - PEAK) ** 2 * (1 + jnp.arange(3)), axis=(1, 2, 3))


def gradient(images):
    return jax.grad(lambda x: objective(x).sum())(images)


def attack(norm, steps=6, start=None, images=IMAGES, fn=gradient, **options):
    options = {"epsilon": EPSILON[norm], "step_size": STEP[norm], **options}
    if isinstance(start, str):
        start = pgd.random_start(jax.random.key(3), images.shape, norm=norm, epsilon=EPSILON[norm])
    return np.asarray(pgd.adversarial_images(fn, jnp.asarray(images), norm=norm, steps=steps, start=start, **options))


def length(perturbation, norm):
    flat = np.abs(perturbation.astype(np.float64).reshape(len(perturbation), -1))
    return {"linf": flat.max(1), "l2": np.sqrt((flat**2).sum(1)), "l1": flat.sum(1)}[norm]


def by(slope, x, norm, size):
    if norm == "linf":
        return size * np.sign(slope)
    if norm == "l2":
        return size * slope / np.linalg.norm(slope)
    able = np.where(((slope > 0) & (x < 254.5)) | ((slope < 0) & (x > 0.5)), np.abs(slope), 0).ravel()
    found = np.zeros(able.size)
    for index in np.argsort(-able)[: max(round(pgd.MOVED * able.size), int(np.ceil(size / pgd.FARTHEST)))]:
        found[index] = np.sign(slope.ravel()[index])
    return size * found.reshape(slope.shape) / np.abs(found).sum()


def nearest_of_total(delta, most):
    """The nearest point whose absolute values add up to `most`, by bisection on what is taken off each."""
    low, high = 0.0, np.abs(delta).max()
    if np.abs(delta).sum() <= most:
        return delta
    for _ in range(80):
        off = (low + high) / 2
        low, high = (off, high) if np.maximum(np.abs(delta) - off, 0).sum() > most else (low, off)
    return np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


def loop(norm, steps, start):
    """The definition, image by image, in float64."""
    found, epsilon, step = [], EPSILON[norm], STEP[norm]
    for image, peak, first in zip(IMAGES.astype(float), PEAK.astype(float), start.astype(float), strict=True):

        def project(x, image=image):
            delta = x - image
            if norm == "linf":
                delta = np.clip(delta, -epsilon, epsilon)
            elif norm == "l1":
                delta = nearest_of_total(delta, epsilon)
            elif np.linalg.norm(delta) > epsilon:
                delta = delta * epsilon / np.linalg.norm(delta)
            return np.clip(image + delta, 0, 255)

        x = project(image + first)
        for _ in range(steps):
            slope = -2 * (x - peak) * (1 + np.arange(3))
            x = project(x + by(slope, x, norm, step))
        found.append(x)
    return np.array(found)


@NORMS
@STARTS
def test_scan_and_loop_give_the_same_adversarial_images(norm, start):
    first = np.zeros_like(IMAGES) if start is None else RNG.normal(0, 9, IMAGES.shape).astype(np.float32)
    found = attack(norm, start=None if start is None else jnp.asarray(first))
    np.testing.assert_allclose(found, loop(norm, 6, first), atol=2e-3)


@NORMS
@STARTS
def test_the_perturbation_stays_within_its_bound_and_the_image_within_0_and_255(norm, start):
    found = attack(norm, steps=9, start=start)
    lengths = length(found - IMAGES, norm)
    assert found.min() >= 0 and found.max() <= 255
    assert (lengths <= EPSILON[norm] * (1 + 1e-5)).all()
    assert (lengths > EPSILON[norm] * 0.5).all()  # and it went to its bound, not nowhere


@NORMS
def test_random_starts_lie_inside_the_ball_and_differ(norm):
    starts = np.asarray(pgd.random_start(jax.random.key(0), (400, 3, 4, 1), norm=norm, epsilon=8.0))
    lengths = length(starts, norm)
    assert lengths.max() <= 8.0 * (1 + 1e-6) and lengths.max() > 7.0
    assert lengths.std() > 0.1 and np.abs(starts.mean()) < 0.5
    other = pgd.random_start(jax.random.key(1), (400, 3, 4, 1), norm=norm, epsilon=8.0)
    assert not np.array_equal(starts, other)


def test_l2_starts_are_spread_over_all_radii_and_directions():
    starts = np.asarray(pgd.random_start(jax.random.key(0), (800, 2, 2, 1), norm="l2", epsilon=1.0))
    shares = np.histogram(length(starts, "l2"), bins=4, range=(0, 1))[0] / 800
    assert (shares > 0.17).all()
    assert (np.abs((starts > 0).mean(0) - 0.5) < 0.08).all()


@NORMS
def test_no_steps_leave_the_images_or_their_projected_start(norm):
    np.testing.assert_array_equal(attack(norm, steps=0), IMAGES)
    far = jnp.full(IMAGES.shape, 500.0)
    found = attack(norm, steps=0, start=far)
    assert found.max() <= 255 and (length(found - IMAGES, norm) <= EPSILON[norm] * (1 + 1e-5)).all()


@NORMS
def test_every_step_raises_a_concave_objective_until_the_bound_stops_it(norm):
    reached = np.array([objective(attack(norm, steps=steps, step_size=STEP[norm] / 4)) for steps in range(8)])
    gain = np.diff(reached, axis=0)
    assert (gain[:3] > 0).all()
    assert (gain > -1e-5 * np.abs(reached[:-1])).all()


@NORMS
def test_unrolling_changes_nothing_but_rounding(norm):
    rolled = attack(norm, steps=5, start="random")
    for unroll in (2, 5):
        np.testing.assert_allclose(attack(norm, steps=5, start="random", unroll=unroll), rolled, atol=1e-3)


@NORMS
def test_an_image_does_not_depend_on_its_batch(norm):
    whole = attack(norm)

    def alone(images):
        return gradient(jnp.concatenate([jnp.asarray(IMAGES[:3]), images, jnp.asarray(IMAGES[4:])]))[3:4]

    np.testing.assert_allclose(attack(norm, images=IMAGES[3:4], fn=alone), whole[3:4], atol=1e-3)


@NORMS
def test_an_image_without_a_gradient_stays_as_it_is(norm):
    np.testing.assert_array_equal(attack(norm, fn=jnp.zeros_like), IMAGES)


@pytest.mark.parametrize(("size", "count"), [(60.0, 2), (128.0, 2), (129.0, 3), (640.0, 10), (1e6, 240)])
def test_a_step_in_l1_moves_few_values_as_far_as_they_may_and_then_more(size, count):
    slopes = RNG.normal(0, 1e-4, IMAGES.shape).astype(np.float32)
    for slope, step in zip(slopes, np.asarray(pgd.ascent_step(slopes, "l1", size)), strict=True):
        steepest = np.argsort(-np.abs(slope), axis=None)[:count]
        assert set(np.flatnonzero(step)) == set(steepest)
        np.testing.assert_allclose(step.flat[steepest], np.sign(slope.flat[steepest]) * size / count, rtol=1e-5)


@NORMS
def test_a_step_has_its_length_in_its_norm(norm):
    slopes = RNG.normal(0, 1e-4, IMAGES.shape).astype(np.float32)
    np.testing.assert_allclose(length(np.asarray(pgd.ascent_step(slopes, norm, 5.0)), norm), 5.0, rtol=1e-5)


# --- in squares


def test_a_slope_by_blocks_is_the_mean_over_each_square():
    slope, block, offset = RNG.normal(size=(2, 7, 9, 3)).astype(np.float32), 3, np.array([2, 1])
    found = np.asarray(pgd.by_blocks(jnp.asarray(slope), block, jnp.asarray(offset)))
    squares = {}
    for y, x in np.ndindex(7, 9):
        squares.setdefault(((y + 2) // 3, (x + 1) // 3), []).append((y, x))
    assert sorted(map(len, squares.values()))[0] < 9 == max(map(len, squares.values()))
    for places in squares.values():
        rows, columns = np.array(places).T
        mean = slope[:, rows, columns].astype(np.float64).mean(1, keepdims=True)
        np.testing.assert_allclose(found[:, rows, columns], np.broadcast_to(mean, found[:, rows, columns].shape), atol=1e-6)


@NORMS
def test_every_second_image_is_moved_in_squares_within_as_many_times_the_bound(norm):
    grey = np.full((4, 12, 12, 3), 128.0, np.float32)

    options = {"images": grey, "fn": lambda images: jnp.asarray(PULL), "steps": 2}
    found = attack(norm, block=4, offset=jnp.array([3, 0]), **options) - grey
    alone = attack(norm, **options) - grey
    np.testing.assert_allclose(found[::2], alone[::2], atol=1e-4)
    moved = found[1::2]
    assert (length(moved, norm) <= 4 * EPSILON[norm] * (1 + 1e-5)).all() and (length(moved, norm) > EPSILON[norm]).all()
    for first in (1, 5):  # whole squares begin in rows 1, 5 and columns 0, 4, 8
        squares = moved[:, first : first + 4].reshape(2, 4, 3, 4, 3)
        np.testing.assert_allclose(squares, np.broadcast_to(squares[:, :1, :, :1], squares.shape), atol=1e-3)
    assert np.ptp(moved, axis=(1, 2, 3)).min() > 1


def test_squares_on_one_device_are_those_of_eight():
    images = np.concatenate([IMAGES, IMAGES[:3]])
    given = {"norm": "l1", "epsilon": 300.0, "step_size": 110.0, "steps": 2, "block": 3, "offset": jnp.array([1, 2])}

    def found(count):
        with parallel.on_devices(count):
            run = jax.jit(lambda x: pgd.adversarial_images(lambda at: PEAK.mean() - at, parallel.shard(x), **given))
            return parallel.gather(run(parallel.replicate(images)))

    np.testing.assert_allclose(found(8), found(1), atol=1e-4)
