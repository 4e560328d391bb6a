"""Which network the arrays of a file are: guessed from their names and shapes, or named; its sizes are read from them."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from bibau_jax import models
from bibau_jax.errors import UserError, shown, unknown
from bibau_jax.importers import rules
from bibau_jax.models import Classifier

SIDE = 224  # of the images that a network is tried with: its parameters depend on their channels alone
SHOWN = 6  # keys of a file that an error tells
OWN = "a network of your own is named by --config.model.file"

Shapes = dict[str, tuple[int, ...]]  # of the arrays, by our paths


class Architecture(NamedTuple):
    """A network of `bibau_jax.models` by name, the options that give it the file's sizes, the table of its keys, its channels.

    `options` holds num_classes and what the network's function takes besides; `channels` are those of its images.
    """

    name: str
    options: dict
    table: rules.Table
    channels: int


class Network(NamedTuple):
    """How a network's sizes are read from shapes; `first` is the path of the kernel that is given the image."""

    table: rules.Table
    sizes: Callable[[Shapes], dict]
    first: str


def _count(shapes: Shapes, pattern: str) -> dict[str, int]:
    """How many modules match the pattern, by what its first group is."""
    modules = {path.split("/")[1] for path in shapes if path.startswith("params/")}
    found: dict[str, int] = {}
    for match in filter(None, (re.fullmatch(pattern, module) for module in modules)):
        found[match.group(1)] = found.get(match.group(1), 0) + 1
    return found


def _residual(shapes: Shapes) -> dict:
    """Of networks of blocks called layer1_0: blocks per stage, and the channels of the first."""
    stages = _count(shapes, r"layer(\d+)_\d+")
    depths = tuple(stages[str(number)] for number in range(1, len(stages) + 1))
    return {"width": shapes["params/layer1_0/conv1/kernel"][-1], "stages": depths}


def _vgg(shapes: Shapes) -> dict:
    """Convolutions are three numbers apart within a stage, four across a max-pool."""
    kernels = {path: shape for path, shape in shapes.items() if path.endswith("/kernel") and len(shape) == 4}
    numbers = sorted(int(match.group(1)) for path in kernels if (match := re.fullmatch(r"params/features_(\d+)/kernel", path)))
    ends = [place for place, (one, other) in enumerate(zip(numbers, numbers[1:], strict=False), 1) if other - one > 3]
    stages = tuple(int(depth) for depth in np.diff([0, *ends, len(numbers)]))
    hidden = shapes.get("params/classifier_0/kernel", (0, 0))[-1]
    return {"width": kernels["params/features_0/kernel"][-1], "stages": stages, "hidden": hidden}


def _transformer(shapes: Shapes) -> dict:
    """Heads cannot be seen: there is one for every 64 of the width, as in all published sizes."""
    patch, _, _, width = shapes["params/patches/kernel"]
    grid = math.isqrt(shapes["params/positions"][-2] - 1)
    depth = sum(_count(shapes, r"(block)_\d+").values())
    return {"width": width, "stages": (depth,), "heads": max(1, width // 64), "patch": patch, "size": grid * patch}


def _clip(shapes: Shapes) -> dict:
    return _transformer(shapes) | {"projection": shapes["params/projection"][-1]}


STEM = "params/conv1/kernel"
NETWORKS = {
    "resnet18": Network(rules.RESNET, _residual, STEM),
    "resnet18_imagenet": Network(rules.RESNET, _residual, STEM),
    "resnet20": Network(rules.RESNET, _residual, STEM),
    "preact_resnet18": Network(rules.RESNET, _residual, STEM),
    "wide_resnet16": Network(rules.WIDE_RESNET, _residual, STEM),
    "vgg19_bn": Network(rules.VGG, _vgg, "params/features_0/kernel"),
    "vit_b_32": Network(rules.VIT, _transformer, "params/patches/kernel"),
    "clip_vit_b_32": Network(rules.CLIP_VIT, _clip, "params/patches/kernel"),
}


def guess(arrays: dict[str, np.ndarray]) -> Architecture:
    """The one network whose parameters the arrays are, every one of them; UserError where none fits, or more than one.

    What leaves no trace in the parameters cannot be told: a stem for 32x32 images with a max-pool, other activations.
    """
    read = {name: found for name in NETWORKS if (found := _read(name, arrays)) is not None}
    problems = {name: _misfits(found, arrays) for name, found in read.items()}
    fitting = [name for name, listed in problems.items() if not listed]
    if len(fitting) == 1:
        return read[fitting[0]]
    if fitting:
        listed = " or of ".join(fitting)
        raise UserError(f"the weights are those of {listed}, which have the same names and shapes: name one by model.name")
    if problems:
        name = min(problems, key=lambda name: len("".join(problems[name])))
        raise UserError(f"the weights look like those of {name}, but do not fit it: {'; '.join(problems[name])}; {OWN}")
    raise UserError(f"the weights are of no network that is known ({', '.join(NETWORKS)}); {_keys(arrays)}; {OWN}")


def by_name(name: str, arrays: dict[str, np.ndarray]) -> Architecture:
    """The named network in the sizes that the arrays have; UserError where they are not its own."""
    if name not in NETWORKS:
        raise unknown("model", name, NETWORKS)
    found = _read(name, arrays)
    if found is None:
        raise UserError(f"the weights are not those of {name}; {_keys(arrays)}")
    if problems := _misfits(found, arrays):
        raise UserError(f"the weights do not fit {name}: {'; '.join(problems)}")
    return found


def classifier(found: Architecture, *, num_classes: int, image_shape: tuple[int, int, int], **options) -> Classifier:
    """The network for these data; UserError where they have other classes or channels.

    `options` (mean, std, dtype) go to it, and take the place of those that the file cannot tell, e.g. heads.
    """
    if found.options["num_classes"] != num_classes:
        raise UserError(f"the model has {found.options['num_classes']} classes, the data have {num_classes}")
    if found.channels != image_shape[2]:
        ways = {(3, 1): "; --config.data.channels=3 shows grey ones so", (1, 3): "; --config.data.channels=1 makes them grey"}
        hint = ways.get((found.channels, image_shape[2]), "")
        raise UserError(f"the model takes images of {found.channels} channels, the data have {image_shape[2]}{hint}")
    return models.build(found.name, image_shape=image_shape, **found.options | options)


def _read(name: str, arrays: dict[str, np.ndarray]) -> Architecture | None:
    """The network in the arrays' sizes; None where they lack what its sizes are read from."""
    network = NETWORKS[name]
    try:
        shapes = _shapes(arrays, network.table)
        # A head that is missing, or sizes of zero, are told where the network is tried: it is built with one instead.
        classes, channels = shapes.get("params/head/kernel", (1,))[-1], shapes[network.first][-2]
        sizes = {"num_classes": max(1, classes)} | network.sizes(shapes)
        return Architecture(name, sizes, network.table, max(1, channels))
    except (KeyError, ValueError, IndexError):  # an array that is not there, or has other axes
        return None


def _shapes(arrays: dict[str, np.ndarray], table: rules.Table) -> Shapes:
    placed = {rules.place_of(name, array, table): array for name, array in arrays.items()}
    return {path: (rules.turned(array) if path.endswith("kernel") else array).shape for path, array in placed.items() if path}


def _misfits(found: Architecture, arrays: dict[str, np.ndarray]) -> list[str]:
    try:
        network = models.build(found.name, image_shape=(SIDE, SIDE, found.channels), **found.options, **_plain(found.channels))
        like = jax.eval_shape(network.init, jax.random.key(0))
    except UserError as error:
        return [str(error)]
    return rules.misfits(arrays, found.table, like)


def _plain(channels: int) -> dict:
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


def _keys(arrays) -> str:
    more = ", ..." if len(arrays) > SHOWN else ""
    return f"the file has {', '.join(map(shown, list(arrays)[:SHOWN]))}{more}"
