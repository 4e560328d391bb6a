"""VGG with BatchNorm (Simonyan and Zisserman, ICLR 2015) as torchvision has it: 3x3 convolutions, max-pools, linear layers."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax.errors import UserError
from bibau_jax.models.classifier import Classifier, NormOfConv
from bibau_jax.models.layers import BatchNorm, Head, Normalize, conv, linear

POOLED = 7  # pixels along a side that the hidden layers are given


class MaxPool(nn.Module):
    """The largest of every 2x2 pixels; a module, so that what a stage gives can be looked at."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (2, 2), (2, 2))


class VGG(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]).

    Stage s has `stages[s]` convolutions (with biases) of `width * min(2**s, 8)` channels, each with BN-ReLU, then a max-pool.
    What is left is averaged to 7x7 and goes through two layers of `hidden` units, without dropout.
    """

    classes: int
    width: int
    stages: Sequence[int]
    hidden: int
    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = Normalize(self.mean, self.std, self.dtype)(pixels)
        for number, features in layout(self.width, self.stages):
            if features is None:
                x = MaxPool(name=f"features_{number}")(x)
                continue
            x = conv(features, 3, use_bias=True, dtype=self.dtype, name=f"features_{number}")(x)
            self.sow("taps", f"features_{number}_output", x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"features_{number + 1}")(x, train))
        x = averaged(x.astype(jnp.float32), POOLED if self.hidden else 1)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1).astype(self.dtype)  # C, H, W: the order of the weights behind it
        for number in (0, 3) if self.hidden else ():
            x = nn.relu(linear(self.hidden, x.shape[-1], dtype=self.dtype, name=f"classifier_{number}")(x))
        features = x.astype(jnp.float32)
        return Head(self.classes, name="head")(features), features


def averaged(x: jax.Array, size: int) -> jax.Array:
    """[N, H, W, C] to [N, size, size, C] as PyTorch's AdaptiveAvgPool2d: means over parts that may overlap or repeat pixels."""
    rows, columns = (_parts(length, size) for length in x.shape[1:3])
    return jnp.einsum("nhwc,ph,qw->npqc", x, rows, columns, precision=jax.lax.Precision.HIGHEST)


def _parts(length: int, size: int) -> np.ndarray:
    """Weights [size, length]: row i takes the mean of positions floor(i length / size) to ceil((i + 1) length / size) - 1."""
    weights = np.zeros((size, length), np.float32)
    for i in range(size):
        begin, end = i * length // size, -(-(i + 1) * length // size)
        weights[i, begin:end] = 1 / (end - begin)
    return weights


def layout(width: int, stages: Sequence[int]) -> list[tuple[int, int | None]]:
    """(number in torchvision's `features`, channels) of every convolution, and (number, None) of every max-pool, in order."""
    found, number = [], 0
    for stage, depth in enumerate(stages):
        for _ in range(depth):
            found.append((number, width * min(2**stage, 8)))
            number += 3  # convolution, norm, ReLU
        found.append((number, None))
        number += 1
    return found


def vgg19_bn(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 64,
    stages: Sequence[int] = (2, 2, 4, 4, 4),
    hidden: int = 4096,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: Any = jnp.float32,
) -> Classifier:
    """VGG19-BN; `width`, `stages` and `hidden` make it smaller. Mean and std on the 0..1 scale.

    `hidden` 0 leaves out the hidden layers and averages to one pixel, as versions for 32x32 images do. torchvision's dropout is
    left out. Names follow its numbers. UserError for images that the max-pools would leave nothing of.
    """
    least = 2 ** len(stages)
    if min(image_shape[:2]) < least:
        raise UserError(
            f"a VGG of {len(stages)} stages halves images as often: {image_shape[0]}x{image_shape[1]} pixels are too few, "
            f"it takes {least}x{least} or more"
        )
    numbers = layout(width, stages)
    norms = [NormOfConv((f"features_{n}",), (f"features_{n + 1}",)) for n, features in numbers if features is not None]
    ends = tuple((f"features_{n}",) for n, features in numbers if features is None)
    module = VGG(num_classes, width, tuple(stages), hidden, tuple(mean), tuple(std), dtype)
    return Classifier(module, num_classes, tuple(image_shape), norms=tuple(norms), stages=ends)
