"""Orthogonality and linearity: their formulas on small vectors and lines, and what they say of a small network."""

import jax
import numpy as np
import pytest

from bibau_jax import keys
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.models import inside
from bibau_jax.theory import orthogonality


def test_angles_of_known_vectors():
    right = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    assert orthogonality.angle(*right) == pytest.approx(90)
    assert orthogonality.angle(np.array([1.0, 1.0]), np.array([-1.0, -1.0])) == pytest.approx(180)
    assert orthogonality.angle(np.array([1.0, 1.0]), np.array([3.0, 0.0])) == pytest.approx(45)
    assert orthogonality.angle(np.zeros(2), np.ones(2)) == 90


def test_independent_gradients_are_square_signed_and_at_fifty_degrees_in_magnitude():
    one, other = np.random.default_rng(0).normal(size=(2, 200_000))
    assert orthogonality.angle(one, other) == pytest.approx(90, abs=0.5)
    assert orthogonality.angle(np.abs(one), np.abs(other)) == pytest.approx(np.degrees(np.arccos(2 / np.pi)), abs=0.5)


def test_a_task_with_itself_has_no_angle_and_the_opposite_labels_have_one(backdoored):
    images = backdoored.clean.take(slice(0, 60))
    same = orthogonality.orthogonality(backdoored.classifier, backdoored.variables, images, images, batch_size=30)
    assert same == pytest.approx((0, 0), abs=0.1)
    other = ImageSet(images.images, (images.labels + 1) % 10, images.ids)
    found = orthogonality.orthogonality(backdoored.classifier, backdoored.variables, images, other, batch_size=30)
    assert 0 < found[0] < 90 and found[1] > 5


def test_gradients_are_those_of_the_kernels_without_shortcuts(backdoored):
    paths = ["/".join(pair.conv) for pair in backdoored.classifier.main_path]
    assert paths == ["conv1", "layer1_0/conv1", "layer1_0/conv2"]


def test_nothing_to_compare_is_refused(backdoored):
    none = backdoored.clean.take(slice(0, 0))
    with pytest.raises(UserError, match="needs clean and triggered"):
        orthogonality.orthogonality(backdoored.classifier, backdoored.variables, none, backdoored.clean)


def test_the_output_of_a_layer_can_be_replaced(tiny, tiny_variables, digits):
    pixels, path = digits.test.images[:3], ("layer1_0", "bn2")
    plain = tiny.apply(tiny_variables, pixels).logits
    same = inside.replace(tiny, tiny_variables, pixels, path, lambda given: given).logits
    np.testing.assert_allclose(same, plain, rtol=1e-6)
    other = inside.replace(tiny, tiny_variables, pixels, path, lambda given: given + 1).logits
    assert np.abs(np.asarray(other) - np.asarray(plain)).max() > 1e-3


def test_straight_lines_have_an_r_squared_of_one_and_a_parabola_about_its_top_has_none():
    weights = np.linspace(-1, 1, 21)
    assert orthogonality.straightness(weights, np.stack([2 * weights, -weights + 3], 1)) == pytest.approx(1)
    assert orthogonality.straightness(weights, (weights**2)[:, None]) == pytest.approx(0, abs=1e-9)
    assert orthogonality.straightness(weights, np.ones((21, 2))) == 1


def test_the_last_layer_answers_straight_by_construction(backdoored):
    """Behind the last norm come a ReLU, a mean and the linear head: turned up, channels that are on answer in a line."""
    images = backdoored.test.take(np.flatnonzero(backdoored.test.labels != 0)[:40])
    triggered = backdoored.attack.stamp(images.images, images.ids)
    found = orthogonality.linearity(
        keys.root(0), backdoored.classifier, backdoored.variables, images.images, triggered, np.zeros(40, int), share=0.1
    )
    assert list(found) == ["bn1", "layer1_0/bn1", "layer1_0/bn2"]
    assert all(0 <= value <= 1 for pair in found.values() for value in pair)
    assert found["layer1_0/bn2"][0] > 0.9


def test_attributions_find_the_channel_that_the_target_hangs_on(backdoored):
    """With all but one channel of the head's rows for class 0 at zero, that channel is the trigger's."""
    variables = jax.tree.map(np.array, backdoored.variables)
    kernel = variables["params"]["head"]["kernel"]
    kernel[:, 0] = 0
    images = backdoored.test.take(np.flatnonzero(backdoored.test.labels != 0)[:24])
    triggered = backdoored.attack.stamp(images.images, images.ids)
    spread = np.asarray(backdoored.classifier.apply(variables, triggered).features).std(0)
    kernel[spread.argmax(), 0] = 5.0
    clean = backdoored.test.images[: orthogonality.BASELINES]
    aims = np.zeros(24, np.int32)
    found = orthogonality._attributions(
        backdoored.classifier, variables, triggered, clean, aims, keys.root(0), path=("layer1_0", "bn2")
    )
    assert int(np.abs(np.asarray(found)).argmax()) == spread.argmax()
