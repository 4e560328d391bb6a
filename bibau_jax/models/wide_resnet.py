"""Wide ResNet for small images (Zagoruyko and Komodakis, BMVC 2016): pre-activation blocks, 16 layers at two blocks a stage."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.models.classifier import Classifier, NormOfConv
from bibau_jax.models.layers import BatchNorm, Head, Normalize, conv
from bibau_jax.models.resnet import blocks


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input; where the width changes, to a 1x1 convolution of the first BN-ReLU."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut_conv")(y)
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(y)
        self.sow("taps", "conv1_output", y)
        y = nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(y, train))
        y = conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        self.sow("taps", "conv2_output", y)
        return y + shortcut


class WideResNet(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]); stages as in `ResNet`, BN-ReLU behind the last."""

    classes: int
    width: int
    stages: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = Normalize(self.mean, self.std, self.dtype)(pixels)
        x = conv(16, 3, dtype=self.dtype, name="conv1")(x)
        self.sow("taps", "conv1_output", x)
        for name, features, stride in blocks(self.width, self.stages):
            x = PreActivationBlock(features, stride, self.dtype, name=name)(x, train)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        features = x.astype(jnp.float32).mean((1, 2))
        return Head(self.classes, name="head")(features), features


def wide_resnet16(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 16,
    stages: Sequence[int] = (2, 2, 2),
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.247, 0.243, 0.261),
    dtype: Any = jnp.float32,
) -> Classifier:
    """WRN-16-k with `width` 16 k channels in the first stage. Mean and std on the 0..1 scale.

    Norms that stand behind a sum belong to no convolution alone: `norms` has the stem's and each block's second, `sums` the
    others.
    """
    module = WideResNet(num_classes, width, tuple(stages), tuple(mean), tuple(std), dtype)
    told = described(width, stages)
    return Classifier(module, num_classes, tuple(image_shape), **told | {"sums": (*told["sums"], ("bn1",))})


def described(width: int, stages: Sequence[int]) -> dict[str, tuple]:
    """What a `Classifier` says of pre-activation blocks behind a stem "conv1": its `norms`, `stages`, `layers` and `sums`."""
    names = [name for name, _, _ in blocks(width, stages)]
    norms = [NormOfConv(("conv1",), (names[0], "bn1")), *(NormOfConv((name, "conv1"), (name, "bn2")) for name in names)]
    ends = tuple((f"layer{number}_{depth - 1}",) for number, depth in enumerate(stages, 1))
    layers = (("conv1",), *((name, f"conv{i}") for name in names for i in (1, 2)))
    sums = tuple((name, "bn1") for name in names[1:])
    return {"norms": tuple(norms), "stages": ends, "layers": layers, "sums": sums}
