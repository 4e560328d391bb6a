"""Diagonal Fisher information by `vmap` of per-example gradients, in chunks (Eq. 23-25)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sum_of_squared_gradients(log_likelihood: Callable, params, examples, weights: jax.Array, *, chunk: int, unroll: int = 1):
    """Sum over examples of weight * (d log_likelihood / d params)^2, a pytree like `params`, in float32.

    Args:
      log_likelihood: maps (params, one example) to a scalar, with the network in evaluation mode: batch statistics would
        make one example's gradient depend on the others.
      examples: pytree whose leaves have a leading axis, a multiple of `chunk`.
      weights: [N], 1 for an example and 0 for padding.
      chunk: how many gradients exist at a time; memory is `chunk` copies of `params`.

    Sharded examples must come through `shard_map` (`parallel.sum_over_devices`): under plain `jit` the per-example gradients
    of a convolution are silently wrong. The diagonal Fisher is this sum over the sum of the weights.
    """

    def add(total, part):
        chunk_examples, chunk_weights = part
        gradients = jax.vmap(jax.grad(log_likelihood), in_axes=(None, 0))(params, chunk_examples)
        return jax.tree.map(lambda t, g: t + jnp.tensordot(chunk_weights, g**2, 1), total, gradients), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), (examples, weights))
    # Zeros made from the parameters carry their device type ("varying") inside shard_map, as the scan's carry must.
    zeros = jax.tree.map(lambda leaf: 0.0 * leaf, params)
    total, _ = jax.lax.scan(add, zeros, parts, unroll=unroll)
    return total
