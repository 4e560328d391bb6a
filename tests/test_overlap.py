"""The overlap of two tasks' tangent spaces is what the singular vectors of their Jacobians say, without ever having them."""

import numpy as np
import pytest

from bibau_jax.errors import UserError
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


def test_what_has_no_tangent_space_is_told(jacobians):
    kernel = jacobians[0] @ jacobians[0].T
    for wrong in ({"first": 0 * kernel}, {"second": 0 * kernel}, {"cut": 2.0}, {"cut": -1.0}):
        with pytest.raises(UserError, match="an overlap needs kernels that are not zero, and 0 <= cut < 1"):
            overlap.overlap(**{"first": kernel, "second": kernel, "between": kernel} | wrong)


@pytest.mark.parametrize("options", [{}, {"ridge": 3.0}, {"time": 1.0}])
def test_forgetting_stays_below_its_bound_after_any_number_of_tasks(jacobians, options):
    first, second, _ = jacobians
    rng, everything = np.random.default_rng(1), np.concatenate([first, second])
    parts = (np.arange(6), np.arange(6, 10), np.arange(10, 14))
    tasks = [drift.Task(part, rng.normal(size=(len(part), 1))) for part in parts]
    kernel = everything @ everything.T
    outputs, ridge = drift.stream(kernel, np.zeros((14, 1)), tasks, **options), options.get("ridge", 0.0)
    for last in (2, 3):
        forgotten = drift.catastrophic_forgetting((outputs[last] - outputs[1])[:6])
        bound = overlap.forgetting_bound(kernel, tasks[:last], outputs[: last + 1], ridge=ridge)
        assert 0.01 * bound < forgotten < bound
    assert overlap.forgetting_bound(kernel, tasks[:1], outputs[:2]) == 0


def test_the_bound_is_its_formula_in_singular_vectors(jacobians):
    """(sigma_1 sum_k |V_S^T V_k|_2 |Sigma_k (Sigma_k^2 + ridge)^-1 U_k^T y~_k|)^2, two outputs an input."""
    everything, rng = np.concatenate(jacobians[:2]), np.random.default_rng(2)
    parts, ridge, start = (np.array([0, 2]), np.array([1, 4]), np.array([6, 3, 5])), 0.7, rng.normal(size=(7, 2))
    tasks = [drift.Task(part, rng.normal(size=(len(part), 2))) for part in parts]
    kernel = everything @ everything.T
    outputs = drift.stream(kernel, start, tasks, ridge=ridge)
    (_, sizes, own), *later = (
        np.linalg.svd(everything.reshape(7, 2, 40)[part].reshape(-1, 40), full_matrices=False) for part in parts
    )
    reach = 0.0
    for k, (u, s, vt) in enumerate(later, 1):
        residual = (tasks[k].targets - outputs[k][parts[k]]).ravel()
        reach += np.linalg.norm(own @ vt.T, 2) * np.linalg.norm(s / (s**2 + ridge) * (u.T @ residual))
    found = overlap.forgetting_bound(kernel, tasks, outputs, ridge=ridge)
    assert found == pytest.approx((sizes[0] * reach) ** 2)


def test_the_bound_is_reached_for_a_single_direction():
    line = np.array([[3.0, 1.0], [1.0, 1.0]])
    tasks = [drift.Task(np.array([0]), np.zeros((1, 1))), drift.Task(np.array([1]), np.ones((1, 1)))]
    outputs = drift.stream(line @ line.T, np.zeros((2, 1)), tasks)
    bound = overlap.forgetting_bound(line @ line.T, tasks, outputs)
    assert bound == pytest.approx(drift.catastrophic_forgetting(outputs[2][:1])) == pytest.approx(4.0)


def test_shuffled_images_keep_their_pixels_but_not_their_places(digits):
    images = digits.train.images[:3]
    found = overlap.shuffled(images)
    assert found.dtype == np.uint8 and (found != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(np.sort(found.reshape(3, -1), 1), np.sort(images.reshape(3, -1), 1))
