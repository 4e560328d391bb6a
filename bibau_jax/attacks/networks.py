"""The networks that attacks train for their triggers: IAD's generators, ISSBA's encoder and decoder."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.models.layers import BatchNorm, conv

DOWN = (1, 2, 4)  # channels of the three halvings, in multiples of the width


def enlarged(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear, half-pixel centres, edges repeated: [N, h, w, C] to [N, height, width, C].

    Twice the size is made of neighbours, in a fifth of the time that `jax.image.resize` takes on the CPU.
    """
    if (height, width) != (2 * x.shape[1], 2 * x.shape[2]):
        return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "bilinear")
    for axis in (1, 2):
        size = x.shape[axis]
        before, after = (jnp.concatenate(pair, axis) for pair in _neighbours(x, axis, size))
        doubled = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = doubled.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


def _neighbours(x, axis, size):
    part = partial(jax.lax.slice_in_dim, x, axis=axis)
    return [part(0, 1), part(0, size - 1)], [part(1, size), part(size - 1, size)]


class Generator(nn.Module):
    """IAD's generator: three stages down, one in the middle, three up; [N, H, W, C] to unsquashed [N, H, W, out].

    Every convolution is 3x3 with BatchNorm (momentum 0.05) behind it, and ReLU but for the last. `width` 32 is the
    original's. Sizes that do not halve evenly are met again on the way up.
    """

    out: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        count = 0

        def layer(x, features, relu=True):
            nonlocal count
            count += 1
            x = conv(features, 3, use_bias=True, dtype=jnp.float32, name=f"conv{count}")(x)
            x = BatchNorm(momentum=0.05, name=f"bn{count}")(x, train)
            return nn.relu(x) if relu else x

        sizes = []
        for factor in DOWN:
            x = layer(layer(x, factor * self.width), factor * self.width)
            sizes.append(x.shape[1:3])
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = layer(x, DOWN[-1] * self.width)
        for factor, after, size in zip(DOWN[::-1], (*DOWN[-2::-1], 0), sizes[::-1], strict=True):
            x = enlarged(x, *size)
            x = layer(x, factor * self.width)
            x = layer(x, after * self.width or self.out, relu=bool(after))
        return x


class StegoEncoder(nn.Module):
    """ISSBA's encoder: a secret [N, bits] and an image in 0..1 [N, H, W, C] to the image that carries it, in 0..1.

    A U-Net of five levels over the image and the secret spread out as three more channels; `width` 32 is BackdoorBench's.
    """

    width: int = 32

    @nn.compact
    def __call__(self, secret: jax.Array, images: jax.Array) -> jax.Array:
        def layer(x, features, size=3, stride=1, name=""):
            return nn.relu(conv(features, size, stride, use_bias=True, dtype=jnp.float32, name=name)(x))

        def grown(x, like):
            return jax.image.resize(x, (*like.shape[:3], x.shape[3]), "nearest")

        plane = nn.relu(nn.Dense(16 * 16 * 3, name="secret")(secret - 0.5)).reshape(-1, 16, 16, 3)
        start = jnp.concatenate([grown(plane, images), images - 0.5], axis=-1)
        levels, x = [], start
        for number, factor in enumerate((1, 1, 2, 4, 8)):
            x = layer(x, factor * self.width, stride=2 if number else 1, name=f"down{number}")
            levels.append(x)
        for number, factor in enumerate((4, 2, 1, 1)):
            skip = levels[-2 - number]
            x = jnp.pad(grown(x, skip), ((0, 0), (0, 1), (0, 1), (0, 0)))
            x = nn.relu(nn.Conv(factor * self.width, (2, 2), padding="VALID", name=f"up{number}")(x))
            x = jnp.concatenate([x, skip] + ([start] if number == 3 else []), axis=-1)
            x = layer(x, factor * self.width, name=f"merge{number}")
        x = layer(x, self.width, name="last")
        return nn.sigmoid(conv(images.shape[3], 1, use_bias=True, dtype=jnp.float32, name="image")(x))


class StegoDecoder(nn.Module):
    """ISSBA's decoder: images in 0..1 [N, H, W, C] to the logits of the secret's bits [N, bits]."""

    bits: int
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images - 0.5
        for number, (factor, stride) in enumerate(((1, 2), (1, 1), (2, 2), (2, 1), (2, 2), (4, 2), (4, 2))):
            x = nn.relu(conv(factor * self.width, 3, stride, use_bias=True, dtype=jnp.float32, name=f"conv{number}")(x))
        x = nn.relu(nn.Dense(16 * self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.bits, name="bits")(x)
