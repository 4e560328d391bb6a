"""Named key streams: a key depends on (seed, name, step) alone, so adding a stream changes no other."""

import zlib

import jax


def root(seed: int) -> jax.Array:
    """The key that every stream of a run is folded from."""
    return jax.random.key(seed)


def stream(key: jax.Array, name: str, step=0) -> jax.Array:
    """The key called `name` at `step` (a Python or a traced integer); nothing is split."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF), step)
