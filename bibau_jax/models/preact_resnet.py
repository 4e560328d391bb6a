"""PreActResNet (He et al., ECCV 2016) as BackdoorBench has it: for small images, no norm behind the stem or before pooling."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.models.classifier import Classifier
from bibau_jax.models.layers import Head, Normalize, conv
from bibau_jax.models.resnet import blocks
from bibau_jax.models.wide_resnet import PreActivationBlock, described


class PreActResNet(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]); stages as in `ResNet`, nothing behind the last."""

    classes: int
    width: int
    stages: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = Normalize(self.mean, self.std, self.dtype)(pixels)
        x = conv(self.width, 3, dtype=self.dtype, name="conv1")(x)
        self.sow("taps", "conv1_output", x)
        for name, features, stride in blocks(self.width, self.stages):
            x = PreActivationBlock(features, stride, self.dtype, name=name)(x, train)
        features = x.astype(jnp.float32).mean((1, 2))
        return Head(self.classes, name="head")(features), features


def preact_resnet18(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 64,
    stages: Sequence[int] = (2, 2, 2, 2),
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.247, 0.243, 0.261),
    dtype: Any = jnp.float32,
) -> Classifier:
    """PreActResNet-18; `width` and `stages` make it narrower or shallower. Mean and std on the 0..1 scale.

    Its norms are described as those of `wide_resnet16`.
    """
    module = PreActResNet(num_classes, width, tuple(stages), tuple(mean), tuple(std), dtype)
    return Classifier(module, num_classes, tuple(image_shape), **described(width, stages))
