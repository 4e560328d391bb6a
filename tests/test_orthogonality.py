"""Orthogonality and linearity: their formulas on small vectors and lines, and what they say of a small network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import keys, models, parallel
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.models import inside
from bibau_jax.theory import orthogonality
from tests.conftest import DIGITS


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


def plain_gradient(classifier, variables, images):
    """Of the mean cross-entropy, in one piece."""

    def loss(params):
        logits = classifier.apply(variables | {"params": params}, images.images).logits
        return (jax.nn.logsumexp(logits, 1) - logits[np.arange(len(images)), images.labels]).mean()

    return jax.jit(jax.grad(loss))(variables["params"])


def test_gradients_are_those_of_the_kernels_without_shortcuts(digits):
    """Two stages, the second behind a shortcut of its own."""
    classifier = models.build("resnet18", width=4, stages=(1, 1), **DIGITS)
    variables = jax.device_get(classifier.init(keys.root(0)))
    clean, other = digits.train.take(slice(0, 20)), digits.train.take(slice(20, 40))
    flat = []
    for images in (clean, other):
        found = plain_gradient(classifier, variables, images)
        first, second = found["layer1_0"], found["layer2_0"]
        assert "shortcut_conv" in second
        layers = found["conv1"], first["conv1"], first["conv2"], second["conv1"], second["conv2"]
        flat.append(np.concatenate([np.asarray(layer["kernel"], np.float64).ravel() for layer in layers]))
    expected = orthogonality.angle(*map(np.abs, flat)), orthogonality.angle(*flat)
    assert orthogonality.orthogonality(classifier, variables, clean, other) == pytest.approx(expected, abs=0.01)
    np.testing.assert_allclose(
        orthogonality._kernels(classifier, plain_gradient(classifier, variables, clean)), flat[0], rtol=1e-6
    )


def test_descent_is_the_negative_gradient_of_the_mean_loss(tiny, tiny_variables, digits):
    images = digits.test.take(slice(0, 7))
    found, expected = orthogonality.descent(tiny, tiny_variables, images), plain_gradient(tiny, tiny_variables, images)
    with parallel.on_devices(8):
        spread = orthogonality.descent(tiny, tiny_variables, images)
    half = models.build("resnet18", **DIGITS | {"width": 4, "stages": (1,), "dtype": jnp.bfloat16})
    same = orthogonality.descent(half, tiny_variables, images)
    for a, b, c, d in zip(*map(jax.tree.leaves, (found, expected, spread, same)), strict=True):
        np.testing.assert_allclose(a, -b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)
        np.testing.assert_array_equal(a, d)  # computed in float32, whatever the network trains in


def test_nothing_to_compare_is_refused(backdoored, linear):
    none, (classifier, variables) = backdoored.clean.take(slice(0, 0)), linear
    with pytest.raises(UserError, match="needs clean and triggered"):
        orthogonality.orthogonality(backdoored.classifier, backdoored.variables, none, backdoored.clean)
    with pytest.raises(UserError, match="a task's gradient needs images"):
        orthogonality.descent(backdoored.classifier, backdoored.variables, none)
    images = backdoored.test.images[:4]
    with pytest.raises(UserError, match="norms of convolutions, and this network has none"):
        orthogonality.linearity(keys.root(0), classifier, variables, images, images, np.zeros(4, int))


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
    mixed = np.stack([2 * weights, np.ones(21)], 1)
    assert orthogonality.straightness(weights, mixed) == pytest.approx(1)  # what never changes is neither straight nor bent
    assert np.isnan(orthogonality.straightness(weights, np.ones((21, 2))))


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
