"""What the rest of the project knows of a network: a frozen record over a Flax linen module."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Path = tuple[str, ...]


class Outputs(NamedTuple):
    """One forward pass: `logits` [N, classes] and `features` [N, D] in float32, and what was asked for beside them.

    `statistics` is the new `batch_stats` collection in train mode (else None); `taps` maps layer names to activations.
    """

    logits: jax.Array
    features: jax.Array
    statistics: Any = None
    taps: Mapping[str, jax.Array] | None = None


class NormOfConv(NamedTuple):
    """A convolution and the normalisation that scales its channels, as paths into `params`."""

    conv: Path
    norm: Path


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An image classifier on pixels 0..255, NHWC (uint8 or float); normalisation is its first layer.

    `head` is the path of the linear head, whose kernel is [D, classes]; `norms` pairs convolutions with the norm behind each,
    as the network runs; `stages` are the modules whose outputs [N, H, W, C] end the stages, the last of them what is pooled
    into features. `layers` are those that models are compared in where they are not the convolutions of `norms`; they are
    tapped, and their kernels end in [..., C]. `sums` are norms behind a sum, which belong to no convolution alone.
    """

    module: nn.Module
    num_classes: int
    image_shape: tuple[int, int, int]
    head: Path = ("head",)
    norms: tuple[NormOfConv, ...] = ()
    stages: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()
    sums: tuple[Path, ...] = ()

    def init(self, key: jax.Array) -> dict:
        """Fresh variables {"params", "batch_stats"}, float32; the latter is {} for a network without BatchNorm."""
        init = partial(self.module.init, mutable=["params", "batch_stats"])
        return {"batch_stats": {}} | dict(jax.jit(init)(key, jnp.zeros((1, *self.image_shape))))

    def apply(self, variables, pixels, train: bool = False, taps: bool = False) -> Outputs:
        """Logits and features of pixels [N, H, W, C] in 0..255; `train` uses and updates batch statistics."""
        mutable = [name for name, wanted in (("batch_stats", train), ("taps", taps)) if wanted]
        result = self.module.apply(variables, pixels.astype(jnp.float32), train=train, mutable=mutable or False)
        (logits, features), changed = result if mutable else (result, {})
        statistics = changed.get("batch_stats", {}) if train else None
        return Outputs(logits, features, statistics, _flat_taps(changed["taps"]) if taps else None)

    @property
    def main_path(self) -> tuple[NormOfConv, ...]:
        """`norms` in order, without those of shortcuts."""
        return tuple(pair for pair in self.norms if not any("shortcut" in name for name in pair.conv))

    @property
    def compared(self) -> tuple[Path, ...]:
        """The layers whose activations models are compared by (BEC), as the network runs; shortcuts are none of them."""
        return self.layers or tuple(pair.conv for pair in self.main_path)

    @property
    def all_norms(self) -> dict[str, Path]:
        """The path of every norm by its name, "layer1_0/bn1": those behind convolutions and those behind sums."""
        return {"/".join(path): path for path in (*(pair.norm for pair in self.norms), *self.sums)}

    def map_norms(self, params, change: Callable[[str, dict], dict]) -> dict:
        """`params` with every norm's {"scale", "bias"} replaced by `change("layer1_0/bn1", them)`."""
        for name, path in self.all_norms.items():
            params = _replaced(params, path, change(name, at(params, path)))
        return params

    def head_kernel(self, params) -> jax.Array:
        """The weights W of the linear head, [D, classes]."""
        return at(params, self.head)["kernel"]

    def in_float32(self) -> "Classifier":
        """The same network computing in float32 throughout; one without a field `dtype` is as it is.

        A module without that field has one way to compute, and that is its own.
        """
        if "dtype" not in {field.name for field in dataclasses.fields(self.module)}:
            return self
        return dataclasses.replace(self, module=self.module.clone(dtype=jnp.float32))


def at(tree, path: Path):
    """What lies at a path of nested dicts."""
    for name in path:
        tree = tree[name]
    return tree


def _replaced(tree, path: Path, value) -> dict:
    return value if not path else {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}


def _flat_taps(tree) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
    return {"/".join(str(part.key) for part in path).removesuffix("_output"): value[0] for path, value in flat}
