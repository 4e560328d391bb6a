"""Drift and forgetting: measured on models and computed in closed form, they agree where both hold."""

import jax
import numpy as np
import pytest

from bibau_jax import train
from bibau_jax.errors import UserError
from bibau_jax.theory import drift, flow, linearize, ntk


def apart(found, expected) -> float:
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def test_drift_of_trained_linear_models_is_the_closed_forms(linear, digits):
    """Two tasks in turn on the inputs of both, by gradient descent and in closed form."""
    classifier, variables = linear
    images, labels = digits.train.images[:20], digits.train.labels[:20]
    kernel, start = ntk.kernel(classifier, variables, images), train.logits(classifier, variables, images)
    step_size = 0.2 / flow.spectrum(kernel).values[-1]
    targets = flow.centred_one_hot(labels, 10)
    tasks = [drift.Task(np.arange(8), targets[:8]), drift.Task(np.arange(8, 20), np.roll(targets, 1, 1)[8:])]
    told = drift.stream(kernel, start, tasks, time=60 * step_size, step_size=step_size)
    states = [variables]
    for rows, wanted in tasks:
        options = {"loss": "squared", "step_size": step_size, "steps": 60}
        states.append(linearize.descend(classifier, states[-1], images[rows], wanted, **options))
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        measured = drift.drift(classifier, states[earlier], states[later], images)
        assert apart(measured, told[later] - told[earlier]) < 1e-5
    forgotten = drift.catastrophic_forgetting(drift.drift(classifier, states[1], states[2], images[:8]))
    assert forgotten == pytest.approx(np.sum((told[2] - told[1])[:8] ** 2), rel=1e-4) and forgotten > 0.1


def test_there_is_no_drift_after_no_steps(tiny, tiny_variables, digits):
    images, targets = digits.train.images[:16], flow.centred_one_hot(digits.train.labels[:16], 10)
    same = linearize.descend(tiny, tiny_variables, images, targets, loss="squared", step_size=0.1, steps=0)
    drifted = drift.drift(tiny, tiny_variables, same, images)
    assert drifted.shape == (16, 10) and not drifted.any() and drift.catastrophic_forgetting(drifted) == 0
    kernel = np.eye(160)
    still = drift.stream(kernel, np.zeros((16, 10)), [drift.Task(np.arange(4), targets[:4])], time=0.0)
    assert not (still[1] - still[0]).any()


def test_a_task_orthogonal_to_another_is_not_forgotten():
    kernel = np.kron(np.diag([1.0, 1.0, 2.0, 2.0]), np.eye(2))
    tasks = [drift.Task(np.array([0, 1]), np.ones((2, 2))), drift.Task(np.array([2, 3]), np.ones((2, 2)))]
    outputs = drift.stream(kernel, np.zeros((4, 2)), tasks)
    assert not (outputs[2] - outputs[1])[:2].any() and (outputs[2] - outputs[1])[2:].any()
    np.testing.assert_allclose(outputs[2], 1.0)


def moved_in_turn(jacobian, start, tasks, inverse) -> list[np.ndarray]:
    """Outputs before and after each task, by moving the parameters themselves by `inverse(J_k)` times the residual."""
    found = [np.asarray(start, np.float64)]
    for rows, targets in tasks:
        own = np.concatenate([np.arange(row * start.shape[1], (row + 1) * start.shape[1]) for row in rows])
        step = inverse(jacobian[own]) @ (targets - found[-1][rows]).ravel()
        found.append(found[-1] + (jacobian @ step).reshape(start.shape))
    return found


def test_a_network_of_fewer_parameters_than_outputs_moves_by_the_pseudo_inverse(tiny, tiny_variables, digits):
    """420 outputs a task, 398 parameters: most of the kernel's spectrum is rounding, and is not taken for directions."""
    images, targets = digits.train.images[:84], flow.centred_one_hot(digits.train.labels[:84], 10)
    start = train.logits(tiny, tiny_variables, images)
    leaves = jax.jit(jax.jacrev(lambda params: tiny.apply(tiny_variables | {"params": params}, images).logits))
    leaves = jax.tree.leaves(leaves(tiny_variables["params"]))
    jacobian = np.concatenate([np.asarray(leaf, np.float64).reshape(840, -1) for leaf in leaves], 1)
    assert jacobian.shape == (840, 398)
    tasks = [drift.Task(part, targets[part]) for part in (np.arange(42), np.arange(42, 84))]
    expected = moved_in_turn(jacobian, start, tasks, lambda own: np.linalg.pinv(own, rcond=flow.CUT**0.5))
    exact = drift.stream(jacobian @ jacobian.T, start, tasks)
    found = drift.stream(ntk.kernel(tiny, tiny_variables, images), start, tasks)
    forgotten = [drift.catastrophic_forgetting((run[2] - run[1])[:42]) for run in (expected, exact, found)]
    for index in (1, 2):
        assert apart(exact[index], expected[index]) < 1e-8
        assert apart(found[index], expected[index]) < 0.05  # directions next to the cut are known to a few percent
    assert forgotten[1:] == pytest.approx([forgotten[0]] * 2, rel=0.02) and forgotten[0] < 10


def test_a_ridge_is_that_of_the_parameters():
    """Each task moves them by the solution of (J_k^T J_k + ridge) d = J_k^T y~."""
    rng = np.random.default_rng(0)
    jacobian, start, ridge = rng.normal(size=(18, 15)), rng.normal(size=(6, 3)), 4.0
    tasks = [drift.Task(np.array([0, 1]), rng.normal(size=(2, 3))), drift.Task(np.array([3, 2, 5]), rng.normal(size=(3, 3)))]
    found = drift.stream(jacobian @ jacobian.T, start, tasks, ridge=ridge)
    expected = moved_in_turn(jacobian, start, tasks, lambda own: np.linalg.solve(own.T @ own + ridge * np.eye(15), own.T))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_task_without_inputs_is_told():
    tasks = [drift.Task(np.arange(2), np.ones((2, 1))), drift.Task(np.zeros(0, int), np.ones((0, 1)))]
    with pytest.raises(UserError, match="task 2 of the stream has no inputs"):
        drift.stream(np.eye(3), np.zeros((3, 1)), tasks)
