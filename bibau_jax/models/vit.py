"""Vision Transformers (Dosovitskiy et al., ICLR 2021): torchvision's ViT-B/32, and the image encoder of OpenAI's CLIP."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.errors import UserError
from bibau_jax.models.classifier import Classifier
from bibau_jax.models.layers import Head, Normalize

xavier, small = nn.initializers.xavier_uniform(), nn.initializers.normal(0.02)


class Patches(nn.Module):
    """[N, H, W, C] to one token a patch, [N, patches, features]: a convolution whose stride is its size, as one product."""

    features: int
    size: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, height, width, channels = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (self.size, self.size, channels, self.features))
        x = x.reshape(count, height // self.size, self.size, width // self.size, self.size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, self.size**2 * channels)
        x = x @ kernel.reshape(-1, self.features).astype(self.dtype)
        return x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else x


class Block(nn.Module):
    """Attention, then two linear layers, each behind a LayerNorm and added to its input: tokens [N, T, D] to [N, T, D]."""

    heads: int
    clip: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype, kernel_init=xavier)
        y = _norm(self.clip, self.dtype, "norm1")(x)
        q, k, v = jnp.split(linear(3 * width, name="qkv")(y).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        likeness = jnp.einsum("nqhd,nkhd->nhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        y = jnp.einsum("nhqk,nkhd->nqhd", nn.softmax(likeness).astype(self.dtype), v).reshape(x.shape)
        y = linear(width, name="out")(y)
        self.sow("taps", "out_output", y)
        x = x + y
        y = linear(4 * width, name="mlp1")(_norm(self.clip, self.dtype, "norm2")(x))
        y = y * nn.sigmoid(1.702 * y) if self.clip else nn.gelu(y, approximate=False)
        y = linear(width, name="mlp2")(y)
        self.sow("taps", "mlp2_output", y)
        return x + y


def _norm(clip: bool, dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5 if clip else 1e-6, dtype=dtype, use_fast_variance=False, name=name)


class VisionTransformer(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]), the class token's.

    `projection` above 0 is CLIP's form: a LayerNorm before the blocks, QuickGELU, LayerNorm's epsilon 1e-5, patches without
    bias, and features projected to so many. Images of another size are scaled to `size` first, bilinear without antialiasing.
    """

    classes: int
    width: int
    depth: int
    heads: int
    patch: int
    size: int
    projection: int
    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        clip, tokens = self.projection > 0, (self.size // self.patch) ** 2 + 1
        x = Normalize(self.mean, self.std, jnp.float32)(pixels)
        if x.shape[1:3] != (self.size, self.size):
            x = jax.image.resize(x, (len(x), self.size, self.size, x.shape[-1]), "bilinear", antialias=False)
        x = Patches(self.width, self.patch, not clip, self.dtype, name="patches")(x.astype(self.dtype))
        first = self.param("class_token", small if clip else nn.initializers.zeros, (self.width,))
        place = self.param("positions", small, (tokens, self.width))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(x), 1, self.width))
        x = jnp.concatenate([first, x], 1) + place.astype(self.dtype)
        x = _norm(clip, self.dtype, "norm0")(x) if clip else x
        for number in range(self.depth):
            x = Block(self.heads, clip, self.dtype, name=f"block_{number}")(x)
        features = _norm(clip, jnp.float32, "norm")(x[:, 0])
        if clip:
            features = features @ self.param("projection", small, (self.width, self.projection))
        return Head(self.classes, name="head")(features), features


def vit_b_32(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 768,
    stages: Sequence[int] = (12,),
    heads: int = 0,
    patch: int = 32,
    size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: Any = jnp.float32,
) -> Classifier:
    """ViT-B/32 of torchvision; `width` and `stages` (blocks in all), `patch` and `size` (pixels) make it another ViT.

    `heads` 0 takes one for every 64 of the width. Mean and std on the 0..1 scale. Images are scaled to `size`, so any fit.
    """
    return _transformer(num_classes, image_shape, width, stages, heads, patch, size, 0, mean, std, dtype)


def clip_vit_b_32(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 768,
    stages: Sequence[int] = (12,),
    heads: int = 0,
    patch: int = 32,
    size: int = 224,
    projection: int = 512,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    dtype: Any = jnp.float32,
) -> Classifier:
    """The image encoder of OpenAI's CLIP ViT-B/32 (Radford et al., ICML 2021) under a linear head; sizes as in `vit_b_32`.

    `projection` is the length of its embeddings, which are the features; they are not normalised.
    """
    if projection < 1:
        raise UserError(f"model.projection must be at least 1, got {projection}")
    return _transformer(num_classes, image_shape, width, stages, heads, patch, size, projection, mean, std, dtype)


def _transformer(num_classes, image_shape, width, stages, heads, patch, size, projection, mean, std, dtype) -> Classifier:
    """Either form. Models are compared by what each half of a block adds to its tokens: ten layers are the last five blocks."""
    heads, depth = heads or max(1, width // 64), sum(stages)
    if width % heads or patch < 1 or size < patch or size % patch:
        raise UserError(f"a ViT of width {width} cannot have {heads} heads, or one of {size} pixels patches of {patch}")
    module = VisionTransformer(num_classes, width, depth, heads, patch, size, projection, tuple(mean), tuple(std), dtype)
    layers = tuple((f"block_{number}", part) for number in range(depth) for part in ("out", "mlp2"))
    return Classifier(module, num_classes, tuple(image_shape), layers=layers)
