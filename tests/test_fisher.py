"""The diagonal Fisher information is the mean of squared per-example gradients, on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bibau_jax import parallel
from bibau_jax.information import diagonal_fisher
from bibau_jax.method.fisher import sum_of_squared_gradients

SIZE = 11  # no multiple of any chunk or device count below


@pytest.fixture(scope="module")
def sample(digits):
    return digits.train.images[:SIZE], digits.train.labels[:SIZE]


@pytest.fixture(scope="module")
def by_loop(tiny, tiny_variables, sample):
    """One example after the other, squares added up in float64."""

    @jax.jit
    def gradient(params, image, label):
        def log_likelihood(params):
            logits = tiny.apply({**tiny_variables, "params": params}, image[None]).logits[0]
            return logits[label] - jax.nn.logsumexp(logits)

        return jax.grad(log_likelihood)(params)

    squares = [
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) ** 2, gradient(tiny_variables["params"], image, label))
        for image, label in zip(*sample, strict=True)
    ]
    return jax.tree.map(lambda *leaves: sum(leaves) / SIZE, *squares)


@pytest.fixture(scope="module")
def on_one_device(tiny, tiny_variables, sample):
    return jax.device_get(diagonal_fisher(tiny, tiny_variables, *sample, chunk=4))


def far_apart(found, expected) -> float:
    """The largest relative error of a leaf, in its norm."""
    errors = jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b), found, expected)
    return max(jax.tree.leaves(errors))


def test_it_equals_a_loop_over_single_examples(on_one_device, by_loop):
    assert far_apart(on_one_device, by_loop) < 1e-5


def test_it_has_the_shapes_of_the_parameters_and_is_never_negative(on_one_device, tiny_variables):
    jax.tree.map(lambda f, p: np.testing.assert_equal(f.shape, p.shape), on_one_device, tiny_variables["params"])
    assert all((leaf >= 0).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(on_one_device))


@pytest.mark.parametrize("chunk", [1, 16])
def test_it_does_not_depend_on_the_chunk_or_its_padding(tiny, tiny_variables, sample, on_one_device, chunk):
    assert far_apart(diagonal_fisher(tiny, tiny_variables, *sample, chunk=chunk), on_one_device) < 1e-5


def test_one_rolled_scan_over_all_chunks_gives_the_same(tiny, tiny_variables, sample, on_one_device, monkeypatch):
    monkeypatch.setattr(parallel, "whole_epochs", lambda: True)  # as on a GPU or TPU
    assert far_apart(diagonal_fisher(tiny, tiny_variables, *sample, chunk=4), on_one_device) < 1e-5


def test_eight_devices_give_the_fisher_of_one(tiny, tiny_variables, sample, on_one_device):
    with parallel.on_devices(8):
        found = jax.device_get(diagonal_fisher(tiny, tiny_variables, *sample, chunk=1))
    assert far_apart(found, on_one_device) < 1e-5


def test_a_bfloat16_network_is_measured_in_float32(tiny, tiny_variables, sample, on_one_device):
    narrow = dataclasses.replace(tiny, module=tiny.module.clone(dtype=jnp.bfloat16))
    assert far_apart(diagonal_fisher(narrow, tiny_variables, *sample, chunk=4), on_one_device) == 0.0


def test_other_labels_give_another_fisher(tiny, tiny_variables, sample, on_one_device):
    images, labels = sample
    found = diagonal_fisher(tiny, tiny_variables, images, (labels + 1) % 10, chunk=4)
    assert far_apart(found, on_one_device) > 0.01


# What follows pins down why `parallel.sum_over_devices` is written as it is, on the smallest convolution there is.

IMAGES = jnp.arange(1.0, 9.0).reshape(8, 1, 1, 1)
KERNEL = jnp.array([[[[0.5, -1.0]]]])
# The likelihood is (0.5 x)^2 + 10 (-x)^2, its gradient (x^2, -20 x^2).
SUM_OF_SQUARES = np.array([[[[1.0, 400.0]]]]) * np.sum(np.arange(1.0, 9.0) ** 4)
SQUARE_OF_SUM = np.array([[[[1.0, 400.0]]]]) * np.sum(np.arange(1.0, 9.0) ** 2) ** 2


def likelihood(kernel, image):
    numbers = ("NHWC", "HWIO", "NHWC")
    channels = jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "VALID", dimension_numbers=numbers)
    return channels[0, 0, 0] ** 2 @ jnp.array([1.0, 10.0])


def squares(kernel, images):
    return sum_of_squared_gradients(likelihood, kernel, images, jnp.ones(len(images)), chunk=len(images))


def test_on_one_device_the_smallest_case_is_right():
    np.testing.assert_allclose(squares(KERNEL, IMAGES), SUM_OF_SQUARES, rtol=1e-6)


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="JAX 0.8-0.12 splits the convolution of such gradients wrongly")
def test_plain_jit_gives_the_right_per_example_gradients_of_a_sharded_batch():
    with parallel.on_devices(8):
        spread = jax.device_put(IMAGES, NamedSharding(parallel.mesh(), P("data")))
        np.testing.assert_allclose(jax.jit(squares)(parallel.replicate(KERNEL), spread), SUM_OF_SQUARES, rtol=1e-6)


def test_through_sum_over_devices_they_are_right():
    with parallel.on_devices(8):
        found = parallel.sum_over_devices(squares)(*parallel.replicate((KERNEL, IMAGES)))
        np.testing.assert_allclose(found, SUM_OF_SQUARES, rtol=1e-6)


def test_without_the_cast_to_varying_gradients_are_summed_over_devices_before_they_are_squared():
    """If this fails, JAX has changed what `grad` means inside `shard_map`: look at the cast in `sum_over_devices` again."""

    def local(kernel, images):
        return jax.lax.psum(jax.grad(likelihood)(kernel, images[0]) ** 2, "data")

    with parallel.on_devices(8):
        spread = {"mesh": parallel.mesh(), "in_specs": (P(), P("data")), "out_specs": P()}
        np.testing.assert_allclose(jax.jit(jax.shard_map(local, **spread))(KERNEL, IMAGES), 8 * SQUARE_OF_SUM, rtol=1e-6)
        unchecked = jax.shard_map(local, **spread, check_vma=False)
        np.testing.assert_allclose(jax.jit(unchecked)(KERNEL, IMAGES), SUM_OF_SQUARES, rtol=1e-6)
