"""A U-Net from images to images of the same size: what BTI-DBF reverses triggers with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.models.layers import conv

DEPTH = 4  # halvings at most


def halvings(height: int, width: int) -> int:
    """How often images are halved: `DEPTH` times, or until two places are left; InstanceNorm of a single one is always 0."""
    return next(depth for depth in range(DEPTH, -1, -1) if min(height, width) > 2**depth or not depth)


class UNet(nn.Module):
    """[N, H, W, C] to [N, H, W, C], nothing squashed: `halvings` with skips, InstanceNorm and leaky ReLU throughout.

    `width` channels at full size, doubled at every halving (BTI-DBF: 32). Sizes that cannot be halved so often are filled up
    with zeros on the way in and cut off on the way out.
    """

    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        height, width, channels = images.shape[1:]
        depth = halvings(height, width)
        missing = [(0, -size % 2**depth) for size in (height, width)]
        x, skips = jnp.pad(images, [(0, 0), *missing, (0, 0)]), []
        for level in range(depth):
            x = self._block(x, self.width * 2**level, f"down{level}")
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = self._block(x, self.width * 2**depth, "middle")
        for level, skip in reversed(list(enumerate(skips))):
            x = nn.leaky_relu(nn.ConvTranspose(x.shape[-1], (3, 3), (2, 2), name=f"widen{level}")(x))
            x = self._block(jnp.concatenate([x, skip], -1), self.width * 2**level, f"up{level}")
        return conv(channels, 1, use_bias=True, dtype=jnp.float32, name="out")(x)[:, :height, :width]

    def _block(self, x: jax.Array, features: int, name: str) -> jax.Array:
        for number in (1, 2):
            x = conv(features, 3, use_bias=True, dtype=jnp.float32, name=f"{name}_conv{number}")(x)
            x = nn.leaky_relu(nn.InstanceNorm(epsilon=1e-5, name=f"{name}_norm{number}")(x))
        return x
