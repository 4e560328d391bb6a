"""Proposition 4.2's angles, for movements of the weights whose direction is known."""

import jax
import numpy as np
import pytest

from bibau_jax.data import ImageSet
from bibau_jax.theory import trajectory


def test_a_gradient_step_on_the_backdoor_points_towards_it_and_its_reverse_is_antagonistic(tiny, tiny_variables, digits):
    clean = digits.test.take(slice(0, 30))
    triggered = ImageSet(digits.test.images[30:60], np.zeros(30, np.int32), digits.test.ids[30:60])
    twin = tiny_variables | {"params": jax.tree.map(lambda leaf: leaf * 0.9, tiny_variables["params"])}
    towards = trajectory.directions(tiny, twin, tiny_variables, clean, triggered)
    step = jax.tree.map(lambda p, d: p + 0.1 * d, tiny_variables["params"], towards.backdoor)
    back = jax.tree.map(lambda p, d: p - 0.1 * d, tiny_variables["params"], towards.backdoor)
    one, other = trajectory.trajectory(tiny_variables, [step, back], towards)
    assert one.whole.to_backdoor == pytest.approx(0, abs=0.2) and one.whole == one.last
    assert other.whole.to_backdoor == pytest.approx(180, abs=0.2) and other.last.to_backdoor == pytest.approx(180, abs=0.2)
    assert one.whole.to_clean == pytest.approx(180 - other.whole.to_clean, abs=0.1) and one.length > 0
    home = trajectory.trajectory(tiny_variables, [twin["params"]], towards)[0]
    assert home.whole.to_implanted == pytest.approx(180, abs=0.1)


def test_angles_are_taken_over_all_parameters_and_for_each_module_by_itself():
    def tree(first, second):
        return {"a": {"x": np.array(first)}, "b": {"x": np.array(second)}}

    towards = trajectory.Directions(tree([1.0, 0.0], [0.0]), tree([0.0, 1.0], [0.0]), tree([0.0, 0.0], [2.0]))
    movement = tree([-1.0, 0.0], [-1.0])
    assert trajectory.angles(movement, towards) == pytest.approx((135, 90, 135))
    found = trajectory.by_group(movement, towards)
    assert found["a"] == pytest.approx((180, 90, 90)) and found["b"] == pytest.approx((90, 90, 180))
