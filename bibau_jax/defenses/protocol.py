"""What every defence is given and gives back.

`purify(key, classifier, variables, clean, *, held_out=None, journal=..., **options) -> Purified`. `clean` is the
defender's small labelled set, `held_out` more clean images to watch (never trained on). A defence never sees the
trigger, the poisoned data, the test set or the attack success rate; one that does says so in its signature (`triggered`,
`poisoned`) and in the type of what it gives back.

A module may also have `check(num_classes, **options)`, which raises `UserError` on a setting that `purify` cannot use, and
`check_network(classifier)`, which raises `NotApplicable` on a network that it cannot treat; both are called early.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from bibau_jax import train
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier


@dataclasses.dataclass(frozen=True)
class Purified:
    """The purified model's variables and what was measured on the way, one dict an epoch.

    `samples`, from defences that make images: `rows` [n] of the clean set and the `adversarial` uint8 images made of them.
    `told`: what a defence found out or chose (a threshold, how many channels it pruned, classes that it flags), for the record.
    `evidence`: arrays to look at, e.g. reversed triggers.
    """

    variables: Any
    history: list[dict]
    samples: dict[str, np.ndarray] | None = None
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    evidence: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Informed(Purified):
    """What a defence gives back that was given poisoned training images: it knows more than the others."""


@dataclasses.dataclass(frozen=True)
class Ideal(Purified):
    """What a procedure gives back that sees the trigger: a reference for defences, none itself."""


def check_clean(classifier: Classifier, clean: ImageSet) -> None:
    """Refuses a clean set that is empty, of another image shape, or with labels outside the classes."""
    if not len(clean):
        raise UserError("the defender's clean set is empty")
    check_images(classifier, clean, "clean images")
    if clean.labels.min() < 0 or clean.labels.max() >= classifier.num_classes:
        raise UserError(f"labels of the clean set lie outside the network's {classifier.num_classes} classes")


def check_images(classifier: Classifier, given: ImageSet, what: str) -> None:
    """Refuses images of another shape than the network's; `what` they are, for the message."""
    if given.images.shape[1:] != classifier.image_shape:
        raise UserError(f"{what} are {list(given.images.shape[1:])}, the network takes {list(classifier.image_shape)}")


def as_data(images: ImageSet) -> dict[str, np.ndarray]:
    """The set as the batches of `train.fit` want it."""
    return {"images": images.images, "labels": images.labels}


def watch(classifier: Classifier, held_out: ImageSet | None) -> Callable:
    """An `after_epoch` for `train.fit`: accuracy on held-out clean images, 0..1, where there are any."""
    if held_out is None or not len(held_out):
        return lambda state, epoch: {}
    return lambda state, epoch: {
        "held_out_accuracy": train.accuracy(classifier, state.variables, held_out.images, held_out.labels)
    }
