"""Projected gradient ascent on images, the E-step of the bi-level problem (Eq. 2, 22, 27): a `lax.scan` of gradient steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NORMS = ("l2", "linf", "l1")
TINY = 1e-12
MOVED = 0.01  # share of an image's values that one step of "l1" moves at least
FARTHEST = 64.0  # grey levels that it moves a value at most, as long as others can move


def ascent_step(gradient: jax.Array, norm: str, size: float | jax.Array) -> jax.Array:
    """A step of length `size` (of all images, or [N, 1, 1, 1]) in `norm`, per image, along which the objective rises.

    The steepest for "linf" (the sign) and "l2" (the normalised gradient). For "l1" the steepest moves one value; here those
    with the steepest slopes move by the same amount each, the share MOVED of them (Tramer & Boneh, "Adversarial Training and
    Robustness for Multiple Perturbations", 2019, section 4.1), or as many more as let none move farther than FARTHEST.
    """
    if norm == "linf":
        return size * jnp.sign(gradient)
    if norm == "l2":
        return size * gradient / jnp.maximum(_length(gradient), TINY)
    slopes = jnp.abs(gradient.reshape(len(gradient), -1))
    values = slopes.shape[1]
    each = jnp.broadcast_to(size, (len(gradient), 1, 1, 1))[..., 0, 0]
    count = jnp.clip(jnp.ceil(each / FARTHEST), max(1, round(MOVED * values)), values).astype(int)
    least = jnp.take_along_axis(jnp.sort(slopes, -1, descending=True), count - 1, axis=-1)
    moved = jnp.sign(gradient) * ((slopes >= least) & (slopes > 0)).reshape(gradient.shape)
    return size * moved / jnp.maximum(_total(moved), 1.0)


def by_blocks(gradient: jax.Array, block: int, offset: jax.Array) -> jax.Array:
    """Of every value the mean over its channel in its square of `block` x `block` pixels; [N, H, W, C].

    The squares lie side by side, moved up and to the left by `offset` [2], 0..block - 1; those at the border are smaller.
    """

    def shares(length: int, first) -> jax.Array:  # [pixels, squares]: which lies in which
        return jax.nn.one_hot((jnp.arange(length) + first) // block, length // block + 2)

    _, height, width, _ = gradient.shape
    rows, columns = shares(height, offset[0]), shares(width, offset[1])
    sums = jnp.einsum("nhwc,hi,wj->nijc", gradient, rows, columns)
    means = sums / jnp.maximum(rows.sum(0)[:, None] * columns.sum(0), 1.0)[..., None]
    return jnp.einsum("nijc,hi,wj->nhwc", means, rows, columns)


def project(perturbation: jax.Array, epsilon: float | jax.Array, norm: str) -> jax.Array:
    """The nearest perturbation [N, H, W, C] whose `norm` is at most `epsilon` (pixels 0..255; or [N, 1, 1, 1]), per image."""
    if norm == "linf":
        return jnp.clip(perturbation, -epsilon, epsilon)
    if norm == "l1":
        return jnp.sign(perturbation) * jnp.maximum(jnp.abs(perturbation) - _excess(perturbation, epsilon), 0.0)
    return perturbation * jnp.minimum(1.0, epsilon / jnp.maximum(_length(perturbation), TINY))


def adversarial_images(
    gradient: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    norm: str,
    epsilon: float | jax.Array,
    step_size: float | jax.Array,
    steps: int,
    start: jax.Array | None = None,
    block: int = 1,
    offset: jax.Array | None = None,
    clip: bool = True,
    unroll: int = 1,
) -> jax.Array:
    """Images x' = x + delta after `steps` ascent steps, with ||delta|| <= epsilon and x' in 0..255.

    Args:
      gradient: maps x' [N, H, W, C] to the gradient of the *summed* objective, so that no image's step depends on the others.
      images: x, float32 in 0..255; epsilon and step_size are in the same units, of all images or [N, 1, 1, 1].
      norm: "l2", "linf" or "l1". The paper gives bound 25 and step 2.0 on this scale; the norm is lost in its text.
      start: first perturbation, e.g. a random one; zero where None. It is projected first.
      block: above 1, every second image is moved in squares of so many pixels a side, all pixels of one alike in each channel,
        with bound and step times `block`; `offset` [2] is where squares begin, see `by_blocks` (ours: values that move one
        by one do not come near a patch of one colour).
      clip: False lets x' leave 0..255, as a baseline's authors do.
      unroll: how many steps of the scan to lay out; all of them on the CPU, where rolled convolution gradients are slow.
    """

    if block > 1:
        in_blocks = (jnp.arange(len(images)) % 2 == 1)[:, None, None, None]
        epsilon, step_size = (jnp.where(in_blocks, block * value, value) for value in (epsilon, step_size))

    def keep(perturbation):
        perturbation = project(perturbation, epsilon, norm)
        # Clipping to the pixel range only shrinks coordinates, so the result stays inside the ball.
        return jnp.clip(images + perturbation, 0.0, 255.0) - images if clip else perturbation

    def step(perturbation, _):
        at = images + perturbation
        slope = gradient(at)
        if norm == "l1":  # the few values that a step moves shall be such as can move
            slope = jnp.where(jnp.where(slope > 0, at < 254.5, at > 0.5), slope, 0.0)
        if block > 1:
            slope = jnp.where(in_blocks, by_blocks(slope, block, offset), slope)
        return keep(perturbation + ascent_step(slope, norm, step_size)), None

    first = jnp.zeros_like(images) if start is None else keep(start)
    if steps == 0:
        return images + first
    last, _ = jax.lax.scan(step, first, length=steps, unroll=unroll)
    # x + (x' - x) may round to just outside.
    return jnp.clip(images + last, 0.0, 255.0) if clip else images + last


def random_start(key: jax.Array, shape, *, norm: str, epsilon: float | jax.Array) -> jax.Array:
    """A random perturbation: uniform in the cube of "linf", uniform direction and radius in the balls of "l2" and "l1"."""
    if norm == "linf":
        return jax.random.uniform(key, shape, minval=-epsilon, maxval=epsilon)
    direction, radius = jax.random.split(key)
    noise = (jax.random.laplace if norm == "l1" else jax.random.normal)(direction, shape)
    length = _total(noise) if norm == "l1" else _length(noise)
    return epsilon * noise / length * jax.random.uniform(radius, (shape[0], 1, 1, 1))


def _length(images: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3), keepdims=True))


def _total(images: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(images), axis=(1, 2, 3), keepdims=True)


def _excess(perturbation: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """What every value must come nearer to zero by for the nearest point of the L1 ball (Duchi et al., ICML 2008, figure 1)."""
    sizes = jnp.sort(jnp.abs(perturbation.reshape(len(perturbation), -1)), -1, descending=True)
    counts = jnp.arange(1, sizes.shape[1] + 1)
    by_count = (jnp.cumsum(sizes, -1) - jnp.reshape(epsilon, (-1, 1))) / counts
    kept = jnp.sum(sizes > by_count, -1, keepdims=True)
    found = jnp.take_along_axis(by_count, jnp.maximum(kept - 1, 0), -1)
    return jnp.maximum(found, 0.0)[:, :, None, None]
