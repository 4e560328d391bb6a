"""Projected gradient ascent on images, the E-step of the bi-level problem (Eq. 2, 22, 27): a `lax.scan` of gradient steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NORMS = ("l2", "linf")
TINY = 1e-12


def ascent_direction(gradient: jax.Array, norm: str) -> jax.Array:
    """The steepest-ascent step of length 1 in `norm`, per image: the sign for "linf", the normalised gradient for "l2"."""
    if norm == "linf":
        return jnp.sign(gradient)
    return gradient / jnp.maximum(_length(gradient), TINY)


def project(perturbation: jax.Array, epsilon: float, norm: str) -> jax.Array:
    """The nearest perturbation [N, H, W, C] whose `norm` is at most `epsilon` (pixels 0..255), per image."""
    if norm == "linf":
        return jnp.clip(perturbation, -epsilon, epsilon)
    return perturbation * jnp.minimum(1.0, epsilon / jnp.maximum(_length(perturbation), TINY))


def adversarial_images(
    gradient: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    norm: str,
    epsilon: float,
    step_size: float,
    steps: int,
    start: jax.Array | None = None,
    unroll: int = 1,
) -> jax.Array:
    """Images x' = x + delta after `steps` ascent steps, with ||delta|| <= epsilon and x' in 0..255.

    Args:
      gradient: maps x' [N, H, W, C] to the gradient of the *summed* objective, so that no image's step depends on the others.
      images: x, float32 in 0..255; epsilon and step_size are in the same units.
      norm: "l2" or "linf". The paper gives bound 25 and step 2.0 on this scale; the norm is lost in its text.
      start: first perturbation, e.g. a random one; zero where None. It is projected first.
      unroll: how many steps of the scan to lay out; all of them on the CPU, where rolled convolution gradients are slow.
    """

    def keep(perturbation):
        # Clipping to the pixel range only shrinks coordinates, so the result stays inside the ball.
        return jnp.clip(images + project(perturbation, epsilon, norm), 0.0, 255.0) - images

    def step(perturbation, _):
        return keep(perturbation + step_size * ascent_direction(gradient(images + perturbation), norm)), None

    first = jnp.zeros_like(images) if start is None else keep(start)
    if steps == 0:
        return images + first
    last, _ = jax.lax.scan(step, first, length=steps, unroll=unroll)
    # x + (x' - x) may round to just outside.
    return jnp.clip(images + last, 0.0, 255.0)


def random_start(key: jax.Array, shape, *, norm: str, epsilon: float) -> jax.Array:
    """A random perturbation: uniform in the cube of "linf", uniform direction and radius in the ball of "l2"."""
    if norm == "linf":
        return jax.random.uniform(key, shape, minval=-epsilon, maxval=epsilon)
    direction, radius = jax.random.split(key)
    noise = jax.random.normal(direction, shape)
    return epsilon * noise / _length(noise) * jax.random.uniform(radius, (shape[0], 1, 1, 1))


def _length(images: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3), keepdims=True))
