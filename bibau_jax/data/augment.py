"""Training-time augmentation inside jitted code."""

import jax
import jax.numpy as jnp

from bibau_jax import keys
from bibau_jax.errors import UserError


def crop_and_flip(key: jax.Array, pixels: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Random crop after zero padding, then a horizontal flip with probability 1/2; each image has its own draw.

    pixels: [N, H, W, C], any type; the result has the same shape and type. padding: pixels on each side, 0 for no crop.
    The draws depend on the key and the place in the global batch, so one device and many give the same images.
    UserError for a negative padding. Source: He et al. 2016, section 4.2 (padding 4 on CIFAR-10).
    """
    if padding < 0:
        raise UserError(f"padding must not be negative: {padding}")
    batch, height, width, _ = pixels.shape
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    if flip:
        flipped = jax.random.bernoulli(keys.stream(key, "flip"), 0.5, (batch, 1))
        columns = jnp.where(flipped, columns[:, ::-1], columns)
    # Gathers along one axis stay on the device that holds the image. Indexing all axes at once costs an all-reduce;
    # dynamic_slice under vmap is as fast but refuses an explicitly sharded batch.
    if padding:
        top, left = jax.random.randint(keys.stream(key, "crop"), (2, batch, 1), 0, 2 * padding + 1)
        rows, columns = rows + top, columns + left
        pixels = jnp.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        pixels = jnp.take_along_axis(pixels, rows[:, :, None, None], axis=1)
    if padding or flip:
        pixels = jnp.take_along_axis(pixels, columns[:, None, :, None], axis=2)
    return pixels


def cutout(key: jax.Array, pixels: jax.Array, *, length: int) -> jax.Array:
    """Blackens one square of each image, `length` pixels a side (0: none), whose centre lies anywhere in it; edges cut it off.

    pixels: [N, H, W, C], any type; the result has the same shape and type. UserError for a negative length.
    Source: DeVries and Taylor 2017.
    """
    if length < 0:
        raise UserError(f"cutout must not be negative: {length}")
    if not length:
        return pixels
    batch, height, width, _ = pixels.shape

    def covered(name, size):
        first = jax.random.randint(keys.stream(key, name), (batch, 1), 0, size) - length // 2
        places = jnp.arange(size)[None]
        return (places >= first) & (places < first + length)

    hole = covered("row", height)[:, :, None, None] & covered("column", width)[:, None, :, None]
    return jnp.where(hole, jnp.zeros_like(pixels), pixels)
