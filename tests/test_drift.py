"""Drift and forgetting: measured on models and computed in closed form, they agree where both hold."""

import numpy as np
import pytest

from bibau_jax import train
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
