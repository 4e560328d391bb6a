"""The tangent kernel is the explicit Jacobian's Gram matrix, with or without the matrix, on any number of devices."""

import jax
import numpy as np
import pytest

from bibau_jax import models, parallel
from bibau_jax.errors import UserError
from bibau_jax.theory import ntk, products
from tests.conftest import DIGITS

SIZE = 5  # no multiple of any chunk or device count below


@pytest.fixture(scope="module")
def images(digits):
    return digits.train.images[: 2 * SIZE]


@pytest.fixture(scope="module")
def jacobian(tiny, tiny_variables, images):
    """[2 SIZE x 10, parameters] in float64, one backward pass an image and a class."""

    @jax.jit
    def gradient(params, image, label):
        return jax.grad(lambda params: tiny.apply({**tiny_variables, "params": params}, image[None]).logits[0, label])(params)

    rows = []
    for image in images:
        for label in range(10):
            leaves = jax.tree.leaves(gradient(tiny_variables["params"], image, label))
            rows.append(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]))
    return np.stack(rows)


@pytest.fixture(scope="module")
def whole(tiny, tiny_variables, images):
    return ntk.kernel(tiny, tiny_variables, images)


def apart(found, expected) -> float:
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_it_is_the_explicit_jacobians_gram_matrix(whole, jacobian):
    assert whole.dtype == np.float64
    assert apart(whole, jacobian @ jacobian.T) < 1e-5
    assert np.linalg.eigvalsh(whole)[0] > -1e-5 * np.linalg.eigvalsh(whole)[-1]


def test_two_sets_of_images_give_the_block_between_them(tiny, tiny_variables, images, whole):
    found = ntk.kernel(tiny, tiny_variables, images[:3], images[3:8])
    assert found.shape == (30, 50)
    assert apart(found, whole[:30, 30:80]) < 1e-5


def test_it_does_not_depend_on_how_much_memory_it_has(tiny, tiny_variables, images, whole):
    sizes, little = [leaf.size for leaf in jax.tree.leaves(tiny_variables["params"])], 2.4e-5
    assert ntk._columns(sum(sizes), [30, 30], True, little) == 100 < max(sizes)
    assert apart(ntk.kernel(tiny, tiny_variables, images[:3], gigabytes=little), whole[:30, :30]) < 1e-5


def test_it_does_not_depend_on_the_chunk(tiny, tiny_variables, images, whole):
    assert apart(ntk.kernel(tiny, tiny_variables, images, chunk=3), whole) < 1e-5


def test_spans_cover_all_columns_once_and_cut_leaves_where_they_must():
    sizes = [3, 5, 1, 4]
    assert ntk.spans(sizes, 0, 13) == [(0, 0, 3), (1, 0, 5), (2, 0, 1), (3, 0, 4)]
    assert ntk.spans(sizes, 4, 10) == [(1, 1, 5), (2, 0, 1), (3, 0, 1)]
    covered = [piece for begin in range(0, 13, 2) for piece in ntk.spans(sizes, begin, min(begin + 2, 13))]
    assert sum(last - first for _, first, last in covered) == 13


def test_the_mean_logits_kernel_is_the_mean_over_pairs_of_outputs(tiny, tiny_variables, images, whole):
    found = ntk.kernel(tiny, tiny_variables, images, readout=ntk.mean_logit(10))
    assert apart(found, whole.reshape(10, 10, 10, 10).mean((1, 3)) * 10) < 1e-5


def test_eight_devices_give_the_kernel_and_the_products_of_one(tiny, tiny_variables, images, whole):
    vector = np.random.default_rng(0).normal(size=(10, 10))
    expected = products.product(tiny, tiny_variables, images, images, vector)
    with parallel.on_devices(8):
        assert apart(ntk.kernel(tiny, tiny_variables, images), whole) < 1e-5
        assert apart(products.product(tiny, tiny_variables, images, images, vector), expected) < 1e-5


def test_what_does_not_fit_is_refused_with_what_it_would_take(images):
    large = models.build("resnet18", width=64, **DIGITS)
    variables = jax.eval_shape(large.init, jax.random.key(0))
    with pytest.raises(UserError, match=r"kernel of 1000000 x 1000000 rows .* needs at least 24000 GB, more than the 8 GB"):
        ntk.kernel(large, variables, np.broadcast_to(images[:1], (100_000, 16, 16, 1)))
    with pytest.raises(UserError, match=r"needs at least 0.89\d GB, more than the 0.01 GB allowed; take fewer images"):
        ntk.kernel(large, variables, np.broadcast_to(images[:1], (100, 16, 16, 1)), gigabytes=0.01)
    with pytest.raises(UserError, match=r"needs at least 0.00\d+ GB, more than the 0 GB"):
        ntk.kernel(large, variables, images[:1], gigabytes=0)


def test_what_gives_no_kernel_is_told(tiny, tiny_variables, images):
    for wrong, words in (
        ({"images": images[:0]}, "a tangent kernel needs images"),
        ({"images": images, "others": images[:0]}, "a tangent kernel needs images"),
        ({"images": images, "chunk": 0}, "chunk=0 to be at least 1"),
        ({"images": images, "readout": ntk.mean_logit(9)}, r"a readout must be \[10, R\], not \[9, 1\]"),
        ({"images": images, "readout": np.ones(10)}, r"a readout must be \[10, R\], not \[10\]"),
        ({"images": images, "readout": np.ones((10, 0))}, r"a readout must be \[10, R\], not \[10, 0\]"),
    ):
        with pytest.raises(UserError, match=words):
            ntk.kernel(tiny, tiny_variables, **wrong)


def test_products_need_no_kernel(tiny, tiny_variables, images, jacobian):
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(SIZE, 10))
    found = products.product(tiny, tiny_variables, images[SIZE:], images[:SIZE], vector, batch_size=3)
    assert apart(found.ravel(), jacobian[10 * SIZE :] @ (jacobian[: 10 * SIZE].T @ vector.ravel())) < 1e-5


def test_conjugate_gradients_solve_with_a_ridge(tiny, tiny_variables, images, whole):
    residual, ridge = np.random.default_rng(1).normal(size=(10, 10)), 0.01 * np.trace(whole) / len(whole)
    found = products.solve(tiny, tiny_variables, images, residual, ridge=ridge)
    expected = np.linalg.solve(whole + ridge * np.eye(100), residual.ravel())
    assert found.residual < 1e-4 and 1 < found.steps < 100
    assert apart(found.vector.ravel(), expected) < 1e-3
    nothing = products.solve(tiny, tiny_variables, images, np.zeros((10, 10)))
    assert nothing.steps == 0 and not nothing.vector.any()
