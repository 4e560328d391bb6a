"""The overlap of two tasks' tangent spaces is what the singular vectors of their Jacobians say, without ever having them."""

import numpy as np
import pytest

from bibau_jax.theory import drift, ntk, overlap


@pytest.fixture(scope="module")
def jacobians():
    """Two tasks whose tangent spaces share some directions, and one that shares none with the first."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    first = rng.normal(size=(6, 10)) @ axes[:, :10].T
    second = rng.normal(size=(8, 12)) @ axes[:, 5:17].T
    return first, second, rng.normal(size=(7, 12)) @ axes[:, 20:32].T


def of(first, second):
    return overlap.overlap(first @ first.T, second @ second.T, first @ second.T)


def test_it_is_the_product_of_the_right_singular_vectors(jacobians):
    first, second, _ = jacobians
    (_, values, one), (_, _, other) = (np.linalg.svd(j, full_matrices=False) for j in (first, second))
    expected = one @ other.T
    found = overlap.matrix(first @ first.T, second @ second.T, first @ second.T)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)  # singular vectors have no sign
    told, cosines = of(first, second), np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(told.cosines, cosines, atol=1e-8)
    assert told.frobenius == pytest.approx(np.sum(expected**2) / 6)
    assert told.spectral == pytest.approx(cosines[0])
    assert told.angle == pytest.approx(np.degrees(np.arccos(cosines)).mean())
    assert told.energy == pytest.approx(values**2 @ (expected**2).sum(1) / np.sum(values**2))
    assert told.energy == pytest.approx(np.sum((first @ np.linalg.pinv(second) @ second) ** 2) / np.sum(first**2))
    assert told.ranks == (6, 8) and 0.05 < told.frobenius < 0.95


def test_a_task_overlaps_itself_wholly_and_an_orthogonal_one_not_at_all(jacobians):
    first, _, orthogonal = jacobians
    same = of(first, first)
    np.testing.assert_allclose(same.cosines, 1.0, atol=1e-9)
    assert (same.frobenius, same.spectral, same.energy) == pytest.approx((1, 1, 1)) and same.angle < 0.01
    none = of(first, orthogonal)
    np.testing.assert_allclose(none.cosines, 0.0, atol=1e-9)
    assert (none.frobenius, none.spectral, none.energy) == pytest.approx((0, 0, 0)) and none.angle == pytest.approx(90)


def test_a_networks_task_overlaps_itself_wholly(tiny, tiny_variables, digits):
    kernel = ntk.kernel(tiny, tiny_variables, digits.train.images[:8])
    found = overlap.overlap(kernel, kernel, kernel)
    assert found.cosines[:20] == pytest.approx(1, abs=1e-6) and found.energy == pytest.approx(1, abs=1e-6)


def test_directions_below_the_cut_do_not_count():
    kernel = np.diag([1.0, 0.5, 1e-9])
    assert overlap.overlap(kernel, kernel, kernel).ranks == (2, 2)
    assert overlap.overlap(kernel, kernel, kernel, cut=1e-12).ranks == (3, 3)


def test_forgetting_stays_below_its_bound_and_reaches_it_for_a_single_direction(jacobians):
    first, second, _ = jacobians
    everything = np.concatenate([first, second])
    kernel, residual = everything @ everything.T, np.random.default_rng(1).normal(size=(8, 1))
    outputs = drift.stream(kernel, np.zeros((14, 1)), [drift.Task(np.arange(6, 14), residual)])
    forgotten = drift.catastrophic_forgetting((outputs[1] - outputs[0])[:6])
    blocks = kernel[:6, :6], kernel[6:, 6:], kernel[:6, 6:]
    bound = overlap.forgetting_bound(blocks[0], overlap.matrix(*blocks), blocks[1], residual)
    assert 0.01 * bound < forgotten < bound
    line = np.array([[3.0, 1.0], [1.0, 1.0]])
    kernel = line @ line.T
    outputs = drift.stream(kernel, np.zeros((2, 1)), [drift.Task(np.array([1]), np.ones((1, 1)))])
    found = overlap.matrix(kernel[:1, :1], kernel[1:, 1:], kernel[:1, 1:])
    bound = overlap.forgetting_bound(kernel[:1, :1], found, kernel[1:, 1:], np.ones((1, 1)))
    assert bound == pytest.approx(drift.catastrophic_forgetting(outputs[1][:1])) == pytest.approx(4.0)


def test_shuffled_images_keep_their_pixels_but_not_their_places(digits):
    images = digits.train.images[:3]
    found = overlap.shuffled(images)
    assert found.dtype == np.uint8 and (found != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(np.sort(found.reshape(3, -1), 1), np.sort(images.reshape(3, -1), 1))
