"""A stranger's model, brought in: from a file of weights to a network that answers, with everything found out on the way."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import train
from bibau_jax.data import ImageSet, splits
from bibau_jax.errors import UserError, shown
from bibau_jax.importers import architectures, rules, torch_file
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier, own_file

# How pixels are scaled before a network sees them, by what it is known as: mean and standard deviation on the 0..1 scale.
NORMALISATIONS = {
    "0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar10_narrow": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),  # the mean of the images' own deviations
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
NAMED_ONLY = ("tiny_imagenet",)  # too near to imagenet's, which is far more common, for images to tell them apart
TRIED_ON = 500  # images that a normalisation is chosen on
SENSE = 0.2  # of the way from guessing to perfect: an accuracy that a network must have on its owner's images
POOR = 0.5  # accuracy below which something may have been misunderstood
SURE = 2.0  # standard errors
FEW = 100  # images: below, nothing that is counted on them is certain
MOST_WRAPPINGS = 3  # objects within objects whose attribute a network may have been when its names were made
LOW = 0.5  # of the whole accuracy: a class that is told less often than that share of it is worth a word
DOUBTS = (
    "are the images of the size that it was trained with (data.image_size), the classes in the order of its outputs, and its "
    "scale of pixels known (model.normalisation)?"
)


class Suspect(NamedTuple):
    """A network with a stranger's weights, the file's own arrays, and where each of them went (see `rules.Imported`).

    `told`: file, sha256, format, container, prefix, what in the file is no tensor, network and class names, normalisation with
    mean and std, accuracy and loss by normalisation, those that the images cannot tell from the one chosen (`alike`), warnings;
    of a run also how many images there are (`counted`).
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
    heads: int | None = None,
    dtype: Any = jnp.float32,
) -> Suspect:
    """The model in a file of weights, for images like these.

    Args:
      weights: path of a `.pt`, `.pth`, `.tar`, `.th` or `.safetensors` file. container: see `torch_file.read`.
      images: labelled clean images of the kind that the network takes. class_names: of their classes, () where unknown.
      name: a network of `models.names()`, or "" to tell it by keys and shapes. file: one's own network, see `own_file`.
      normalisation: one of NORMALISATIONS, "given" for `mean` and `std`, or "auto": the one, those of NAMED_ONLY aside, under
        which the images' cross-entropy is lowest.
      heads: of attention, which no file tells; None for one for every 64 of the width.

    UserError in one line for a file that cannot be read, a network that does not fit it, another number of classes, classes
    without images, and weights that classify these images hardly better than guessing.
    """
    weights, classes = Path(weights).expanduser(), len(class_names) or int(images.labels.max()) + 1
    checkpoint = torch_file.read(weights, container or None)
    shape = images.images.shape[1:]
    candidates = _candidates(normalisation, mean, std, shape[2])

    def build(network: _Network, scaling) -> Classifier:
        return network.build(image_shape=shape, mean=scaling[0], std=scaling[1], dtype=dtype)

    def fit(arrays) -> tuple[_Network, Classifier, rules.Imported]:
        network = _network(arrays, name, file, classes, heads)
        first = build(network, next(iter(candidates.values())))
        like = jax.eval_shape(first.init, jax.random.key(0))
        try:
            return network, first, rules.to_variables(arrays, network.table, like)
        except UserError as error:
            raise UserError(f"{error}; the clean images are of {classes} classes") from None

    try:
        checkpoint, (network, first, imported) = _fitted(checkpoint, fit)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None
    names = _names(weights, first.num_classes, class_names)
    _refuse_missing(images.labels, names)
    some = splits.some_of(images, max(TRIED_ON, len(names)))
    logits = {
        name: train.logits(build(network, scaling), imported.variables, some.images) for name, scaling in candidates.items()
    }
    accuracy = {name: float(np.mean(found.argmax(1) == some.labels)) for name, found in logits.items()}
    losses = {name: np.asarray(cross_entropy(found, some.labels)) for name, found in logits.items()}
    loss = {name: float(np.mean(each)) for name, each in losses.items()}
    chosen = min(loss, key=loss.get)
    if accuracy[chosen] < SENSE + (1 - SENSE) / first.num_classes:
        right = f"{100 * accuracy[chosen]:.1f} %"
        raise UserError(f"{weights} gets {right} of the images right, hardly more than guessing; {DOUBTS}")
    told = {
        "file": str(weights),
        "sha256": torch_file.sha256(weights),
        "format": checkpoint.format,
        "container": checkpoint.container,
        "prefix": checkpoint.prefix,
        "others": list(checkpoint.others),
        "network": network.told,
        "class_names": list(names),
        "normalisation": chosen,
        "mean": list(candidates[chosen][0]),
        "std": list(candidates[chosen][1]),
        "accuracy_by_normalisation": accuracy,
        "loss_by_normalisation": loss,
        "alike": [name for name in losses if name != chosen and not _is_worse(losses[name] - losses[chosen])],
        "warnings": _warnings(some.labels, logits[chosen].argmax(1), names),
    }
    return Suspect(build(network, candidates[chosen]), imported.variables, checkpoint.arrays, imported.places, told)


def counted(suspect: Suspect, *, given: int, clean: int, held_out: int, measured: int) -> Suspect:
    """The same, with how many images there are: given in all, to scan and train with, held out of them, to measure on."""
    warnings = []
    if given < FEW:
        used = "" if clean == given else f", {clean} of them to scan and train with"
        warnings.append(f"There are only {given} clean images{used}; take {FEW} or more.")
    if measured < FEW:
        warnings.append(f"Models are measured on only {measured} images, so all shares are uncertain (--config.data.test).")
    images = {"given": given, "clean": clean, "held_out": held_out, "measured": measured}
    return suspect._replace(told=suspect.told | {"images": images, "warnings": warnings + suspect.told["warnings"]})


def _is_worse(differences: np.ndarray) -> bool:
    """Whether losses on the same images are higher than others by more than SURE standard errors of their mean difference."""
    return bool(differences.mean() > SURE * differences.std() / np.sqrt(len(differences)))


class _Network(NamedTuple):
    build: Callable[..., Classifier]
    table: rules.Table
    told: str


def _network(arrays: dict[str, Any], name: str, file: str, num_classes: int, heads: int | None) -> _Network:
    """What the weights are those of: one's own network, the one that is named, or the one that its keys tell."""
    if file:
        own = own_file.load(file)
        return _Network(partial(own.build, num_classes=num_classes), own.table, Path(file).name)
    found = architectures.by_name(name, arrays) if name else architectures.guess(arrays)
    options = {"heads": heads} if heads else {}
    given = partial(architectures.classifier, found, num_classes=found.options["num_classes"], **options)
    return _Network(given, found.table, found.name)


def _fitted(checkpoint: torch_file.Checkpoint, fit: Callable) -> tuple[torch_file.Checkpoint, Any]:
    """(the checkpoint, what `fit(arrays)` gives): without what all its keys begin with, where they fit only so.

    That is how those of a network look that was an attribute of a larger object ("model.conv1.weight"); the beginning is then
    the checkpoint's prefix.
    """
    told, tried = None, checkpoint
    for _ in range(1 + MOST_WRAPPINGS):
        try:
            return tried, fit(tried.arrays)
        except UserError as error:
            told = told or error  # about the keys as they stand in the file, which is what its owner knows
        tried = torch_file.without_common_prefix(tried)
        if tried is None:
            break
    raise told


def _refuse_missing(labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Classes that a network is purified without are unlearned with the backdoor, and nothing that is counted would tell."""
    missing = [name for label, name in enumerate(names) if label not in set(np.unique(labels).tolist())]
    if missing:
        raise UserError(f"there are no clean images of {_listed(missing)}; a network purified without them forgets the class")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"class{'es' * (len(names) > 1)} {', '.join(names[:6])}{more}"


def _warnings(labels: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """What about the images, or the way the network takes them, is worth a word; in sentences."""
    told, right = [], predicted == labels
    if right.mean() < POOR:
        told.append(f"The model gets only {100 * right.mean():.1f} % of the clean images right; {DOUBTS}")
    by_class = {label: right[labels == label].mean() for label in np.unique(labels)}
    if low := [names[label] for label, share in by_class.items() if share < LOW * right.mean()]:
        told.append(f"The model hardly knows images of {_listed(low)}; are the classes in the order of its outputs?")
    return told


def said(told: dict) -> list[str]:
    """What was found out, a line for the terminal each: how the file was read, then the warnings."""
    ways = {"container": "under", "prefix": "without"}
    where = ", ".join([told["format"], *(f"{way} {shown(told[name])}" for name, way in ways.items() if told[name])])
    scaling, classes = told["normalisation"], len(told["class_names"])
    right = f"{100 * told['accuracy_by_normalisation'][scaling]:.1f} % of the clean images right"
    alike = f" ({' and '.join(told['alike'])} would do nearly as well)" if told["alike"] else ""
    line = f"{told['network']} ({where}), {classes} classes, pixels scaled as {scaling}{alike}, {right}"
    left = [f"left out, being no tensors: {', '.join(told['others'][:6])}"] if told["others"] else []
    return [line, *([_counts(**told["images"])] if "images" in told else []), *left, *told["warnings"]]


def _counts(given: int, clean: int, held_out: int, measured: int) -> str:
    apart = f", {held_out:,} held out" if held_out else ""
    return f"images: {clean:,} to scan and train with{apart}; models are measured on {measured:,}"


def _names(weights, count: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the network's classes; UserError where the images are of others."""
    numbers = tuple(map(str, range(count)))
    if len(names) == count:
        return names
    if names == numbers[: len(names)]:
        return numbers  # numbered classes, of which the last have no images
    if names == tuple(map(str, range(len(names)))):
        found = f"the clean images have labels up to {len(names) - 1}"
    else:
        found = f"the clean images are of {len(names)}"
    raise UserError(f"{weights} tells {count} classes apart, and {found}")


def _candidates(normalisation: str, mean, std, channels: int) -> dict[str, tuple]:
    if normalisation == "given":
        if len(mean) != channels or len(std) != channels:
            raise UserError(f"model.mean and model.std need {channels} values, one a channel of the images")
        if min(std) <= 0:
            raise UserError(f"model.std must be positive, not {list(std)}")
        return {"given": (tuple(mean), tuple(std))}
    if normalisation not in ("auto", *NORMALISATIONS):
        known = ", ".join(("auto", "given", *NORMALISATIONS))
        raise UserError(f'model.normalisation "{normalisation}" is unknown; choose one of {known}')
    tried = [name for name in NORMALISATIONS if name not in NAMED_ONLY] if normalisation == "auto" else [normalisation]
    chosen = {name: NORMALISATIONS[name] for name in tried}
    if channels != 3:  # grey: what differs by colour is one
        chosen = {name: tuple((sum(part) / 3,) * channels for part in pair) for name, pair in chosen.items()}
    return chosen
