"""ResNet of basic blocks (He et al., CVPR 2016) behind a stem for small images or large; average pooling, a linear head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bibau_jax.models.classifier import Classifier, NormOfConv
from bibau_jax.models.layers import BatchNorm, Head, Normalize, conv


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut (1x1 conv and BN where the shape changes), then ReLU."""

    features: int
    stride: int
    dtype: Any
    padded: bool = False  # the shortcut takes every second pixel and fills up channels with zeros: no parameters

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shortcut = x
        if self.padded:
            missing = self.features - x.shape[-1]
            strided = x[:, :: self.stride, :: self.stride]
            shortcut = jnp.pad(strided, [(0, 0)] * 3 + [(missing // 2, missing - missing // 2)])
        elif self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut_conv")(x)
            shortcut = BatchNorm(dtype=self.dtype, name="shortcut_bn")(shortcut, train)
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        self.sow("taps", "conv1_output", y)
        y = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(y, train))
        y = conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        self.sow("taps", "conv2_output", y)
        return nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(y, train) + shortcut)


class ResNet(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]).

    Stage s has `stages[s]` blocks of `width * 2**s` channels; every stage but the first halves the image. The stem is a 3x3
    convolution, or with `imagenet` one of 7x7 at stride 2 and a 3x3 max-pool at stride 2: a quarter of the image.
    """

    classes: int
    width: int
    stages: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    dtype: Any = jnp.float32
    padded: bool = False
    imagenet: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = Normalize(self.mean, self.std, self.dtype)(pixels)
        size, stride = (7, 2) if self.imagenet else (3, 1)
        x = conv(self.width, size, stride, dtype=self.dtype, name="conv1")(x)
        self.sow("taps", "conv1_output", x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        if self.imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for name, features, stride in blocks(self.width, self.stages):
            x = BasicBlock(features, stride, self.dtype, self.padded, name=name)(x, train)
        features = x.astype(jnp.float32).mean((1, 2))
        return Head(self.classes, name="head")(features), features


def blocks(width: int, stages: Sequence[int]) -> list[tuple[str, int, int]]:
    """(name, features, stride) of every block, in order; names follow PyTorch's `layer1.0`."""
    return [
        (f"layer{s + 1}_{b}", width * 2**s, 2 if s and not b else 1) for s, depth in enumerate(stages) for b in range(depth)
    ]


def resnet18(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 64,
    stages: Sequence[int] = (2, 2, 2, 2),
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.247, 0.243, 0.261),
    dtype: Any = jnp.float32,
) -> Classifier:
    """ResNet-18 with a 3x3 stem; `width` and `stages` make it narrower or shallower. Mean and std on the 0..1 scale."""
    norms, inputs = [NormOfConv(("conv1",), ("bn1",))], width
    for name, features, stride in blocks(width, stages):
        norms += [NormOfConv((name, f"conv{i}"), (name, f"bn{i}")) for i in (1, 2)]
        if stride != 1 or features != inputs:
            norms.append(NormOfConv((name, "shortcut_conv"), (name, "shortcut_bn")))
        inputs = features
    module = ResNet(num_classes, width, tuple(stages), tuple(mean), tuple(std), dtype)
    ends = tuple((f"layer{number}_{depth - 1}",) for number, depth in enumerate(stages, 1))
    return Classifier(module, num_classes, tuple(image_shape), norms=tuple(norms), stages=ends)


def resnet18_imagenet(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 64,
    stages: Sequence[int] = (2, 2, 2, 2),
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: Any = jnp.float32,
) -> Classifier:
    """ResNet-18 with the stem for 224x224 images: torchvision's, which BackdoorBench uses on small ones too.

    Sizes, mean and std as in `resnet18`.
    """
    shape = {"num_classes": num_classes, "image_shape": image_shape, "width": width, "stages": stages}
    small = resnet18(**shape, mean=mean, std=std, dtype=dtype)
    return dataclasses.replace(small, module=small.module.clone(imagenet=True))


def resnet20(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 16,
    stages: Sequence[int] = (3, 3, 3),
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: Any = jnp.float32,
) -> Classifier:
    """ResNet-20 of He et al.'s section 4.2: three stages, shortcuts without parameters. Mean and std on the 0..1 scale."""
    names = [name for name, _, _ in blocks(width, stages)]
    norms = [NormOfConv(("conv1",), ("bn1",))]
    norms += [NormOfConv((name, f"conv{i}"), (name, f"bn{i}")) for name in names for i in (1, 2)]
    ends = tuple((f"layer{number}_{depth - 1}",) for number, depth in enumerate(stages, 1))
    module = ResNet(num_classes, width, tuple(stages), tuple(mean), tuple(std), dtype, padded=True)
    return Classifier(module, num_classes, tuple(image_shape), norms=tuple(norms), stages=ends)
