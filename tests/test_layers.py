"""Convolutions against Flax's own, BatchNorm against PyTorch's rules in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bibau_jax.models.layers import BatchNorm, conv, torch_kernel_init

each_shape = pytest.mark.parametrize(
    "size,stride,channels,features,side",
    [
        (3, 1, 3, 8, 6),
        (3, 2, 1, 8, 7),  # stride 2 does not divide 7
        (3, 2, 16, 8, 6),
        (3, 1, 64, 16, 4),
        (1, 1, 16, 8, 4),
        (1, 2, 64, 8, 7),
        (5, 2, 3, 4, 8),
    ],
)


def close(actual, wanted, rtol=1e-4):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=0, atol=rtol * np.abs(w).max())


def make_modules(size, stride, features, dtype=jnp.float32):
    """`conv` and what it should be equal to."""
    shape = dict(kernel_size=(size, size), strides=(stride, stride), padding=((size // 2, size // 2),) * 2)
    flax = nn.Conv(features, **shape, use_bias=False, dtype=dtype, kernel_init=torch_kernel_init)
    return conv(features, size, stride, dtype=dtype, name=None), flax


def make_pair(size, stride, channels, features, side, batch=3, dtype=jnp.float32):
    """`conv` and Flax's own, as functions of (kernel, x), then a kernel and an x."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.2 * rng.normal(size=(size, size, channels, features)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, side, side, channels)), jnp.float32)
    modules = make_modules(size, stride, features, dtype)
    return *[lambda k, x, m=m: m.apply({"params": {"kernel": k}}, x) for m in modules], kernel, x


def loss_of(function):
    return lambda kernel, x: (jnp.tanh(function(kernel, x).astype(jnp.float32)) ** 2).sum()


def test_parameters_are_those_of_flax():
    x = jnp.zeros((1, 4, 4, 3))
    ours, flax = (jax.jit(module.init)(jax.random.key(0), x) for module in make_modules(3, 2, 8))
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
    assert ours["params"]["kernel"].shape == (3, 3, 3, 8)


@each_shape
def test_convolution_and_its_gradients_are_those_of_flax(size, stride, channels, features, side):
    ours, flax, kernel, x = make_pair(size, stride, channels, features, side)

    @partial(jax.jit, static_argnums=0)
    def everything(function, kernel, x):
        gradient = jax.grad(loss_of(function))
        of_input = jax.grad(loss_of(function), 1)(kernel, x)
        per_example = jax.vmap(lambda x: gradient(kernel, x[None]))(x)
        return function(kernel, x), of_input, gradient(kernel, x), per_example

    close(everything(ours, kernel, x), everything(flax, kernel, x))


def test_forward_mode_and_second_derivatives_are_those_of_flax():
    ours, flax, kernel, x = make_pair(3, 2, 3, 4, 7, batch=2)

    @partial(jax.jit, static_argnums=0)
    def everything(function, kernel, x):
        gradient = jax.grad(loss_of(function), (0, 1))
        of_kernel = partial(function, x=x)
        y, pull = jax.vjp(of_kernel, kernel)
        return (
            jax.jvp(function, (kernel, x), (2 * kernel + 1, jnp.cos(x))),
            jax.jvp(of_kernel, (kernel,), pull(y)),  # a product with the NTK
            jax.jvp(gradient, (kernel, x), (kernel + 1, jnp.cos(x))),  # a Hessian-vector product, forward over reverse
            jax.grad(lambda *at: sum((g**2).sum() for g in gradient(*at)), (0, 1))(kernel, x),  # reverse over reverse
        )

    close(everything(ours, kernel, x), everything(flax, kernel, x))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_a_rolled_loop_are_those_outside(stride):
    ours, _, kernel, x = make_pair(3, stride, 3, 8, 6)

    def step(at, _=None):
        return jax.tree.map(lambda a, g: a - 0.01 * g, at, jax.grad(loss_of(ours), (0, 1))(*at)), None

    in_loop, _ = jax.jit(lambda *at: lax.scan(step, at, length=2))(kernel, x)
    once = jax.jit(step)
    close(in_loop, once(once((kernel, x))[0])[0])


def test_bfloat16_network_keeps_float32_parameters_and_gradients():
    ours, flax, kernel, x = make_pair(3, 2, 16, 8, 6, dtype=jnp.bfloat16)
    assert jax.eval_shape(ours, kernel, x).dtype == jnp.bfloat16
    mine, wanted = (jax.jit(jax.grad(loss_of(function), (0, 1)))(kernel, x) for function in (ours, flax))
    assert all(g.dtype == jnp.float32 for g in mine)
    close(mine, wanted, rtol=0.02)


@pytest.mark.parametrize("backend,own", [("cpu", True), ("gpu", False), ("tpu", False)])
def test_off_cpu_the_convolution_is_left_to_xla(monkeypatch, backend, own):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    ours, _, kernel, x = make_pair(3, 1, 3, 4, 4)
    assert ("custom_jvp" in str(jax.make_jaxpr(ours)(kernel, x))) == own


def make_normalised(steps=1, dtype=jnp.float32):
    """A BatchNorm with parameters that are not the defaults, and `steps` batches far from zero mean."""
    rng = np.random.default_rng(0)
    batches = rng.normal(3.0, 2.0, (steps, 6, 5, 4, 7)).astype(np.float32)
    variables = {
        "params": {"scale": jnp.asarray(rng.uniform(0.5, 2, 7), jnp.float32), "bias": jnp.arange(7.0)},
        "batch_stats": {"mean": jnp.asarray(rng.normal(size=7), jnp.float32), "var": jnp.full(7, 1.5)},
    }
    return BatchNorm(dtype=dtype), variables, batches


def as_numpy64(variables):
    flat = {**variables["params"], **variables["batch_stats"]}
    return {name: np.asarray(value, np.float64) for name, value in flat.items()}


def test_train_mode_normalises_by_the_biased_variance_of_the_batch():
    module, variables, (x,) = make_normalised()
    y, _ = module.apply(variables, x, True, mutable=["batch_stats"])
    n, wide = as_numpy64(variables), x.astype(np.float64)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(var + 1e-5) * n["scale"] + n["bias"], atol=2e-5)


def test_running_statistics_follow_pytorch_with_the_unbiased_variance():
    module, variables, batches = make_normalised(steps=3)
    n = as_numpy64(variables)
    for x in batches:
        _, changed = module.apply(variables, x, True, mutable=["batch_stats"])
        variables = {**variables, **changed}
        wide = x.astype(np.float64)
        n["mean"] = 0.9 * n["mean"] + 0.1 * wide.mean((0, 1, 2))
        n["var"] = 0.9 * n["var"] + 0.1 * wide.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], n["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], n["var"], rtol=1e-5)


def test_eval_mode_uses_the_running_statistics_and_changes_nothing():
    module, variables, (x,) = make_normalised()
    y, changed = module.apply(variables, x, False, mutable=["batch_stats"])
    n = as_numpy64(variables)
    np.testing.assert_allclose(y, (x - n["mean"]) / np.sqrt(n["var"] + 1e-5) * n["scale"] + n["bias"], rtol=1e-5, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])


def test_statistics_of_a_bfloat16_network_are_float32():
    module, variables, (x,) = make_normalised(dtype=jnp.bfloat16)
    y, changed = module.apply(variables, jnp.asarray(x, jnp.bfloat16), True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(changed))
