"""A small VGG as a network of one's own: how a file for --config.model.file is written.

It is that of the I-BAU authors' example (Zeng et al., ICLR 2022): three stages of two convolutions, each with BatchNorm and
ELU, then a max-pool; the 2048 values that are left of a 32x32 image go to a linear layer. Their dropout is left out.

python -m bibau_jax.main --config=configs/own_model.py --workdir=runs/mine --config.model.weights=suspect.pth \
  --config.data.folder=clean/ --config.model.file=examples/small_vgg.py
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bibau_jax.errors import UserError
from bibau_jax.models import Classifier, NormOfConv
from bibau_jax.models.layers import BatchNorm, Head, Normalize, conv

STAGES = ((32, (0, 3)), (64, (8, 11)), (128, (16, 19)))  # channels, and the convolutions' numbers in the authors' `features`

# PyTorch's name of a module -> where it is here. What lies below (weight, bias, running statistics) follows by itself.
TABLE = (
    (r"features\.(\d+)", r"features_\1"),
    (r"classifier", r"head"),
)


class SmallVGG(nn.Module):
    """Pixels 0..255 [N, H, W, C] to (logits [N, classes], features [N, D]): what the module of a Classifier must do.

    It takes `train` for BatchNorm, computes in a field `dtype`, and tells what is to be compared by `sow("taps", NAME_output)`.
    """

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels, train: bool = False):
        x = Normalize(self.mean, self.std, self.dtype)(pixels)
        for width, numbers in STAGES:
            for number in numbers:
                x = conv(width, 3, use_bias=True, dtype=self.dtype, name=f"features_{number}")(x)
                self.sow("taps", f"features_{number}_output", x)
                x = nn.elu(BatchNorm(dtype=self.dtype, name=f"features_{number + 1}")(x, train))
            x = nn.max_pool(x, (2, 2), (2, 2))
        # PyTorch flattens channels first. Doing so here too lets the linear layer's weights stay as they are.
        features = x.transpose(0, 3, 1, 2).reshape(len(x), -1).astype(jnp.float32)
        return Head(self.classes, name="head")(features), features


def build(*, num_classes, image_shape, mean, std, dtype) -> Classifier:
    """The network for these data. `norms` says which norm scales which convolution: defences that prune go by it."""
    if tuple(image_shape[:2]) != (32, 32):
        raise UserError(f"the small VGG takes images of 32x32 pixels, not {image_shape[0]}x{image_shape[1]} (data.image_size)")
    numbers = [number for _, stage in STAGES for number in stage]
    norms = tuple(NormOfConv((f"features_{number}",), (f"features_{number + 1}",)) for number in numbers)
    return Classifier(SmallVGG(num_classes, tuple(mean), tuple(std), dtype), num_classes, tuple(image_shape), norms=norms)
