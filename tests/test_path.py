"""The straight line between two models."""

import jax
import numpy as np
import pytest

from bibau_jax import parallel
from bibau_jax.errors import UserError
from bibau_jax.theory import path


def test_its_ends_are_the_two_models_and_its_middle_their_mean(tiny_variables):
    other = jax.tree.map(lambda leaf: leaf + 2, tiny_variables)
    for share in (0.0, 0.5, 1.0):
        found = path.between(tiny_variables, other, share)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tiny_variables), strict=True):
            np.testing.assert_allclose(a, b + 2 * share, rtol=1e-6)


def test_new_statistics_are_those_of_the_images_and_parameters_stay(tiny, tiny_variables, digits):
    images = digits.train.images[:256]
    found = path.recalibrated(tiny, tiny_variables, images)
    for a, b in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(tiny_variables["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    tap = np.asarray(tiny.apply(tiny_variables, images, taps=True).taps["conv1"], np.float64)
    statistics = found["batch_stats"]["bn1"]
    assert statistics["mean"] == pytest.approx(tap.mean((0, 1, 2)), abs=0.03)
    assert statistics["var"] == pytest.approx(tap.var((0, 1, 2)), rel=0.15, abs=0.01)


def test_too_few_images_for_new_statistics_are_told(tiny, tiny_variables, digits):
    with pytest.raises(UserError, match="new statistics need at least 1 images, there are 0"):
        path.recalibrated(tiny, tiny_variables, digits.train.images[:0])
    with parallel.on_devices(8), pytest.raises(UserError, match="new statistics need at least 8 images, there are 3"):
        path.recalibrated(tiny, tiny_variables, digits.train.images[:3])
