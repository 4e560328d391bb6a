"""A stranger's model, brought in: from a file of weights to a network that answers, with everything found out on the way."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bibau_jax import train
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.importers import architectures, rules, torch_file
from bibau_jax.models import Classifier, own_file

# How pixels are scaled before a network sees them, by what it is known as: mean and standard deviation on the 0..1 scale.
NORMALISATIONS = {
    "0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
TRIED_ON = 500  # images that a normalisation is chosen on
GUESSING = 1.5  # times the accuracy of guessing that a network must reach on its owner's images


class Suspect(NamedTuple):
    """A network with a stranger's weights, the file's own arrays, and where each of them went (see `rules.Imported`).

    `told`: file, sha256, format, container, prefix, network and its options, normalisation with mean and std, accuracy by
    normalisation.
    """

    classifier: Classifier
    variables: dict
    arrays: dict[str, Any]
    places: dict[str, str]
    told: dict[str, Any]


def bring(
    weights,
    images: ImageSet,
    *,
    class_names: tuple[str, ...] = (),
    name: str = "",
    file: str = "",
    container: str = "",
    normalisation: str = "auto",
    mean=(),
    std=(),
    dtype: Any = jnp.float32,
) -> Suspect:
    """The model in a file of weights, for images like these.

    Args:
      weights: path of a `.pt`, `.pth`, `.tar`, `.th` or `.safetensors` file. container: see `torch_file.read`.
      images: labelled clean images of the kind that the network takes. class_names: of their classes, () where unknown.
      name: a network of `models.names()`, or "" to tell it by keys and shapes. file: one's own network, see `own_file`.
      normalisation: one of NORMALISATIONS, "given" for `mean` and `std`, or "auto": that under which most images are
        classified right.

    UserError in one line for a file that cannot be read, a network that does not fit it, another number of classes, and weights
    that classify these images no better than guessing.
    """
    weights = Path(weights).expanduser()
    checkpoint = torch_file.read(weights, container or None)
    network, shape = _network(checkpoint.arrays, name, file, len(class_names)), images.images.shape[1:]
    candidates = _candidates(normalisation, mean, std, shape[2])

    def build(scaling) -> Classifier:
        return network.build(image_shape=shape, mean=scaling[0], std=scaling[1], dtype=dtype)

    first = build(next(iter(candidates.values())))
    names = _names(weights, first.num_classes, class_names)
    imported = rules.to_variables(checkpoint.arrays, network.table, jax.eval_shape(first.init, jax.random.key(0)))
    accuracy, some = {}, images.take(slice(None, None, max(1, len(images) // TRIED_ON)))
    for called, scaling in candidates.items():
        accuracy[called] = train.accuracy(build(scaling), imported.variables, some.images, some.labels)
    chosen = max(accuracy, key=accuracy.get)
    if accuracy[chosen] < GUESSING / first.num_classes:
        raise UserError(
            f"{weights} classifies {100 * accuracy[chosen]:.1f} % of the images right, hardly more than guessing; are the "
            "classes in the order of the network's outputs, and is the scale of its pixels known (model.normalisation)?"
        )
    told = {
        "file": str(weights),
        "sha256": torch_file.sha256(weights),
        "format": checkpoint.format,
        "container": checkpoint.container,
        "prefix": checkpoint.prefix,
        "network": network.told,
        "class_names": list(names),
        "normalisation": chosen,
        "mean": list(candidates[chosen][0]),
        "std": list(candidates[chosen][1]),
        "accuracy_by_normalisation": accuracy,
    }
    return Suspect(build(candidates[chosen]), imported.variables, checkpoint.arrays, imported.places, told)


class _Network(NamedTuple):
    build: Callable[..., Classifier]
    table: rules.Table
    told: str


def _network(arrays, name: str, file: str, num_classes: int) -> _Network:
    """What the weights are those of: one's own network, the one that is named, or the one that its keys tell."""
    if file:
        own = own_file.load(file)
        return _Network(partial(own.build, num_classes=num_classes), own.table, Path(file).name)
    found = architectures.by_name(name, arrays) if name else architectures.guess(arrays)
    given = partial(architectures.classifier, found, num_classes=found.options["num_classes"])
    return _Network(given, found.table, found.name)


def _names(weights, count: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the network's classes; UserError where the images are of others."""
    numbers = tuple(map(str, range(count)))
    if len(names) == count:
        return names
    if names == numbers[: len(names)]:
        return numbers  # numbered classes, of which the last have no images
    raise UserError(f"{weights} tells {count} classes apart, and the images are of {len(names)}")


def _candidates(normalisation: str, mean, std, channels: int) -> dict[str, tuple]:
    if normalisation == "given":
        if len(mean) != channels or len(std) != channels:
            raise UserError(f"model.mean and model.std need {channels} values, one a channel of the images")
        return {"given": (tuple(mean), tuple(std))}
    if normalisation not in ("auto", *NORMALISATIONS):
        known = ", ".join(("auto", "given", *NORMALISATIONS))
        raise UserError(f'model.normalisation "{normalisation}" is unknown; choose one of {known}')
    chosen = NORMALISATIONS if normalisation == "auto" else {normalisation: NORMALISATIONS[normalisation]}
    if channels != 3:  # grey: what differs by colour is one
        chosen = {name: tuple((sum(part) / 3,) * channels for part in pair) for name, pair in chosen.items()}
    return chosen
