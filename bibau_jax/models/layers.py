"""Layers with PyTorch's arithmetic, as checkpoints come from there: padding written out, its BatchNorm, its initialisers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# PyTorch's default for convolutions and linear layers, kaiming_uniform(a = sqrt 5), is uniform in +-1/sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(inputs: int):
    """PyTorch's default for the biases of a layer with so many inputs to a unit: uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(features: int, size: int, stride: int = 1, *, use_bias: bool = False, dtype, name: str) -> nn.Conv:
    """A square convolution, padded by size // 2 on every side as PyTorch pads it."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,  # "SAME" would pad (0, 1) at stride 2, PyTorch pads (1, 1)
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=torch_kernel_init,
        conv_general_dilated=_nn_conv_on_cpu if jax.default_backend() == "cpu" else None,
        name=name,
    )


# On CPU, XLA runs only convolutions laid out NHWC, HWIO -> NHWC by its fast kernel. It rearranges others to that, but
# not inside loops, and JAX writes both gradients of such a convolution in other layouts: in a rolled lax.scan, a PGD
# step was 5 to 8 times slower than outside, a training step 30 times. The tangents below are laid out the other way
# round, so that it is their transposes, the gradients, that are NHWC, HWIO -> NHWC; they then cost the same in and
# out of loops. All of it is plain convolutions, so forward mode, vmap and higher derivatives need nothing more.


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_on_cpu(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@partial(_conv_on_cpu.defjvp, symbolic_zeros=True)  # else a frozen kernel or input would cost a convolution with zeros
def _conv_on_cpu_jvp(strides, padding, primals, tangents):
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _conv_on_cpu(x, kernel, strides, padding)
    conv = partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        y_dot += conv(x_dot, kernel.transpose(0, 1, 3, 2), dimension_numbers=("NHWC", "HWOI", "NHWC"))
    if not isinstance(kernel_dot, SymbolicZero):
        chwn, ihwo = x.transpose(3, 1, 2, 0), kernel_dot.transpose(2, 0, 1, 3)
        y_dot += conv(chwn, ihwo, dimension_numbers=("CHWN", "IHWO", "HWNC")).transpose(2, 0, 1, 3)
    return y, y_dot


def _nn_conv_on_cpu(x, kernel, strides, padding, **_):  # as nn.Conv calls it; the rest are defaults here
    return _conv_on_cpu(x, kernel, tuple(strides), tuple(padding))


class BatchNorm(nn.Module):
    """BatchNorm over N, H, W as PyTorch's: running <- (1 - momentum) running + momentum batch, unbiased running variance.

    Statistics are float32 whatever `dtype` the network computes in.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean, var = running_mean.value, running_var.value
        if train:
            wide = x.astype(jnp.float32)
            mean = wide.mean((0, 1, 2))
            var = jnp.maximum((wide**2).mean((0, 1, 2)) - mean**2, 0.0)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return x * gain.astype(self.dtype) + (bias - mean * gain).astype(self.dtype)


class Normalize(nn.Module):
    """(pixels / 255 - mean) / std per channel: the first layer of every network, so nothing else converts scales."""

    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32

    def __call__(self, pixels: jax.Array) -> jax.Array:
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return ((pixels / 255.0 - mean) / std).astype(self.dtype)


def linear(units: int, inputs: int, *, dtype: Any = jnp.float32, name: str) -> nn.Dense:
    """A linear layer that begins as PyTorch's."""
    given = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(inputs)}
    return nn.Dense(units, dtype=dtype, **given, name=name)


class Head(nn.Module):
    """The linear classifier, in float32: logits from features."""

    classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        inputs = features.shape[-1]
        kernel = self.param("kernel", torch_kernel_init, (inputs, self.classes))
        bias = self.param("bias", torch_bias_init(inputs), (self.classes,))
        return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias
